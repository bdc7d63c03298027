"""Where does a student lose? Its samples, behind noise of a level, and what the teacher then makes of them.

    python eval/lost.py --run runs/emoji_dmd2_1step --of emoji_dmd2_1step    # five minutes of one core

Noise of a level hides what is finer, and the teacher draws that anew (SDEdit, arXiv 2108.01073). Without noise these
are the student's samples, behind all of it the teacher's. By how much the distance falls up to a level is what the
student lacks below it; what is left is what it lacks above. Drawings of kinds, measured as a leaderboard does, in
eval/results/lost/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from discriminator import options_of
from torch import Tensor

from fewstep import recipe as recipes
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import Schedule, repeated
from fewstep.diffusion.solvers import ddim
from fewstep.errors import FewstepError, tell
from fewstep.evaluation.images import ArrayImages
from fewstep.files import SHARED, check_own, check_writable, write, write_json
from fewstep.leaderboard.board import load_board
from fewstep.leaderboard.measure import Ruler
from fewstep.leaderboard.render import number
from fewstep.process import start
from fewstep.runs.checks import check_data
from fewstep.runs.session import Session
from fewstep.runs.summary import versions
from fewstep.training.roles import averaged

HERE = Path(__file__).parent
TITLE = "# Where does a student lose?"
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)  # of the schedule
STEPS = 20  # of the teacher behind all of the noise, fewer behind less
BATCH = 56
# By hand, when the numbers were there.
SAYS = """## What it says

What is coarse is right, and too narrow: behind noise of 2.3 and more the student's samples are as good a beginning as
the teacher's own, with a smaller KID (0.55 for 0.64) and less diversity (0.34 for 0.44), which comes back only where
nothing of the student is left. What is missing is fine. Four tenths of the way from 876 to 763 are gone behind noise of
0.23, more than half behind 0.34, where a score difference at uniform times (0.02 to 0.98 of the schedule) has a twelfth
of its draws. `method.time_law log_normal` has half of them there; see `docs/methods/dmd2.md`."""
METRICS = ("FD", "KID", "precision", "recall", "diversity")


def noise_of(schedule: Schedule, t: float) -> float:
    """sigma over alpha."""
    at = torch.tensor([t], dtype=torch.float64)
    return (schedule.sigma(at) / schedule.alpha(at)).item()


@torch.no_grad()
def finished(session: Session, x0: Tensor, cond: Cond, rng: Rng, share: float, guidance: float) -> Tensor:
    """x0 (B, ...) noised to a share of the teacher's schedule, and the teacher's deterministic steps from there."""
    teacher = session.method.teacher
    if not share:
        return x0
    schedule = teacher.schedule
    first = schedule.draw_times(torch.tensor([share], dtype=torch.float64)).clamp(max=schedule.t_max)
    x_t = schedule.add_noise(x0, rng.normal_like(x0), repeated(first.item(), x0))
    if share == 1:
        x_t = schedule.begin(rng.normal_like(x0), first)
    unit = x_t / schedule.begin(torch.ones_like(x0), first)
    steps = max(2, round(STEPS * share))
    return ddim(teacher, unit, cond, steps, guidance=guidance, start=first.item())


def rows(session: Session, ruler: Ruler) -> list[dict[str, Any]]:
    """One for each share of the schedule, from the same samples of the averaged student."""
    method, count = session.method, len(ruler.groups)
    cond = session.teacher.encode(ruler.prompts[:count])
    made, schedule = [], method.teacher.schedule
    for share in SHARES:
        pixels = []
        for i in range(0, count, BATCH):
            rng, some = Rng(ruler.board.seed, "lost", i), cond.rows(torch.arange(i, min(i + BATCH, count)))
            noise = rng.normal(len(some), *method.latent_shape)
            with averaged(*session.trainer.roles.values()):
                x0 = method.student.sample(noise, some, rng.normal_like)
            x0 = finished(session, x0, some, rng, share, ruler.teacher.guidance)
            pixels.append(session.teacher.decode(x0))
        drawn = ArrayImages(np.concatenate(pixels), f"lost at {share}")
        found = ruler.of_kinds(drawn)
        t = schedule.draw_times(torch.tensor([share], dtype=torch.float64)).clamp(max=schedule.t_max).item()
        made.append(
            {"share": share, "noise": round(noise_of(schedule, t), 3) if share else 0.0, "metrics": found}
        )
        print(f"{share:g}: " + ", ".join(f"{name} {number(found[name])}" for name in METRICS), flush=True)
    return made


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        TITLE,
        "",
        f"Made by `python eval/lost.py` with a run of `{result['recipe']}` after {result['step']:,} iterations",
        f"({result['options']}), the teacher with guidance {result['guidance']:g}. Noise of a level is added to",
        "samples of the averaged student, and the teacher goes on from there. In the first row nothing is added; in",
        f"the last one nothing of the student is left. {result['count']} drawings of kinds, measured as on the",
        "leaderboard but from other noise, the same in all rows.",
        "",
        "| noise (sigma over alpha) | part of the schedule | " + " | ".join(METRICS) + " |",
        "|" + " --- |" * (2 + len(METRICS)),
    ]
    for row in result["rows"]:
        found = [number(row["metrics"][name]) for name in METRICS]
        ends = {0.0: "none: the student", 1.0: "all: the teacher"}
        level = ends.get(row["share"], f"{row['noise']:.2f}")
        lines.append(f"| {level} | {row['share']:g} | " + " | ".join(found) + " |")
    return "\n".join([*lines, "", SAYS, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="with a checkpoint")
    parser.add_argument("--of", metavar="RECIPE", required=True, help="the recipe that it is a training of")
    parser.add_argument("--board", type=Path, default=HERE / "boards" / "emoji_short.yaml")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "lost")
    args = parser.parse_args()
    check_writable(args.out, "--out", record=SHARED)
    told = args.out / "README.md"
    check_own(told, TITLE, "--out")
    board, recipe = load_board(args.board), recipes.load(args.run / "recipe.yaml")
    recipe = recipes.override(recipe, [f"--output={args.run}"])
    teachers = [one for one in board.teachers if one.path == recipe.teacher.path]
    if not teachers:
        raise FewstepError(f"--board: {args.board}: has no {recipe.teacher.path}, the teacher of {args.run}")
    session = Session(recipe, *check_data(recipe), start("cpu"), begun=True)
    if not session.trainer.restore():
        raise FewstepError(f"--run: {args.run}: no checkpoint; train it first")
    if session.method.teacher_kind != "diffusion":
        raise FewstepError(f"--run: {args.run}: a student of tokens, between which there is no noise")
    ruler = Ruler(board, teachers[0], args.run / "lost")
    result = {
        "recipe": args.of,
        "options": ", ".join(f"{key} {value}" for key, value in options_of(args.run, args.of).items()),
        "step": session.trainer.progress.iteration,
        "guidance": ruler.teacher.guidance,
        "count": len(ruler.groups),
        "versions": versions(),
        "rows": rows(session, ruler),
    }
    write_json(args.out / "lost.json", result)
    write(told, table(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FewstepError as error:
        sys.exit(tell(error))
