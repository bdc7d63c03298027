"""What only an accelerator can show, in one command of at most ten minutes on an H100 or H200; nothing is downloaded.

    python eval/gpu_check.py                                  # all parts
    python eval/gpu_check.py --parts numerics,resume --minutes 5
    python eval/gpu_check.py --tiny                           # tiny networks in place of SDXL and SANA; a CPU will do

Weights are random and data are noise. Every part runs in a process of its own, so that one that hangs, runs out of
memory or crashes does not take the others with it. What was found goes to eval/results/gpu/, a JSON file and a table
of it. Exit code 1 where a part has failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import recipe as recipes
from fewstep.cost.bench import _random, bench
from fewstep.device import choose, name_of, peak, reset_peak, wait
from fewstep.diffusion import kernels
from fewstep.errors import FewstepError, RecipeError, TrainingError, tell
from fewstep.files import check_writable, write, write_json
from fewstep.process import Process
from fewstep.recipe import Recipe
from fewstep.runs.build import build
from fewstep.runs.library import load_recipe
from fewstep.runs.summary import versions
from fewstep.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "gpu"
RESUMED = 0.02  # most of what training has moved the weights by since, that a resumed run may be off
DIFFERENT = 1e-3  # most that fp32 may be off between two devices, relative to the largest entry
DERIVED = 0.05  # most that a derivative may be off the difference of two forwards, relative
PLANNED = 0.15  # most that a plan may be off the memory that was used
GB = 1e9
MINUTES = 10.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a part runs on."""

    device: str
    tiny: bool

    @property
    def batches(self) -> tuple[int, ...]:
        return (1,) if self.tiny else (1, 2, 4, 8)

    @property
    def saved(self) -> int:
        """Iterations between the two checkpoints of a run."""
        return 3 if self.tiny else 10

    def recipe(self, name: str, *words: str) -> Recipe:
        """A recipe with options, without samples and checkpoints; shrunk as by ``--smoke`` where tiny."""
        recipe = load_recipe(name)
        if self.tiny:
            from fewstep.runs.smoke import smoke

            recipe = smoke(recipe)
        quiet = ["--train.sample_every=0", "--train.checkpoint_every=0", "--train.accumulate=1"]
        return recipes.override(recipe, [*quiet, f"--train.device={self.device}", *words])


@dataclass(frozen=True)
class Part:
    """One of the checks.

    Attributes:
        title: over its table. seconds: after which it is stopped; more where there are more than ten minutes for all.
        rows: yields what it finds, one row after another, so that those before a failure are kept.
    """

    title: str
    seconds: int
    rows: Callable[[Setting], Iterator[Row]]


def hold(fine: bool, message: str) -> None:
    """Raises TrainingError where a number is not as it has to be."""
    if not fine:
        raise TrainingError(message)


# -------------------------------------------------------------------------------------------------- fp32 beside the CPU
def numerics(setting: Setting) -> Iterator[Row]:
    """x0 of every kind of pipeline; losses and gradients of three methods; the same weights and noise on both."""
    from fewstep.teachers import adapters, load_teacher
    from fewstep.teachers.tiny import RESOLUTION, write_tiny_pipeline

    device = choose(setting.device)
    kernels.set_precision(device, tf32=False)
    kinds = {name: adapter for name, adapter in adapters().items() if adapter.kind == "diffusion"}
    for name in (n for n, adapter in kinds.items() if not adapter.edits):  # whose network is another's
        folder = write_tiny_pipeline(name, Path(tempfile.mkdtemp()))
        options = {"dtype": "float32", "resolution": RESOLUTION.get(name), "attention": "sdpa"}
        here, there = (predictions(load_teacher(str(folder), device=d, **options)) for d in ("cpu", device))
        yield compared(f"{name}: x0", here, there)
    for name in ("sdxl_dmd2_4step_24gb", "sdxl_sid_4step", "sana_sprint"):
        recipe = replace(setting, tiny=True).recipe(name, "--teacher.attention=sdpa")
        here, there = (gradients(recipe, torch.device(d)) for d in ("cpu", device))
        for phase in here:
            yield compared(f"{recipe.method_class.name}: {phase}", here[phase], there[phase])


@torch.no_grad()
def predictions(teacher) -> dict[str, Tensor]:
    """x0 at three times, guided where the teacher has a scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *teacher.latent_shape, generator=generator).to(teacher.device)
    cond = teacher.encode(["0", "1"]).to(teacher.device)  # texts or labels
    denoiser, schedule = teacher.denoiser, teacher.denoiser.schedule
    scale = 1.0 if denoiser.null is None and not denoiser.embeds_guidance else 3.0
    found = {}
    for share in (0.1, 0.5, 0.9):
        t = torch.full((2,), schedule.t_min + share * (schedule.t_max - schedule.t_min), device=x.device)
        found[f"{share}"] = denoiser.x0(x, t, cond, guidance=scale).cpu()
    return found


def gradients(recipe: Recipe, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Losses and gradients of each phase of a recipe's first iteration, by name."""
    from fewstep.cost.blank import Blank
    from fewstep.diffusion.rng import Rng
    from fewstep.teachers import load_teacher

    teacher = load_teacher(recipe.teacher.path, **recipe.teacher.options(), device=device)
    roles, method = build(recipe, teacher, Process(device=device))
    with torch.no_grad():
        for name, role in roles.items():  # adapters begin as nothing, and nothing has no gradient
            for i, weight in enumerate(role.weights.values()):
                weight += 0.02 * Rng(name, i, device=device).normal(*weight.shape)
    draws = lambda *key: (Rng(*key, device=device), Rng(*key))  # noqa: E731
    data = Blank(teacher, 2, recipe.method_class.needs(recipe.method), draws)
    trainer = Trainer(method, roles, data, recipe.train, process=Process(device=device), quiet=True)
    batches, found = trainer.batches(0), {}
    for phase in trainer.phases:
        for role in roles.values():
            role.requires_grad_(role.name in phase.train)
        sums: dict[str, Tensor] = {}
        trainer.add(sums, phase, batches[0], [roles[name] for name in phase.train], True, 1)
        grads = {
            f"{name} {key}": weight.grad
            for name in phase.train
            for key, weight in roles[name].weights.items()
            if weight.grad is not None
        }
        found[phase.name] = {key: value.detach().cpu() for key, value in {**sums, **grads}.items()}
        for role in roles.values():
            for weight in role.weights.values():
                weight.grad = None
    return found


def compared(what: str, here: dict[str, Tensor], there: dict[str, Tensor]) -> Row:
    """The largest difference between two devices beside the largest entry of the same tensor.

    Numbers stand beside numbers and gradients beside gradients: what is next to nothing there counts as a hundredth of
    the largest.
    """
    hold(here.keys() == there.keys(), f"{what}: other names on the device: {here.keys() ^ there.keys()}")
    off, worst = 0.0, ""
    for many in (False, True):
        names = [name for name in here if (here[name].ndim > 0) == many]
        largest = max((here[name].abs().max().item() for name in names), default=0.0)
        for name in names:
            size = max(here[name].abs().max().item(), largest / 100)
            apart = (here[name] - there[name]).abs().max().item() / size if size else 0.0
            hold(math.isfinite(apart), f"{what}: {name}: not finite")
            off, worst = max((off, worst), (apart, name))
    hold(off <= DIFFERENT, f"{what}: {worst}: {off:.1e} off the CPU's; expected at most {DIFFERENT:.0e}")
    return {"what": what, "tensors": len(here), "off": off, "expected": DIFFERENT}


# ---------------------------------------------------------------------------------------------------- turns of a method
def turns(trainer: Trainer) -> Iterator[Row]:
    """The phases of a first iteration, over and over until warm: seconds, peak memory, finite losses."""
    device = trainer.process.device
    rows: dict[str, Row] = {}
    for _ in range(3):
        batches = trainer.batches(0)
        for phase in (p for p in trainer.phases if p.due(trainer.progress)):
            wait(device)
            reset_peak(device)
            begin = time.perf_counter()
            found = trainer.turn(phase, batches)
            wait(device)
            seconds, most = time.perf_counter() - begin, peak(device)
            rows[phase.name] = {
                "turn": phase.name,
                "px": trainer.data.data.teacher.resolution,
                "batch": trainer.config.batch_size,
                "seconds": seconds,
                "peak_gb": most and most / GB,
                **{name.split("/")[-1]: value.item() for name, value in found.items()},
            }
    for row in rows.values():
        yield row
        odd = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        hold(not odd, f"{row['turn']}: {', '.join(odd)}: not finite")


def sid(setting: Setting) -> Iterator[Row]:
    """Both turns of SiD on SDXL; the generator's gradient goes through both networks."""
    yield from turns(_random(setting.recipe("sdxl_sid_4step", "--train.batch_size=2"))[0])


def sprint(setting: Setting) -> Iterator[Row]:
    """SANA-Sprint's turns, and its forward-mode derivative beside the difference of two forwards."""
    trainer, _ = _random(setting.recipe("sana_sprint", "--train.batch_size=2"))
    yield from turns(trainer)
    from fewstep.diffusion import consistency

    term, batch = trainer.method.term, trainer.batches(0)[0]
    x, ode = batch.real, batch.rng.normal_like(batch.real)
    t = torch.full((len(x),), 0.8, device=x.device, dtype=torch.float32)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return term.exact.predict("v", x, time, batch.cond)

    with torch.no_grad():
        begin = time.perf_counter()
        _, exact = consistency.forward_mode(velocity, x, t, ode)
        wait(x.device)
        seconds = time.perf_counter() - begin
        _, estimate = consistency.central_difference(velocity, x, t, ode, 1e-3)
        size = exact.norm()
        off = ((exact - estimate).norm() / size).item()
    yield {"turn": "derivative", "batch": len(x), "seconds": seconds, "size": size.item(), "off": off}
    hold(off <= DERIVED, f"the derivative is {off:.1e} off the difference; expected at most {DERIVED}")


# ------------------------------------------------------------------------------------------------- memory beside a plan
def memory(setting: Setting) -> Iterator[Row]:
    """What a turn of DMD2 on SDXL takes, beside what ``fewstep plan`` counts for that run."""
    from fewstep.cost import plan

    recipe = setting.recipe("sdxl_dmd2_4step_24gb", "--train.batch_size=2", "--train.steps=10")
    trainer, _ = _random(recipe)
    peaks = [row["peak_gb"] for row in turns(trainer)]
    if None in peaks:
        yield {"none": f"{trainer.process.device.type} keeps no count of its memory"}
        return
    del trainer
    begin = time.perf_counter()
    made = plan(recipe)
    row = {
        "what": f"{Path(load_recipe('sdxl_dmd2_4step_24gb').output).name}, batch 2",
        "peak_gb": max(peaks),
        "planned_gb": (made.held + made.iteration(2)) / GB,
        "plan_seconds": time.perf_counter() - begin,
    }
    row["plan_over_peak"] = row["planned_gb"] / row["peak_gb"]
    yield row
    hold(
        abs(row["plan_over_peak"] - 1) <= PLANNED,
        f"the plan is {row['plan_over_peak']:.2f} of the peak; expected 1 within {PLANNED}",
    )


# ------------------------------------------------------------------------------------------ checkpoint, kill and resume
def resume(setting: Setting) -> Iterator[Row]:
    """A run that is killed at its first checkpoint and resumed, beside the same run left alone."""
    half, whole = setting.saved, 2 * setting.saved
    words = [f"--train.steps={whole}", f"--train.checkpoint_every={half}", "--train.log_every=1"]
    words += [
        "--train.batch_size=2",
        *(f"--roles.{n}.warmup=0" for n in ("student", "critic", "discriminator")),
    ]
    recipe, folder = setting.recipe("sdxl_dmd2_4step_24gb", *words), Path(tempfile.mkdtemp())
    alone, killed = folder / "alone", folder / "killed"
    for run in (alone, killed):
        write(run / "recipe.yaml", recipes.dump(replace(recipe, output=str(run))))
    begin = time.perf_counter()
    finish(train_apart(alone))
    first = checkpoint_at(alone, half), checkpoint_at(alone, whole)
    yield {"run": "left alone", "seconds": time.perf_counter() - begin, "steps": steps_of(alone)}
    begin, child = time.perf_counter(), train_apart(killed)
    while not checkpoint_at(killed, half).is_dir() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    hold(child.wait() == -signal.SIGKILL, f"it ended with {child.returncode} before it could be killed")
    at = steps_of(killed)
    yield {"run": "killed", "seconds": time.perf_counter() - begin, "steps": at}
    begin = time.perf_counter()
    finish(train_apart(killed))
    row = {"run": "resumed", "seconds": time.perf_counter() - begin, "steps": steps_of(killed)}
    row |= distance(*first, checkpoint_at(killed, whole))
    yield row
    hold(row["steps"] == whole, f"its log has {row['steps']} steps; expected {whole}")
    hold(
        row["off"] <= RESUMED,
        f"resumed weights are off by {row['off']:.1e} of what training moved them; expected at most {RESUMED}",
    )


def train_apart(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, sys.argv[0], "--train", str(folder)])


def finish(child: subprocess.Popen) -> None:
    hold(child.wait() == 0, f"training ended with {child.returncode}; its message stands above")


def train(folder: Path) -> None:
    """Random weights through the trainer, from its newest checkpoint if there is one.

    Kernels are deterministic where there are such, so that a difference is one of the resumed state.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    trainer, _ = _random(recipes.load(folder / "recipe.yaml"), folder)
    trainer.restore()
    trainer.train()


def checkpoint_at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def steps_of(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines())


def distance(begun: Path, ended: Path, resumed: Path) -> Row:
    """How far two ends of a run are apart, beside how far training went from the checkpoint to the first of them."""
    from safetensors import safe_open

    apart = moved = 0.0
    same = count = 0
    files = [safe_open(str(folder / "state.safetensors"), "pt") for folder in (begun, ended, resumed)]
    for name in sorted(files[1].keys()):
        first, a, b = (file.get_tensor(name) for file in files)
        count, same = count + 1, same + a.equal(b)
        if "/weight/" in name:
            apart += (a.double() - b.double()).square().sum().item()
            moved += (a.double() - first.double()).square().sum().item()
    return {"off": math.sqrt(apart / moved), "tensors": count, "identical": same}


# ------------------------------------------------------------------------------------------- seconds beside a bare loop
def timed(setting: Setting, compiled: bool) -> Iterator[Row]:
    """``fewstep bench`` of DMD2 on SDXL: a student turn and a critic turn in each iteration."""
    if compiled and not kernels.compiles(device := choose(setting.device)):
        yield {"none": f"torch writes no code for {device.type}"}
        return
    recipe = setting.recipe(
        "sdxl_dmd2_4step_24gb", "--method.critic_steps=1", f"--teacher.compile={compiled}"
    )
    for batch in setting.batches:
        found = bench(recipe, [f"--train.batch_size={batch}"], 1, "bare", random_weights=True)
        gc.collect()
        yield {"batch": batch, **found}


def eager(setting: Setting) -> Iterator[Row]:
    yield from timed(setting, compiled=False)


def compiled(setting: Setting) -> Iterator[Row]:
    yield from timed(setting, compiled=True)


# Those that take least come first: what time runs out for is the last of them.
PARTS = {
    "numerics": Part("fp32 beside the CPU, tiny pipelines, TF32 off", 120, numerics),
    "sid": Part("SiD's turns: `sdxl_sid_4step`", 90, sid),
    "sprint": Part("SANA-Sprint's turns and forward-mode derivative: `sana_sprint`", 90, sprint),
    "memory": Part("Peak memory beside `fewstep plan`: `sdxl_dmd2_4step_24gb`", 150, memory),
    "resume": Part("Checkpoint, SIGKILL, resume: `sdxl_dmd2_4step_24gb`", 240, resume),
    "eager": Part("`fewstep bench` of both turns of `sdxl_dmd2_4step_24gb`, eager", 200, eager),
    "compiled": Part("The same, compiled blocks", 240, compiled),
}


# -------------------------------------------------------------------------------------------- one process for each part
def run_part(name: str, setting: Setting, path: Path) -> None:
    """In the part's own process: its rows so far are in the file at any time, and what ended it."""
    result: dict[str, Any] = {"rows": []}
    write_json(path, result)
    try:
        for row in PARTS[name].rows(setting):
            result["rows"].append(row)
            write_json(path, result)
    except BaseException as error:
        text = traceback.format_exc().strip()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = lines[-1] if isinstance(error, FewstepError) else f"{type(error).__name__}: {lines[-1]}"
        write_json(path, {**result, "error": said, "traceback": text})
        raise


def apart(name: str, setting: Setting, seconds: float, folder: Path) -> dict[str, Any]:
    """Runs a part in a process of its own, and ends it with all that it has started when its time is over."""
    path, begin = folder / f"{name}.json", time.perf_counter()
    words = ["--part", name, "--json", str(path), "--device", setting.device, *["--tiny"] * setting.tiny]
    child = subprocess.Popen(
        [sys.executable, sys.argv[0], *words],
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    late = False
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    result = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    result["seconds"] = round(time.perf_counter() - begin, 1)
    if late:
        result["error"] = f"cut off after {seconds:.0f} s, with {len(result['rows'])} rows done"
    elif child.returncode:
        died = f"its process ended with {child.returncode}"
        if child.returncode < 0:
            died = f"its process was ended by {signal.Signals(-child.returncode).name}"
        result.setdefault("error", died)
    return result


def run_all(names: list[str], setting: Setting, minutes: float, out: Path) -> int:
    """All parts, one after the other; both files are written anew after each."""
    device = choose(setting.device)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "eval/gpu_check.py", *sys.argv[1:]]),
        "device": name_of(device),
        "tiny": setting.tiny,
        "versions": versions(),
        "parts": {},
    }
    write_json(f"{out}.json", report)  # before minutes are spent
    end, more = time.monotonic() + 60 * minutes, max(1.0, minutes / MINUTES)
    with tempfile.TemporaryDirectory(prefix="fewstep-gpu-check-", ignore_cleanup_errors=True) as folder:
        for name in names:
            left = end - time.monotonic()
            print(f"gpu_check: {name}: {PARTS[name].title}", flush=True)
            if left > 1:
                result = apart(name, setting, min(PARTS[name].seconds * more, left), Path(folder))
            else:
                result = {"rows": [], "seconds": 0.0, "error": f"not begun: {minutes:g} minutes were over"}
            report["parts"][name] = {"title": PARTS[name].title, **result}
            print(f"gpu_check: {name}: {result.get('error', 'done')}, {result['seconds']} s", flush=True)
            write_json(f"{out}.json", report)
            write(f"{out}.md", table(report))
    failed = [name for name, result in report["parts"].items() if "error" in result]
    print(f"gpu_check: {out}.md; " + (f"failed: {', '.join(failed)}" if failed else "all well"))
    return int(bool(failed))


# ------------------------------------------------------------------------------------------------------------ the table
def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: what became of each part, then its rows."""
    lines = [
        f"# {report['device']}" + (", tiny networks" if report["tiny"] else ""),
        "",
        f"`{report['command']}`; random weights, noise for data. "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        "",
        "| part | | seconds |",
        "| --- | --- | --- |",
    ]
    for name, part in report["parts"].items():
        lines.append(
            f"| {name} | {('failed: ' + part['error']) if 'error' in part else 'done'} | {part['seconds']} |"
        )
    for name, part in report["parts"].items():
        lines += ["", f"## {name}: {part['title']}", ""]
        heads = list(dict.fromkeys(key for row in part["rows"] for key in row))
        if heads:
            lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        lines += ["| " + " | ".join(shown(row.get(head)) for head in heads) + " |" for row in part["rows"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, which a CPU can run")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, xpu, mps; cpu with --tiny")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument(
        "--out", type=Path, help="both files without their endings; default eval/results/gpu/DEVICE"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # of a part's own process
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # of a process that is to be killed
    args = parser.parse_args()
    setting = Setting(args.device, args.tiny)
    try:
        if args.train:
            train(args.train)
            return 0
        if args.part:
            run_part(args.part, setting, args.json)
            return 0
        names = args.parts.split(",")
        if odd := [name for name in names if name not in PARTS]:
            raise RecipeError(f"--parts: {odd[0]!r} is no part; expected some of {','.join(PARTS)}")
        if not 0 <= args.minutes < math.inf:
            raise RecipeError(f"--minutes: {args.minutes:g}: expected 0 or more")
        device = choose(args.device, "--device")
        if device.type == "cpu" and not args.tiny:
            raise RecipeError(f"--device: {args.device}: it needs an accelerator; --tiny runs on the CPU")
        slug = re.sub(r"[^a-z0-9]+", "-", name_of(device).lower()).strip("-")
        for suffix in (".json", ".md"):
            check_writable(Path(f"{args.out or RESULTS / slug}{suffix}"), "--out", (suffix,))
        return run_all(names, setting, args.minutes, args.out or RESULTS / slug)
    except FewstepError as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
