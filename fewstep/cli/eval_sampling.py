"""The subcommands `fewstep eval generate` and `fewstep eval run`."""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.bounds import Count, Count0, Number, Seed
from fewstep.cli.commands import (
    COLUMN,
    WEIGHTS,
    Commands,
    argument,
    integers,
    number,
    output,
    sizes,
    weights_of,
)
from fewstep.files import SHARED

SAMPLING = Commands()

SOLVERS = "own, lcm, ddim, euler, heun, dpm++, unipc, ays, or a folder of `fewstep floor`"
DEVICE = argument("--device", help="auto (default), cpu, cuda, cuda:1, ...; one per process")
PROTOCOL = argument("--protocol", metavar="NAME", help="see `fewstep eval protocols`")
# Which weights, and where.
MODEL = (
    argument("--lora", metavar="EXPORT", help="export of a fewstep run, or a LoRA file"),
    argument("--network", metavar="FILE", help="state dict in place of the denoiser's own"),
    argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32"),
    DEVICE,
)
# Which images.
IMAGES = (
    argument("--prompts", type=Path, required=True, metavar="FILE", help="one a line, or a table"),
    COLUMN,
    argument("--num", type=number(Count), metavar="N", help="images in all (default: all prompts)"),
    argument("--per-prompt", type=number(Count), default=1, metavar="K", help="images of each prompt"),
    argument("--seed", type=number(Seed), default=0, help="sample i uses SEED + i"),
    argument(
        "--size",
        type=sizes,
        metavar="PIXELS",
        help="of a square, or HEIGHTxWIDTH; several in turn of the prompts as SIZE:SHARE,SIZE:SHARE (default: the "
        "student's, or the pipeline's)",
    ),
    argument("--rounding", default="nearest", help="to uint8: nearest or truncate"),
    argument("--batch-size", type=number(Count), default=8, metavar="B", help="images at once"),
    argument(
        "--speed-runs",
        type=number(Count0),
        default=5,
        metavar="R",
        help="images timed at batch 1; 0 times them as they are made",
    ),
)


DEFAULT_STEPS = (1, 2, 4, 8)
# What a file says in place of these options of `run`.
ROWS = (
    "teacher",
    "variant",
    "config",
    "base_lora",
    "student",
    "steps",
    "solver",
    "guidance",
    "prompts",
    "num",
    "real",
    "protocol",
    "extractor",
    "scorer",
)


def process() -> tuple[int, int]:
    """Rank and number of processes, as torchrun and `accelerate launch` set them.

    Raises:
        FewstepError: variables that are no such pair.
    """
    from fewstep.errors import FewstepError

    words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (words[0].isdecimal() and words[1].isdecimal() and int(words[0]) < int(words[1])):
        raise FewstepError(f"RANK={words[0]} WORLD_SIZE={words[1]}: expected numbers with RANK < WORLD_SIZE")
    return int(words[0]), int(words[1])


def job_of(args: argparse.Namespace, steps: int, **others: Any) -> Any:
    """The `Job` of the options."""
    from fewstep.evaluation.sampling import Job

    shared = {name: getattr(args, name) for name in ("seed", "per_prompt", "rounding")}
    return Job(steps=steps, **_sized(args), **shared, **others)


def _sized(args: argparse.Namespace) -> dict[str, Any]:
    """One size or a mixture: what was asked for, or else the shapes that a student was trained in."""
    from fewstep.evaluation.mixture import Mixture
    from fewstep.evaluation.models import record_of

    if isinstance(args.size, dict):
        return {"mixture": Mixture.of(**args.size)}
    if args.size is None and (mixture := Mixture.recorded(record_of(args.lora or args.pipeline))):
        return {"mixture": mixture}
    return {"size": args.size}


@SAMPLING.command(
    "generate",
    "images of a pipeline or student, resumable and sharded by rank",
    argument("pipeline", metavar="PIPELINE", help="folder or hub id of a diffusers pipeline, or builtin:..."),
    argument("--steps", type=integers, required=True, metavar="1,2,4", help="numbers of steps"),
    argument("--solver", default="own", help=f"{SOLVERS} (default: own, or the student's)"),
    argument("--guidance", type=number(Number), help="scale (default: the student's or the pipeline's)"),
    argument(
        "--timesteps",
        type=integers,
        metavar="399",
        help="times of the network's calls, for one number of steps",
    ),
    argument("--layout", default="flat", help="flat or geneval (00000/samples/0000.png)"),
    output("--out", record=SHARED, required=True, metavar="DIR", help="gets DIR/4-steps/000000.png"),
    *WEIGHTS,
    *MODEL,
    *IMAGES,
)
def _generate(args: argparse.Namespace) -> int:
    from fewstep.data.image_sets import MANIFEST
    from fewstep.errors import FewstepError
    from fewstep.evaluation.models import open_model
    from fewstep.evaluation.prompts import read_prompts
    from fewstep.evaluation.sampling import check_batches, check_num, read_manifest, sample_folder
    from fewstep.files import check_place
    from fewstep.teachers.origin import Origin

    own = {"solver": args.solver, "guidance": args.guidance, "layout": args.layout}
    own["timesteps"] = tuple(args.timesteps) if args.timesteps else None
    jobs = [job_of(args, steps, **own) for steps in args.steps]
    prompts = read_prompts(args.prompts, args.column)
    num = check_num(args.num, prompts, args.per_prompt)
    check_batches(args.batch_size, args.speed_runs)
    rank, world = process()
    if args.out.is_dir() and any(args.out.glob("[!.]*")) and not any(args.out.glob(f"*/{MANIFEST}")):
        raise FewstepError(f"--out {args.out} is not empty and holds no generated images; give another place")
    folders = [args.out / f"{job.steps}-{'step' if job.steps == 1 else 'steps'}" for job in jobs]
    for folder in folders:
        check_place(folder, True, MANIFEST, "--out")
        read_manifest(folder)
    base = Origin.of(args.pipeline, **weights_of(args))
    model = open_model(base, args.lora, args.network, args.dtype, args.device, jobs[0].size)
    for job, folder in zip(jobs, folders):
        manifest = sample_folder(
            model,
            prompts,
            job,
            folder,
            num=num,
            batch_size=args.batch_size,
            rank=rank,
            world=world,
            speed_runs=args.speed_runs,
        )
        print(folder if rank == 0 else f"{folder} (process {rank})", _speed(manifest.get("speed")))
    return 0


@SAMPLING.command(
    "run",
    "teacher and students over steps and solvers: one table, one page",
    argument("spec", metavar="SPEC.yaml", nargs="?", help="see eval/README.md; or else these options:"),
    argument("--teacher", metavar="PIPELINE", help="pipeline of the first rows, and under the students"),
    *WEIGHTS,
    argument("--student", action="append", default=[], metavar="EXPORT", help="may be repeated"),
    argument(
        "--steps",
        type=integers,
        metavar="1,2,4",
        help="numbers (default: 1,2,4,8; of a student those it was trained for)",
    ),
    argument("--solver", action="append", metavar="S", help="of the teacher; may be repeated"),
    argument(
        "--guidance",
        action="append",
        type=number(Number),
        metavar="G",
        help="of the teacher; may be repeated",
    ),
    argument("--prompts", metavar="FILE", help="one a line, or a table"),
    COLUMN,
    argument("--num", type=number(Count), metavar="N", help="images of each row"),
    argument("--real", metavar="IMAGES", help="folder, npz, statistics, builtin:emoji or builtin:emoji-32"),
    PROTOCOL,
    argument("--extractor", metavar="NAME", help="network for the features"),
    argument("--scorer", action="append", default=[], metavar="KIND:PATH", help="of images and captions"),
    output("--out", record=SHARED, required=True, metavar="DIR", help="gets index.html and table.md"),
    DEVICE,
)
def _run(args: argparse.Namespace) -> int:
    from fewstep.evaluation.of_spec import run_spec, to_markdown
    from fewstep.evaluation.spec import load_spec

    if args.spec and (given := [name for name in ROWS if getattr(args, name) not in (None, [])]):
        from fewstep.errors import FewstepError

        raise FewstepError(
            f"--{given[0].replace('_', '-')} beside {args.spec}, which says it itself: change the file, or leave it out"
        )
    spec = load_spec(args.spec) if args.spec else _spec_of(args)
    rank, world = process()
    _check_table(spec, args.out)
    whole = run_spec(spec, args.out, device=args.device, rank=rank, world=world)
    if whole:
        print(to_markdown(whole) + f"\n{args.out / 'index.html'}")
    return 0


def _check_table(spec: Any, out: Path) -> None:
    """Refuses a folder whose files have the names of a table's and are none, and images that do not fit the prompts."""
    from fewstep.data.image_sets import MANIFEST
    from fewstep.errors import FewstepError
    from fewstep.evaluation.compare import load_result
    from fewstep.evaluation.images import FirstImages, open_images
    from fewstep.evaluation.of_spec import rows_of
    from fewstep.evaluation.prompts import read_prompts
    from fewstep.evaluation.sampling import check_pairs, read_manifest
    from fewstep.files import check_place, read_text

    there = sorted(path.name for path in out.glob("[!.]*")) if out.is_dir() else []
    if there and '"rows"' not in read_text(out / "table.json"):
        raise FewstepError(
            f"--out {out} holds {there[0]}, and no table of `fewstep eval run`; give another place"
        )
    for entry in spec.models:
        if entry.images:
            images = open_images(entry.images)
            images = FirstImages(images, spec.num) if spec.num else images
            check_pairs(images, len(read_prompts(spec.prompts).texts), spec.per_prompt)
    for row in rows_of(spec):
        check_place(out / "samples" / row.folder, True, MANIFEST, "--out")
        read_manifest(out / "samples" / row.folder)
        if (file := out / "results" / f"{row.folder}.json").exists():
            load_result(file)


def _spec_of(args: argparse.Namespace) -> Any:
    """The `Spec` of the options: the teacher's rows, then each student's."""
    from fewstep.errors import FewstepError
    from fewstep.evaluation.spec import Entry, Spec

    if not (args.teacher and args.prompts):
        raise FewstepError("eval run: give a SPEC.yaml, or --teacher and --prompts")
    solver, guidance = tuple(args.solver or ("own",)), tuple(args.guidance or (None,))
    steps = tuple(args.steps or DEFAULT_STEPS)
    of_teacher = partial(Entry, pipeline=args.teacher, steps=steps, **weights_of(args))
    teacher = of_teacher(name="teacher", kind="teacher", solver=solver, guidance=guidance)
    students = [
        of_teacher(name=f"student {path}", lora=path, kind="student", steps=steps_of(path, args.steps))
        for path in args.student
    ]
    return Spec(
        args.prompts,
        (teacher, *students),
        column=args.column,
        num=args.num,
        real=args.real,
        protocol=args.protocol,
        extractor=args.extractor,
        scorers=tuple(args.scorer),
    )


def steps_of(student: str, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Numbers of steps at which a student is measured: those asked for, or else those that it was trained for."""
    from fewstep.evaluation.models import record_of

    record = record_of(student)
    trained = tuple(map(int, record.get("steps", ()))) or (record.get("num_steps"),) if record else ()
    return tuple(asked or ()) or tuple(n for n in trained if n) or DEFAULT_STEPS


def _speed(speed: dict[str, Any] | None) -> str:
    if not speed:
        return ""
    error = "" if speed["seconds_error"] is None else f" ± {speed['seconds_error']:.1g}"
    return (
        f"{speed['nfe']:g} network evaluations, {speed['seconds']:.3g}{error} s an image at batch {speed['batch']} on "
        f"{speed['device']}, peak {speed['peak_memory_mb']:.0f} MiB ({speed['peak_memory_kind']})"
    )
