"""Does a LoRA critic follow a student? DMD2 in four steps on ``builtin:emoji-xl``, beside a critic of full weights.

    python eval/lora_critic.py              # everything, half an hour of one core
    python eval/lora_critic.py --part lag   # critics alone, on samples of the untrained student, 10 minutes
    python eval/lora_critic.py --part train --only lora-8   # one training, 5 minutes

Lag is the loss on held-out samples over the same before the first update: how fast a critic learns a student that
stands still. A training ends with the distance of its student and with how far its critic was behind: its held-out
loss over the same after 50 further updates of all weights, the student frozen. Rows go to
eval/results/lora_critic/ one by one; those that are there already are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fewstep import recipe as recipes
from fewstep.configs import RoleConfig
from fewstep.diffusion.cond import Cond
from fewstep.errors import FewstepError, tell
from fewstep.files import SHARED, check_own, check_writable, write, write_json
from fewstep.methods.terms import noised, regression
from fewstep.process import start
from fewstep.recipe import Recipe
from fewstep.report.log import read_metrics
from fewstep.runs.checks import check_data
from fewstep.runs.library import load_recipe
from fewstep.runs.session import Session, execute
from fewstep.runs.summary import versions
from fewstep.training.optimizers import optimizer_of, take_step
from fewstep.training.roles import Role, build_role

RESULTS = Path(__file__).parent / "results" / "lora_critic"
TITLE = "# Does a LoRA critic follow a student?"
BASE = "emoji_dmd2_4step"
AT = (20, 50, 100)  # updates
HELD = 12  # batches

FULL = {f"full {lr:g}": RoleConfig(kind="full", lr=lr) for lr in (5e-7, 5e-5, 3e-4)}
LORA = {
    f"LoRA {rank}, alpha {alpha}, {lr:g}": RoleConfig(rank=rank, alpha=alpha, lr=lr)
    for rank, alpha, rates in (
        (64, 8, (5e-5, 5e-4, 5e-3)),
        (64, 64, (5e-5, 5e-4, 1e-3, 2e-3)),
        (16, 16, (2e-3,)),
        (8, 8, (1e-3,)),
    )
    for lr in rates
}
PROBES = FULL | LORA
Samples = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Cond]]

# Options beside those of the recipe, whose critic has full weights at 3e-4; all take as many iterations.
SHORT = ["--train.steps=300", "--train.batch_size=12", "--student.decay=100", "--train.sample_every=0"]
SHORT += ["--evaluation.teacher_steps=0", "--evaluation.floor_steps=[]", "--evaluation.named=0"]
TRAININGS: dict[str, list[str]] = {
    "full": [],
    "lora-8": ["--critic.kind=lora", "--critic.rank=8", "--critic.alpha=8", "--critic.lr=1e-3"],
    "lora-64": ["--critic.kind=lora", "--critic.rank=64", "--critic.alpha=64", "--critic.lr=5e-4"],
    "lora-slow": [
        "--critic.kind=lora",
        "--critic.rank=64",
        "--critic.alpha=8",
        "--critic.lr=5e-5",
    ],  # does not follow
}
FURTHER = 50  # updates
# By hand, when the numbers were there.
CONCLUSION = """## What works

With alpha equal to its rank a LoRA critic follows at ten times the rate of a whole one: at 5e-4 it is ahead of whole
weights at 5e-5 after 20 and 50 updates, and nearly level after 100. Rank matters little: 8, an eighth of the
narrowest layer here, has learned after 50 updates at 1e-3 what 64 has, as 64 of SDXL's 320 to 1280 should. Both ranks
train a student as good as that of the whole critic, with as many updates per student update (4): FD 633 and 639
against 637, and nothing left to learn at the end (1.00 and 1.01).

What does not: DMD2's adapter of students (rank 64, alpha 8) at 5e-5, which the SDXL recipes had for their critic. In
20 updates it learns 0.2% where whole weights learn 9%; alpha 8 of 64 takes eight times the rate on top of the ten.
Its student ends at FD 761, and its loss is 40% above what further updates reach. `critic_lag` does not show it (-0.11):
it compares the critic with the student only along what the critic has learned; a critic's loss that does not fall does.
Far above ten times (2e-3 at rank 64) it overshoots, as whole weights at 3e-4 do without their warm-up.

One seed each, one small teacher, and trainings of 75 student updates, too few to tell the better of two critics that
follow."""


# ------------------------------------------------------------------------------------------------------------ critics
def samples(session: Session, first: int, count: int) -> Samples:
    """(x0, x_t, t, condition) of a student that stands still, one batch each."""
    found: Samples = []
    for i in range(first, first + count):
        batch = session.trainer.data.batch(i, 0)
        with torch.no_grad():
            x0, cond = session.method.generate(batch)  # type: ignore[attr-defined]  # DMD2's
        found.append((x0, *noised(x0, session.teacher.denoiser.schedule, batch), cond))
    return found


def learn(session: Session, role: Role, taught: Samples, held: Samples) -> dict[int, float]:
    """Held-out losses of a critic by its updates."""
    critic = session.teacher.denoiser.with_net(role.module)
    optimizer, fine = optimizer_of(role), torch.zeros(())

    def held_out() -> float:
        with torch.no_grad():
            losses = [regression(critic, "native", x0, x_t, t, cond) for x0, x_t, t, cond in held]
        return float(torch.stack(losses).mean())

    found = {0: held_out()}
    for k, (x0, x_t, t, cond) in enumerate(taught, 1):
        regression(critic, "native", x0, x_t, t, cond).backward()
        torch.nn.utils.clip_grad_norm_(list(role.weights.values()), session.recipe.train.clip_norm)
        take_step(optimizer, role.config.lr, fine)
        optimizer.zero_grad(set_to_none=True)
        if k in AT:
            found[k] = held_out()
    return found


def recipe_of(folder: Path, *words: str) -> Recipe:
    return recipes.override(load_recipe(BASE), [f"--output={folder}", *words])


def opened(recipe: Recipe, begun: bool = False) -> Session:
    return Session(recipe, *check_data(recipe), start("cpu"), begun)


def probed(result: dict[str, Any], only: list[str], folder: Path) -> Any:
    """Yields after every critic that has learned the untrained student's samples."""
    session = opened(recipe_of(folder))
    taught, held = samples(session, 0, max(AT)), samples(session, 10**6, HELD)
    for name, config in PROBES.items():
        if name in result["lag"] or (only and name not in only):
            continue
        begin = time.perf_counter()
        role = build_role("critic", session.teacher.net, config)
        losses = learn(session, role, taught, held)
        lag = {str(k): round(losses[k] / losses[0], 4) for k in AT}
        result["lag"][name] = {"seconds": round(time.perf_counter() - begin, 1), **lag}
        print(f"{name}: {result['lag'][name]}", flush=True)
        yield


# ---------------------------------------------------------------------------------------------------------- trainings
def behind(session: Session) -> float:
    """How far the critic of a finished run is behind: its loss over that of all its weights trained further."""
    role = session.roles["critic"]
    module = copy.deepcopy(role.module)
    for name, weight in module.named_parameters():
        weight.requires_grad_(".lora_" not in name)
    further = Role("critic", module.float(), RoleConfig(kind="full", lr=5e-5))
    losses = learn(session, further, samples(session, 10**6 + HELD, FURTHER), samples(session, 10**6, HELD))
    return losses[0] / losses[FURTHER]


def trained(result: dict[str, Any], only: list[str], folder: Path) -> Any:
    """Yields after every training."""
    for name, words in TRAININGS.items():
        if name in result["train"] or (only and name not in only):
            continue
        run = folder / name
        recipe = recipe_of(run, *SHORT, *words)
        execute(recipe, resuming=run.exists())
        session = opened(recipe, begun=True)
        session.trainer.restore()
        table = json.loads((run / "eval" / "table.json").read_text())
        row = next(r for r in table["rows"] if r["kind"] == "student")
        lags = [line["health/critic_lag"] for line in read_metrics(run / "metrics.jsonl")][-10:]
        result["train"][name] = {
            "options": words,
            "iterations": recipe.train.steps,
            "seconds": round(session.trainer.seconds, 1),
            "critic_lag": round(statistics.mean(lags), 4),
            "behind": round(behind(session), 4),
            "metrics": {n: {k: m[k] for k in ("value", "error")} for n, m in row["metrics"].items()},
        }
        print(f"{name}: {result['train'][name]}", flush=True)
        yield


# -------------------------------------------------------------------------------------------------------------- table
def table(result: dict[str, Any]) -> str:
    lines = [
        TITLE,
        "",
        f"Made by `python eval/lora_critic.py` on one core of a shared server, with `{BASE}`; its student is a LoRA of",
        "rank 64 at 5e-4, its critic trains all weights at 3e-4. An adapter acts by alpha / rank times itself.",
        "",
        "## Critics alone",
        "",
        "Loss on held-out samples of the untrained student (288, noise and times the same for all), over that of the",
        "teacher, after so many updates of 24 samples, without warm-up.",
        "",
        f"| critic | {' | '.join(f'{k} updates' for k in AT)} |",
        "| --- |" + " --- |" * len(AT),
    ]
    for name in (n for n in PROBES if n in result["lag"]):
        row = result["lag"][name]
        lines.append(f"| {name} | {' | '.join(f'{row[str(k)]:.3f}' for k in AT)} |")
    lines += [
        "",
        "## Trainings",
        "",
        "The recipe with " + " ".join(f"`{word}`" for word in SHORT) + ". FD is that of the recipe's own",
        "evaluation, 500 images. Lag is `health/critic_lag`, 0 for a critic that is up to date, mean of the last 100",
        "iterations. Behind is the critic's held-out loss at the end over the same after 50 further updates of all of",
        "its weights, the student frozen: 1 for a critic with nothing left to learn.",
        "",
        "| critic | options | iterations | FD | KID | lag | behind |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in (n for n in TRAININGS if n in result["train"]):
        row = result["train"][name]
        fd, kid = (row["metrics"][f"{m}(effnet-lite0@96)"] for m in ("FD", "KID"))
        cells = [name, " ".join(f"`{word}`" for word in row["options"]) or "as it is", str(row["iterations"])]
        cells += [f"{fd['value']:.0f} ± {fd['error']:.0f}", f"{kid['value']:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {row['critic_lag']:.2f} | {row['behind']:.3f} |")
    return "\n".join([*lines, "", CONCLUSION]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["lag", "train"])
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="of critics or trainings")
    parser.add_argument("--runs", type=Path, default=Path("runs/lora_critic"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    check_writable(args.out, "--out", record=SHARED)
    kept, told = args.out / "lora_critic.json", args.out / "README.md"
    check_own(kept, '{\n "base":', "--out")
    check_own(told, TITLE, "--out")
    result: dict[str, Any] = {"base": BASE, "versions": versions(), "lag": {}, "train": {}}
    if kept.exists():
        result = json.loads(kept.read_text())
    for part in [args.part] if args.part else ["lag", "train"]:
        for _ in (probed if part == "lag" else trained)(result, args.only, args.runs):
            write_json(kept, result)
            write(told, table(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
