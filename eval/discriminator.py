"""What can a discriminator see? Heads on features of a network, or one of their own, against a student at rest.

    python eval/discriminator.py --run runs/emoji_dmd2_1step           # all heads, more than 20 minutes of one core
    python eval/discriminator.py --run runs/emoji_dmd2_1step --only mid_block
    python eval/discriminator.py --keep runs/other --of emoji_dmd2_1step     # a training with other options

Three quarters of the drawings teach, each with both of its captions; the others are held out. Fakes are drawn anew, so
a head that has learned drawings by heart, and not what tells them from fakes, is right on those that taught it and
guesses on the others. Rows go to eval/results/discriminator/ one by one; those that are there already are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep import recipe as recipes
from fewstep.diffusion import objectives
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.discriminator import Discriminator
from fewstep.diffusion.rng import Rng
from fewstep.errors import FewstepError, tell
from fewstep.files import SHARED, check_own, check_writable, write, write_json
from fewstep.leaderboard.render import number
from fewstep.methods.verdicts import BANDS, settled, verdicts
from fewstep.process import start
from fewstep.runs.checks import check_data
from fewstep.runs.library import load_recipe
from fewstep.runs.session import Session
from fewstep.runs.summary import versions

RESULTS = Path(__file__).parent / "results" / "discriminator"
TITLE = "# What can a discriminator see?"
# By hand, when the numbers were there.
HEADS_SAY = """## What heads can learn

Behind the noise that DMD2's discriminator is shown as published, all of the schedule, there is hardly anything
to be told: no head is better than 0.55 anywhere. Behind little noise each of them is right on more than half,
at most 0.64 after 300 updates, with first blocks or the middle one, of the critic or of the teacher. Told captions
do not help.

It is slow to learn, and heads are not all of it. After 1,200 updates heads on the same frozen features are right on
0.65 and 0.68 of the first two quarters; a small network that begins with nothing on 0.71 and 0.62; and heads whose
critic is taught with them on 0.82 and 0.76, of drawings that taught nobody."""
TRAININGS_SAY = """## What trainings make of it

The same measurement in all rows, and seed 0 unless one says another: 500 drawings of kinds, 500 by name. Right: at the
end of the training, behind the least noise and behind the next quarter. gan_weight 0 is without images; as the recipe
stands, `emoji_dmd2_1step` has FD 833 \u00b1 10 after 1,000 iterations and `emoji_sida_1step` 861 \u00b1 12 after 600,
without images (`emoji_sid_1step`) 836 \u00b1 14 (`eval/results`)."""
CONCLUSION = """## What follows

Three things keep the discriminator of the recipes at chance, and all of them have to go. The noise: it is shown all
of the schedule. The weight: as published its loss has a hundredth of the critic's, so that the features under the
heads do not move for its sake. The time: a thousand iterations are few. With little noise, a weight of 1 and 3,500
iterations it is right on 0.79 and 0.77 while the student moves.

What images give the student then is a little more than the error for names (0.75 for 0.70), less than it for FD (793
for 810), and KID differs the other way, within its error too (0.82 for 0.78): one run each. After 1,000 iterations
the discriminator is right on two thirds, and a pair of another seed has FD 836 for 841 and names 0.73 for 0.72:
nothing beyond the error. A gan_weight of 0.3 is too much for a discriminator that has not learned yet, and 0.1 for one
that has: the row of 4,300 iterations goes on from the one of 3,500, in bf16; the student fools its discriminator, which
is right less often again, and FD rises. First blocks as taps leave chance as well and give nothing. In pixels the
published weight is enough: the first strokes of a student differ from drawings more."""
BATCH, HELD = 24, 24  # HELD: batches
DECIDE = ("method.", "roles.", "train.seed")  # options that make a training another one


class Head(NamedTuple):
    """Of whose features, and behind how much noise it is taught, as a part of the schedule."""

    taps: tuple[str, ...]
    judge: str = "critic"
    times: tuple[float, float] = (0.0, 1.0)
    lr: float = 3e-4
    conditional: bool = False
    updates: int = 300
    whole: bool = False  # a copy of the network is taught with it; else the network stays the run's


CLEAN = (0.0, 0.2)
FIRST = ("conv_in", "down_blocks.0")
HEADS = {
    "mid_block": Head(("mid_block",)),
    "mid_block, little noise": Head(("mid_block",), times=CLEAN),
    "mid_block of the teacher, little noise": Head(("mid_block",), "teacher", CLEAN),
    "mid_block, conditional, little noise": Head(("mid_block",), times=CLEAN, conditional=True),
    "conv_in": Head(("conv_in",), times=CLEAN),
    "down_blocks.0": Head(("down_blocks.0",), times=CLEAN),
    "conv_in, down_blocks.0": Head(FIRST, times=CLEAN),
    "conv_in, down_blocks.0, all noise": Head(FIRST),
    "conv_in, down_blocks.0, 1e-3": Head(FIRST, times=CLEAN, lr=1e-3),
    "up_blocks.1": Head(("up_blocks.1",), times=CLEAN),
    "mid_block, little noise, 1,200 updates": Head(("mid_block",), times=CLEAN, updates=1200),
    "mid_block of a critic that is taught": Head(("mid_block",), times=CLEAN, whole=True),
    "mid_block of a critic that is taught, 1,200 updates": Head(
        ("mid_block",), times=CLEAN, whole=True, updates=1200
    ),
    "network of its own": Head((), "own", CLEAN, lr=1e-3),
    "network of its own, 1,200 updates": Head((), "own", CLEAN, lr=1e-3, updates=1200),
}


class Block(nn.Module):
    """Residual, of two convolutions; halves what it is given if asked to."""

    def __init__(self, channels: int, wide: int, halve: bool):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, wide, 3, 1, 1)),
            *(nn.GroupNorm(8, wide), nn.SiLU(), nn.Conv2d(wide, wide, 3, 1, 1)),
        )
        self.skip = nn.Conv2d(channels, wide, 1)
        self.last = nn.AvgPool2d(2) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.last(self.skip(x) + self.layers(x))
        return halved


def own_network(channels: int, height: int, width: int, wide: int = 64) -> nn.Module:
    """Latents (B, C, H, W) -> logits (B, 1); 0.6 M weights on 16 x 8 x 8, which know nothing to begin with."""
    blocks = [Block(wide, wide, False), Block(wide, 2 * wide, True), Block(2 * wide, 2 * wide, True)]
    last = [
        nn.GroupNorm(8, 2 * wide),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(2 * wide * (height // 4) * (width // 4), 1),
    ]
    return nn.Sequential(nn.Conv2d(channels, wide, 3, 1, 1), *blocks, *last)


class Drawings:
    """Real latents of a run, split by drawing: those of two captions are on one side."""

    def __init__(self, session: Session):
        data: Any = session.trainer.data
        data = getattr(data, "data", data)
        self.latents, self.captions = data.buckets[0].latents, data.captions
        every = self.latents.rows(torch.arange(len(self.latents)))["latents"].flatten(1)
        _, drawing = torch.unique(every, dim=0, return_inverse=True)
        self.held = drawing % 4 == 0

    def some(self, held: bool, rng: Rng) -> tuple[Tensor, Cond]:
        index = torch.nonzero(self.held == held)[:, 0]
        index = index[torch.floor(rng.uniform(BATCH) * len(index)).long()]
        return self.latents.rows(index)["latents"].float(), Cond(self.captions.rows(index))


class Judge:
    """Logits of a head: on features of a frozen network, of a copy that is taught with it, or on latents alone.

    Attributes:
        taught: what the optimizer gets.
    """

    def __init__(self, session: Session, head: Head):
        method: Any = session.method
        self.denoiser = session.teacher.denoiser if head.judge == "teacher" else method.critic
        if head.judge == "own":
            self.net = own_network(*method.latent_shape)
            self.taught = list(self.net.parameters())
            return
        if head.whole:
            self.denoiser = self.denoiser.with_net(copy.deepcopy(self.denoiser.net), self.denoiser.embedded)
        self.denoiser.net.requires_grad_(head.whole)
        self.net = Discriminator(self.denoiser, head.taps, method.latent_shape, head.conditional)
        self.taught = [*self.net.parameters(), *(self.denoiser.net.parameters() if head.whole else ())]

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        found: Tensor = (
            self.net.logits(self.denoiser, x_t, t, cond)
            if isinstance(self.net, Discriminator)
            else self.net(x_t)
        )
        return found


def judged(
    session: Session, drawings: Drawings, judge: Judge, head: Head, held: bool, i: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Logits and times of a batch of reals, and of fakes."""
    method: Any = session.method
    rng, schedule = Rng("discriminator", held, i), judge.denoiser.schedule
    real, real_cond = drawings.some(held, rng)
    with torch.no_grad():
        fake, cond = method.generate(session.trainer.data.batch(10**6 * (1 + held) + i, 0))
    t = schedule.draw_times(rng.uniform(2 * BATCH), *((0.0, 1.0) if held else head.times))
    both = torch.cat([real, fake])
    x_t = schedule.add_noise(both, rng.normal_like(both), t)
    logits = judge.logits(x_t, t, Cond.cat(real_cond, cond))
    return (logits[:BATCH], t[:BATCH]), (logits[BATCH:], t[BATCH:])


def measured(session: Session, drawings: Drawings, head: Head) -> dict[str, Any]:
    """Accuracies behind each quarter of noise on held-out drawings and fresh fakes, and the loss at the end."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    judge = Judge(session, head)
    optimizer = torch.optim.AdamW(judge.taught, lr=head.lr, weight_decay=0.01)
    losses = []
    for i in range(head.updates):
        real, fake = judged(session, drawings, judge, head, False, i)
        loss = objectives.gan_discriminator(real[0], fake[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for i in range(HELD):
            both = judged(session, drawings, judge, head, True, i)
            for name, value in verdicts(judge.denoiser.schedule, *both).items():
                sums[name] = sums.get(name, torch.zeros(())) + value
    found = settled(sums)
    return {
        "loss": round(torch.stack(losses[-50:]).mean().item(), 3),
        "accuracy": [round(found[f"discriminator_accuracy_{k + 1}"].item(), 3) for k in range(BANDS)],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        TITLE,
        "",
        f"Made by `python eval/discriminator.py` with a run of `{result['recipe']}` at step {result['step']}, whose",
        "networks are frozen, but for those that a row says are taught: 300 updates of the heads, or as many as a row",
        f"says, by {BATCH} drawings and {BATCH} samples of the student each. Right: share of verdicts on held-out",
        "drawings and fresh samples, by the noise they are behind (sigma over alpha); 0.50 is chance, and a quarter of",
        f"{2 * HELD * BATCH} verdicts has an error of about 0.03. Loss: at the end, on what teaches; 1.39 is chance.",
        "",
        "| features | loss | right: up to 0.41 | to 1 | to 2.4 | more |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in (n for n in HEADS if n in result["heads"]):
        row = result["heads"][name]
        lines.append(f"| {name} | {row['loss']:.2f} | {' | '.join(f'{a:.2f}' for a in row['accuracy'])} |")
    return (
        "\n".join([*lines, "", HEADS_SAY, "", TRAININGS_SAY, "", *_trainings(result), "", CONCLUSION]) + "\n"
    )


def _trainings(result: dict[str, Any]) -> list[str]:
    lines = [
        "| recipe | iterations | options | right | FD | KID | diversity | names found |",
        "| --- " * 8 + "|",
    ]
    for row in sorted(
        result["trainings"], key=lambda row: (row["recipe"], row["steps"], row["right"] is not None)
    ):
        right = "" if row["right"] is None else " ".join(f"{a:.2f}" for a in row["right"][:2])
        found = (number(row["metrics"].get(name)) for name in ("FD", "KID", "diversity", "retrieval"))
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
        lines.append(f"| `{row['recipe']}` | {row['steps']:,} | {options} | {right} | {' | '.join(found)} |")
    return lines


def training_of(run: Path, name: str) -> dict[str, Any]:
    """A finished run of a recipe as a row: its options, what its discriminator told apart at the end, its distances.

    Raises:
        FewstepError: it has not measured itself.
    """
    try:
        rows = json.loads((run / "eval" / "table.json").read_text())["rows"]
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except OSError as error:
        raise FewstepError(
            f"--keep: {run}: {error.strerror}: {error.filename}; let it end, with evaluation.num"
        ) from None
    metrics = next(row for row in rows if row["kind"] == "student")["metrics"]
    last = [line for line in logged if "health/discriminator_accuracy_1" in line][-5:]
    return {
        "recipe": name,
        "steps": recipes.load(run / "recipe.yaml").train.steps,
        "options": options_of(run, name),
        "right": _right(last) if last else None,
        "metrics": {
            key.partition("(")[0]: {k: m[k] for k in ("value", "error")} for key, m in metrics.items()
        },
        "cpu_seconds": json.loads((run / "run.json").read_text()).get("cpu_seconds"),
    }


def options_of(run: Path, name: str) -> dict[str, Any]:
    """Dotted field -> value, of what a run has otherwise than a recipe and what makes it another training."""
    own, source = (
        _flat(recipes.to_dict(one)) for one in (recipes.load(run / "recipe.yaml"), load_recipe(name))
    )
    return {key: own[key] for key in own if key.startswith(DECIDE) and own[key] != source.get(key)}


def _right(logged: list[dict[str, float]]) -> list[float]:
    """Means of the last records, for each quarter of noise that was seen."""
    names = [f"health/discriminator_accuracy_{k + 1}" for k in range(BANDS)]
    seen = [[line[name] for line in logged if name in line] for name in names]
    return [round(statistics.mean(values), 3) for values in seen if values]


def _flat(plain: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(plain, dict):
        return {prefix: plain}
    parts = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in plain.items()]
    return {key: value for part in parts for key, value in part.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--run", type=Path, help="of DMD2 or a sibling, with a checkpoint: teaches heads beside it"
    )
    what.add_argument(
        "--keep", type=Path, metavar="RUN", help="a finished training: a row of the second table"
    )
    parser.add_argument("--of", metavar="RECIPE", help="with --keep: the recipe that it is a training of")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="of heads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if bool(args.keep) != bool(args.of):
        parser.error("--keep and --of go together")
    check_writable(args.out, "--out", record=SHARED)
    kept, told = args.out / "heads.json", args.out / "README.md"
    check_own(kept, '{\n "recipe":', "--out")
    check_own(told, TITLE, "--out")
    result: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if args.keep:
        row = training_of(args.keep, args.of)
        same = ("recipe", "steps", "options")
        others = [one for one in result["trainings"] if any(one[key] != row[key] for key in same)]
        result["trainings"] = [*others, row]
        write_json(kept, result)
        write(told, table(result))
        return 0
    recipe = recipes.load(args.run / "recipe.yaml")
    recipe = recipes.override(recipe, [f"--output={args.run}"])
    session = Session(recipe, *check_data(recipe), start("cpu"), begun=True)
    if not session.trainer.restore():
        raise FewstepError(f"--run: {args.run}: no checkpoint; train it first")
    about = {
        "recipe": Path(recipe.output).name,
        "step": session.trainer.progress.iteration,
        "versions": versions(),
    }
    result = result or {**about, "heads": {}, "trainings": []}
    drawings = Drawings(session)
    for name, head in HEADS.items():
        if name in result["heads"] or (args.only and name not in args.only):
            continue
        result["heads"][name] = measured(session, drawings, head)
        print(f"{name}: {result['heads'][name]}", flush=True)
        write_json(kept, result)
        write(told, table(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
