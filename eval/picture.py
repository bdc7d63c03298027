"""Images of a teacher and its students, a row for each, of the same prompts and the same noise.

    python eval/picture.py --student runs/emoji_dmd2_4step --student runs/emoji_dmd2_1step --out students.png

How often the network is called for an image is counted while they are drawn.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from fewstep.errors import FewstepError, tell
from fewstep.evaluation.models import Model, open_model
from fewstep.evaluation.sampling import Job, draw
from fewstep.evaluation.speed import Stopwatch
from fewstep.files import check_place, replacing
from fewstep.report.grid import image_grid
from fewstep.report.rows import steps_of

PROMPTS = (
    "red apple",
    "owl",
    "sailboat",
    "hamburger",
    "tulip",
    "rainbow",
    "guitar",
    "cactus",
    "rocket",
    "snail",
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", action="append", required=True, help="export or run; may be repeated")
    parser.add_argument(
        "--teacher", default="builtin:emoji-xl", help="of the first row, and under the students"
    )
    parser.add_argument("--teacher-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0, help="of the teacher")
    parser.add_argument("--prompt", action="append", help="may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--scale", type=int, default=2, help="integer enlargement")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    prompts = options.prompt or list(PROMPTS)
    try:
        check_place(options.out, folder=False, option="--out")
        first = Job(options.teacher_steps, guidance=options.guidance, seed=options.seed)
        rows = [_row("teacher", open_model(options.teacher), first, prompts)]
        for export in options.student:
            model = open_model(options.teacher, export)
            rows.append(_row("student", model, Job(model.record["num_steps"], seed=options.seed), prompts))
        names, images = zip(*rows)
        sheet = image_grid(
            np.concatenate(images),
            len(prompts),
            labels=[""] * len(prompts) * (len(rows) - 1) + prompts,
            row_labels=names,
            scale=options.scale,
        )
        with replacing(options.out) as part:
            sheet.save(part, format="PNG", optimize=True)
    except FewstepError as error:
        return tell(error)
    print(options.out)
    return 0


def _row(name: str, model: Model, job: Job, prompts: list[str]) -> tuple[str, np.ndarray]:
    watch = Stopwatch(model.network)
    call = model.prepare(job.steps, job.solver, job.guidance)
    with watch.drawing(len(prompts)):
        images = draw(model, prompts, list(range(len(prompts))), job, call)
    calls = watch.read()["nfe"]
    return f"{name}, {steps_of(job.steps)}: {calls:g} network call{'s' * (calls != 1)}", images


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
