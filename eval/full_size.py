"""One whole iteration of a recipe at its teacher's real size, with random weights, on a CPU: seconds, memory, export.

    python eval/full_size.py sd15_dmd2_1step --resolution 512 --critic.kind=lora
    python eval/full_size.py sdxl_dmd2_4step_24gb --resolution 256   # 24 GB of memory

Nothing is downloaded: configurations ship with fewstep. Arithmetic is fp32, a micro-batch has one sample. Each kind of
turn runs once, its resident peak stands beside what `fewstep plan` says of the same run, the trained LoRA is exported
and read back by stock diffusers into the network it came from, whose prediction has to be the student's. A file per
run and a table of all of them go to eval/results/full_size/.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep import recipe as recipes
from fewstep.errors import FewstepError, tell
from fewstep.files import SHARED, check_own, check_writable, write, write_json
from fewstep.recipe import Recipe
from fewstep.runs.library import load_recipe

RESULTS = Path(__file__).parent / "results" / "full_size"
TITLE = "# One iteration at the real size, on a CPU"


def overridden(name: str, resolution: int, words: list[str]) -> Recipe:
    """The recipe as a CPU of moderate memory can run it: fp32, one sample."""
    options = ["--teacher.dtype=float32", "--teacher.autocast=null", "--teacher.attention=sdpa"]
    options += [f"--teacher.resolution={resolution}", "--train.batch_size=1", "--train.accumulate=1"]
    options += ["--train.device=cpu", "--export.dtype=float32", "--output=full_size"]
    recipe = recipes.override(load_recipe(name), [*options, *words])
    return replace(recipe, train=replace(recipe.train, sample_every=0, checkpoint_every=0))


def planned(name: str, resolution: int, words: list[str]) -> dict[str, Any]:
    """What the plan of the same run says, in GB, without a card's libraries and fragments."""
    from fewstep.cost import plan

    begin = time.perf_counter()
    made = plan(overridden(name, resolution, words))
    peaks = {" + ".join(turn.phases): turn.peak[1] / 1e9 for turn in made.turns}
    return {"held_gb": made.held / 1e9, "turns_gb": peaks, "seconds": time.perf_counter() - begin}


def resident(which: str) -> float:
    """GB of this process: "VmRSS" now, "VmHWM" at the highest since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024 / 1e9


def give_back() -> None:
    """glibc returns what is freed at once, where training keeps up to 2 GB: resident is then what lives."""
    library = ctypes.CDLL(None)
    library.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    library.mallopt(-1, 2**20)  # M_TRIM_THRESHOLD
    library.malloc_trim(0)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def run(name: str, resolution: int, words: list[str]) -> dict[str, Any]:
    """Builds, runs each kind of turn once, exports, reads the export back."""
    from fewstep.cost.bench import _random
    from fewstep.cost.count import _due, _fill_optimizers, _turns

    recipe = overridden(name, resolution, words)
    before, begin = resident("VmRSS"), time.perf_counter()
    trainer, nets = _random(recipe)
    give_back()
    _fill_optimizers(trainer)  # moments come into being at the first step
    built = time.perf_counter() - begin
    turns = {}
    for turn in _turns(trainer):
        trainer.progress.iteration = next(
            i for i in range(recipe.train.steps) if _due(trainer, i) == turn.phases
        )
        forget_peak()
        begin = time.perf_counter()
        trainer.iterate()
        turns[" + ".join(turn.phases)] = {
            "seconds": time.perf_counter() - begin,
            "peak_gb": resident("VmHWM") - before,
        }
        print(f"{' + '.join(turn.phases)}: {turns[' + '.join(turn.phases)]}", flush=True)
    losses = {key: float(value) for key, value in trainer.window.means().items()}
    return {
        "parameters": sum(p.numel() for p in nets["teacher"].parameters()),
        "trained": {n: sum(w.numel() for w in role.weights.values()) for n, role in trainer.roles.items()},
        "built_seconds": built,
        "held_gb": resident("VmRSS") - before,
        "turns": turns,
        "losses": losses,
        "export": exported(trainer, recipe),
    }


@torch.no_grad()
def exported(trainer, recipe: Recipe) -> dict[str, Any]:
    """The student's LoRA as a user gets it, read by stock diffusers into the frozen network."""
    from fewstep.export import export_student

    teacher, student, begin = trainer.data.data.teacher, trainer.method.student, time.perf_counter()
    role = trainer.roles["student"]
    about = {
        "title": "full_size",
        "method": trainer.method.name,
        "recipe": recipes.digest(recipe),
        "prompt": "",
    }
    with tempfile.TemporaryDirectory() as folder:
        weights = {"student": {name: w.detach() for name, w in role.final_weights().items()}}
        path = export_student(
            Path(folder) / "export", teacher, student, weights, [role.config], about=about, dtype="float32"
        )
        files = {p.name: p.stat().st_size / 1e9 for p in path.glob("*.safetensors")}
        batch = trainer.data.batch(0, 0)
        x, cond = batch.rng.normal(*batch.shape), batch.cond
        own = student.x0(x, 0, cond)
        plain = teacher.denoiser.x0(x, student._time(0, x), cond)
        teacher.pipe.load_lora_weights(str(path))
        stock = teacher.denoiser.x0(x, student._time(0, x), cond)
    return {
        "files_gb": files,
        "seconds": time.perf_counter() - begin,
        "from_teacher": float((own - plain).abs().max()),
        "from_stock": float((own - stock).abs().max()),
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(folder: Path) -> str:
    """All files of a folder as Markdown."""
    lines = [
        TITLE,
        "",
        "Random weights, fp32, one sample, `python eval/full_size.py RECIPE --resolution R` on two cores. Memory is",
        "resident, beyond what Python and its libraries hold before; plan is what `fewstep plan` counts for the same",
        "run. Every export was read back by stock diffusers: the last column is how far its x0 is from the student's.",
        "",
        "| recipe | px | turn | seconds | peak GB | plan GB | plan / peak | export off by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(folder.glob("*.json")):
        r = json.loads(path.read_text())
        for turn, seen in r["turns"].items():
            name = " ".join([r["recipe"], *r["command"].split()[5:]])  # options of its own
            count = r["plan"]["held_gb"] + r["plan"]["turns_gb"][turn]
            lines.append(
                f"| {name} | {r['resolution']} | {turn} | {seen['seconds']:.0f} | {seen['peak_gb']:.2f} | "
                f"{count:.2f} | {count / seen['peak_gb']:.2f} | {r['export']['from_stock']:.0e} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, words = parser.parse_known_args()
    check_writable(args.out, "--out", record=SHARED)
    check_own(args.out / "README.md", TITLE, "--out")
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its memory goes with it
        counted = pool.apply(planned, (args.recipe, args.resolution, words))
    print(f"plan: {counted}", flush=True)
    seen = run(args.recipe, args.resolution, words)
    result = {
        "command": f"python eval/full_size.py {args.recipe} --resolution {args.resolution} {' '.join(words)}".strip(),
        "recipe": args.recipe,
        "resolution": args.resolution,
        "hardware": f"{torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "plan": counted,
        **seen,
    }
    path = args.out / f"{args.recipe}_{args.resolution}.json"
    write_json(path, rounded(result))
    write(args.out / "README.md", table(args.out))
    print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
