"""Seconds per iteration of a recipe under each choice of arithmetic, kernels and memory, on the CPU at hand.

    python eval/choices.py                  # emoji_dmd2_1step, about 10 minutes; nothing else should run meanwhile

Every choice trains in a process of its own, in turns, for several rounds; ratios are of the same round. All of it is
done twice, the second time as on a processor without matrix units for bf16 (oneDNN then leaves them alone). A file and
a table go to eval/results/choices/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError, tell
from fewstep.files import SHARED, check_writable, write, write_json
from fewstep.runs.library import load_recipe

RESULTS = Path(__file__).parent / "results" / "choices"
OLD = ["--teacher.autocast=bfloat16", "--teacher.attention=math"]
CHOICES = {
    "bf16, math attention, freed memory given back": [*OLD, "--give-back"],
    "bf16, math attention, freed memory kept": OLD,
    "auto, freed memory kept": [],
    "the same, one_noise": ["--method.one_noise=true", "--method.gan_time_range=[0.02,0.98]"],
}
UNITS = {"as it is": {}, "without matrix units for bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}}


def measured(name: str, words: list[str], cycles: int) -> dict[str, Any]:
    """Seconds of an iteration, the mean over whole cycles of turns after the first."""
    import fewstep.runs.session
    from fewstep import recipe as recipes
    from fewstep.cost.bench import _real

    if "--give-back" in words:
        fewstep.runs.session.keep_freed = lambda _: None
    recipe = recipes.override(load_recipe(name), [word for word in words if word != "--give-back"])
    with tempfile.TemporaryDirectory() as folder:
        train = replace(recipe.train, steps=10**6, sample_every=0, checkpoint_every=0)
        trainer, _ = _real(replace(recipe, output=str(Path(folder) / "run"), train=train))
        count = math.lcm(*(phase.every for phase in trainer.phases))
        for _ in range(count):
            trainer.iterate()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(cycles * count):
            trainer.iterate()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    teacher: Any = trainer.method.teacher
    chosen = {"autocast": str(teacher.autocast).removeprefix("torch."), "attention": teacher.attention}
    return {"seconds": wall / cycles / count, "cpu_seconds": cpu / cycles / count, **chosen}


def child(name: str, words: list[str], cycles: int, env: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--one", "--cycles", str(cycles), *words]
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    lines = [
        f"# Choices of `{result['recipe']}` on a CPU",
        "",
        f"`{result['command']}`, {result['rounds']} rounds, {result['cpu']}. Medians; the ratio is to the",
        "first row, of the same round.",
        "",
        "| processor | choice | autocast, attention | seconds an iteration | processor time | ratio of seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for units, rows in result["units"].items():
        first = next(iter(rows.values()))
        for choice, rounds in rows.items():
            seconds, cpu = (statistics.median(r[k] for r in rounds) for k in ("seconds", "cpu_seconds"))
            ratio = statistics.median(r["seconds"] / f["seconds"] for r, f in zip(rounds, first, strict=True))
            what = f"{rounds[0]['autocast']}, {rounds[0]['attention']}"
            lines.append(f"| {units} | {choice} | {what} | {seconds:.3f} | {cpu:.3f} | {ratio:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="emoji_dmd2_1step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, words = parser.parse_known_args()
    if args.one:
        print(json.dumps(measured(args.recipe, words, args.cycles)))
        return 0
    load_recipe(args.recipe)  # before minutes are spent
    check_writable(args.out, "--out", record=SHARED)
    units: dict[str, dict[str, list[dict[str, Any]]]] = {kind: {c: [] for c in CHOICES} for kind in UNITS}
    for _ in range(args.rounds):
        for kind, env in UNITS.items():
            for choice, options in CHOICES.items():
                units[kind][choice].append(child(args.recipe, [*options, *words], args.cycles, env))
                print(f"{kind}: {choice}: {units[kind][choice][-1]}", flush=True)
    from fewstep.device import all_of_them

    result = {
        "command": " ".join(["python eval/choices.py", args.recipe, *words]),
        "recipe": args.recipe,
        "rounds": args.rounds,
        "cpu": all_of_them()["cpu"],
        "units": units,
    }
    write_json(args.out / f"{args.recipe}.json", result)
    write(args.out / f"{args.recipe}.md", table(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
