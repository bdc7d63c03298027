"""Kills a run with SIGKILL again and again, and compares what comes out with the same run left alone.

    python eval/random_kill.py emoji_dmd2_1step --kills 20 --out eval/results/random_kill.md --train.steps 60

Options that are not its own go to the recipe. Moments are random: while the process starts, within iterations, while
a checkpoint is written, while the student is exported. Exit code 1 where a single number differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file

from fewstep.errors import FewstepError, tell
from fewstep.files import check_writable, write
from fewstep.runs.summary import versions


def start(words: list[str], log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "fewstep", *words], stdout=file, stderr=file)


def steps_done(run: Path) -> int:
    try:
        return len((run / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def undisturbed(words: list[str], run: Path, log: Path) -> tuple[float, float]:
    """Seconds until the first step and until the end."""
    begin, child, first = time.time(), start([*words, "--output", str(run)], log), None
    while child.poll() is None:
        if first is None and steps_done(run):
            first = time.time() - begin
        time.sleep(0.05)
    if child.returncode or first is None:
        raise FewstepError(f"the undisturbed run failed with {child.returncode}; see {log}")
    return first, time.time() - begin


def killed(words: list[str], run: Path, log: Path, kills: int, steps: int, times: tuple, rng) -> Counter:
    """Kills and resumes until there were enough kills, then lets it end; counts where the kills fell.

    Args:
        times: seconds of the undisturbed run until its first step and until its end.
    """
    where: Counter = Counter()
    first, one_step = times[0], (times[1] - times[0]) / steps
    while (left := kills - sum(where.values())) > 0:
        begun = (run / "recipe.yaml").exists()
        child = start(["resume", str(run)] if begun else [*words, "--output", str(run)], log)
        if rng.random() < 0.2:  # at any moment of its start
            until = time.time() + rng.uniform(0, first)
        else:  # some steps later, so that all kills fall within the run
            done = steps_done(run)
            goal = done + rng.randint(1, max(1, 2 * (steps - done) // (left + 1)))
            while child.poll() is None and steps_done(run) < min(goal, steps - 1):
                time.sleep(0.02)
            until = time.time() + rng.uniform(0, one_step)
        while child.poll() is None and time.time() < until:
            time.sleep(0.002)
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.wait()
        part = [p.name.split("-")[-1] for p in run.rglob(".part-*")]
        where[
            "while writing " + part[0].split("_0")[0]
            if part
            else "training"
            if steps_done(run)
            else "starting"
        ] += 1
    child = start(["resume", str(run)], log)
    if child.wait():
        raise FewstepError(f"the resumed run failed with {child.returncode}; see {log}")
    return where


def differences(a: Path, b: Path) -> tuple[list[str], int]:
    """Names of what differs between two finished runs, and how many tensors were compared."""
    odd, count = [], 0
    files = [p.relative_to(a) for p in sorted(a.rglob("*.safetensors"))]
    for name in files:
        if not (b / name).is_file():
            odd.append(f"{name} is missing")
            continue
        one, two = load_file(a / name), load_file(b / name)
        count += len(one)
        odd += [
            f"{name}: {k}"
            for k in one.keys() | two.keys()
            if k not in one or k not in two or not one[k].equal(two[k])
        ]
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (run / "metrics.jsonl").open()
        ]
        for run in (a, b)
    ]
    return odd + ["metrics.jsonl"] * (logs[0] != logs[1]), count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the machine adds its own chance")
    parser.add_argument("--out", type=Path, help="Markdown file for the result")
    args, rest = parser.parse_known_args()
    if args.out:
        check_writable(args.out, "--out", (".md",))
    # A checkpoint at every step, and every step in the log.
    rest = ["--train.checkpoint_every", "1", "--train.log_every", "1", "--train.keep", "2", *rest]
    words, rng = ["train", args.recipe, *rest], random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="fewstep-kill-"))
    times = undisturbed(words, folder / "straight", folder / "straight.log")
    begin, steps = time.time(), steps_done(folder / "straight")
    where = killed(words, folder / "killed", folder / "killed.log", args.kills, steps, times, rng)
    odd, count = differences(folder / "straight", folder / "killed")
    lines = [
        f"# {args.recipe}: {sum(where.values())} times SIGKILL over {steps} steps",
        "",
        f"Command: `{shlex.join(['python', 'eval/random_kill.py', *sys.argv[1:]])}`",
        "",
        "| | |",
        "|---|---|",
        f"| kills | {sum(where.values())} ({', '.join(f'{n} {what}' for what, n in where.most_common())}) |",
        f"| tensors compared: weights, averages, moments, export | {count} |",
        f"| tensors that differ from the undisturbed run | {sum('.safetensors' in name for name in odd)} |",
        f"| records of metrics.jsonl, equal but for the seconds | {steps if 'metrics.jsonl' not in odd else 'no'} |",
        f"| seconds, undisturbed and killed | {times[1]:.0f} and {time.time() - begin:.0f} |",
        "",
        "Hardware: one of two cores of an x86-64 server without a GPU, one thread, shared with other work. Versions: "
        + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text, *odd[:10], f"logs and runs: {folder}", sep="\n")
    if args.out:
        write(args.out, text)
    return int(bool(odd))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
