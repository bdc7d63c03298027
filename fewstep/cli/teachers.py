"""Commands of teachers: prepared for a method, converted, sampled for pairs, measured in few steps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..bounds import Count, Count0, Number, Part, Positive, Seed
from ..errors import FewstepError
from ..files import check_place, replacing
from ..runs.library import load_recipe, recipe_files
from .commands import (
    COLUMN,
    DEVICE,
    RECIPE,
    WEIGHTS,
    Commands,
    argument,
    integers,
    number,
    output,
    size,
    weights_of,
)

COMMANDS = Commands()


@COMMANDS.command(
    "prepare",
    "a teacher with a smooth time embedding, which sCM needs",
    argument("teacher", metavar="TEACHER", help="pipeline folder, hub id or builtin: name"),
    output("--out", required=True, help="folder of the prepared pipeline"),
    argument("--images", required=True, help="folder of captioned images, or builtin:emoji"),
    argument("--error", type=number(Positive), default=0.05, help="stop at this relative error, and"),
    argument("--stiffness", type=number(Positive), default=3.0, help="this ratio of |dF/dt| to |J_x v|"),
    argument("--steps", type=number(Count), default=5000, help="at most"),
    argument("--check-every", type=number(Count), default=250, help="steps"),
    argument("--turns", type=number(Positive), default=1.0, help="of the fastest sinusoid that is kept"),
    argument("--qk-norm", action="store_true", help="normalise queries and keys (SANA, SD3)"),
    argument(
        "--pixel-norm", action="store_true", help="normalise what time multiplies activations by (EDM2)"
    ),
    argument("--lr", type=number(Positive), default=2e-5, help="learning rate"),
    argument("--batch-size", type=number(Count), default=16, help="of each process; torchrun starts several"),
    argument("--accumulate", type=number(Count), default=1, help="batches that make an update"),
    argument("--seed", type=number(Seed), default=0, help="of the noise"),
    DEVICE,
    argument("--autocast", choices=["auto", "bfloat16"]),
    argument("--attention", default="auto", choices=["auto", "sdpa", "math", "flash", "efficient", "cudnn"]),
)
def prepare(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from ..data.images import load_images
    from ..process import start
    from ..runs import prepare as preparation
    from ..teachers import load_teacher

    names = [field.name for field in fields(preparation.PrepareConfig)]
    config = preparation.PrepareConfig(**{name: getattr(args, name) for name in names if name in args})
    if args.out.exists():
        raise FewstepError(f"prepare: {args.out} is there already; give another --out")
    images = load_images(args.images)
    process = start(args.device)
    teacher = load_teacher(
        args.teacher, autocast=args.autocast, attention=args.attention, device=process.device
    )
    record = preparation.prepare(teacher, args.out, images, config, process=process)
    if not process.main:
        return 0
    after, before = record["after"], record["before"]
    words = "" if record["reached"] else f"; its bounds were not reached in {config.steps} steps"
    print(
        f"fewstep: {args.out}: error {after['error']:.4f}, stiffness {before['stiffness']:.2f} -> "
        f"{after['stiffness']:.2f}, {after['step']} steps{words}"
    )
    return 0 if record["reached"] else 1


@COMMANDS.command(
    "pairs",
    "noise and samples of a recipe's teacher, for methods that regress on them",
    RECIPE,
    output("--out", record="pairs.json", help="folder; default the recipe's data.pairs"),
    argument("--num", type=number(Count), default=10_000, help="pairs"),
    argument("--solver", help="ddim, euler, dpm++ or unipc; midpoint, heun or euler for tokens"),
    argument("--steps", type=number(Count), help="of the solver; default 50, or 10 for tokens"),
    argument("--seed", type=number(Seed), default=0, help="of the noise"),
    argument("--batch-size", type=number(Count), default=32, help="samples at once"),
    overrides=True,
)
def pairs(args: argparse.Namespace) -> int:
    """Noise and samples of a recipe's teacher, at the recipe's guidance."""
    from ..data.pairs import make_pairs
    from ..data.prompts import load_prompts
    from ..data.texts import column_for
    from ..methods.base import guidance_of
    from ..process import start
    from ..recipe import override
    from ..teachers import load_teacher

    recipe = override(load_recipe(args.recipe), args.overrides)
    folder: Path | None = args.out or (Path(recipe.data.pairs) if recipe.data.pairs else None)
    if folder is None:
        raise FewstepError("pairs: give --out, or a recipe with data.pairs")
    data = recipe.data
    prompts = load_prompts(data.prompts, column=column_for(data.prompts, data.column))
    process = start(recipe.train.device)
    teacher = load_teacher(recipe.teacher.path, **recipe.teacher.options(), device=process.device)
    make_pairs(
        folder,
        teacher,
        prompts,
        num=args.num,
        solver=args.solver,
        steps=args.steps,
        guidance=guidance_of(recipe.method),
        seed=args.seed,
        batch_size=args.batch_size,
        process=process,
    )
    if process.main:
        print(folder)
    return 0


def _entries(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: expected numbers of tokens, such as 0,80")
    return [int(part) for part in parts]


@COMMANDS.command(
    "convert",
    "published weights of EDM or an autoregressive model as a teacher's folder, of a student as an export",
    argument("family", choices=["edm", "edm2", "llamagen", "var"]),
    argument("file", nargs="?", metavar="FILE", help="of edm and edm2: .safetensors, .pt or .pth"),
    argument("--vae", metavar="F", help="of an EDM2 in latents: stabilityai/sd-vae-ft-mse"),
    argument("--transformer", help="of llamagen and var: .safetensors, .pt or .pth"),
    argument("--tokenizer", help="of llamagen and var: .safetensors, .pt or .pth"),
    argument(
        "--tokens",
        type=number(Count),
        help="of an image of LlamaGen: 256 at 256 px, 576 at 384 px, 1024 at 512 px",
    ),
    argument(
        "--text-encoder", metavar="F", help="T5 that a LlamaGen of texts was trained with: google/flan-t5-xl"
    ),
    argument("--top-k", type=number(Count0)),
    argument("--top-p", type=number(Part)),
    argument(
        "--split",
        type=number(Count0),
        help="of a student (VAR-DD, LlamaGen-DD): tokens that its logits decide",
    ),
    argument(
        "--entries", type=_entries, metavar="0,80", help="of a student: tokens at which its steps begin"
    ),
    output("--to", required=True, help="folder"),
)
def convert(args: argparse.Namespace) -> int:
    """Published checkpoints as a pipeline folder that recipes take as their teacher, or as an export."""
    if args.family in ("edm", "edm2"):
        return _convert_edm(args)
    _refuse_options(args, ("file", "vae"))
    for name in ("transformer", "tokenizer"):
        if getattr(args, name) is None:
            raise FewstepError(f"convert {args.family}: give --{name}, a .safetensors, .pt or .pth file")
    from ..export.tokens import export_released
    from ..teachers.pipelines import hushed
    from ..tokens.convert import CHECKPOINTS
    from ..tokens.students import TokenStudent

    of = {"tokens": "LlamaGen", "text_encoder": "LlamaGen"} | dict.fromkeys(("top_k", "top_p"), "a teacher")
    of |= dict.fromkeys(("split", "entries"), "a student")
    options = {name: value for name in of if (value := getattr(args, name)) is not None}

    def refuse(whose: str) -> None:
        for name in (name for name in options if of[name] == whose):
            raise FewstepError(
                f"--{name.replace('_', '-')} {options[name]}: is of {whose}, and {args.transformer} is none; leave it "
                "out"
            )

    if args.family != "llamagen":
        refuse("LlamaGen")
    pipe = CHECKPOINTS[args.family](args.transformer, args.tokenizer, **options)
    student = isinstance(pipe.transformer, TokenStudent)
    refuse("a teacher" if student else "a student")
    with hushed(), replacing(args.to) as part:
        if student:
            export_released(part, pipe, Path(args.transformer).name)
        else:
            pipe.save_pretrained(part)
    print(args.to)
    return 0


def _convert_edm(args: argparse.Namespace) -> int:
    from ..teachers.edm.convert import CHECKPOINTS
    from ..teachers.pipelines import hushed

    _refuse_options(
        args, ("transformer", "tokenizer", "tokens", "text_encoder", "top_k", "top_p", "split", "entries")
    )
    if args.file is None:
        raise FewstepError(f"convert {args.family}: give FILE, its weights as .safetensors, .pt or .pth")
    if args.family == "edm":
        _refuse_options(args, ("vae",))
    options = {"vae": args.vae} if args.family == "edm2" else {}
    pipe = CHECKPOINTS[args.family](args.file, **options)
    with hushed(), replacing(args.to) as part:
        pipe.save_pretrained(part)
    print(args.to)
    return 0


def _refuse_options(args: argparse.Namespace, names: tuple[str, ...]) -> None:
    """Those of other families."""
    for name in names:
        if (value := getattr(args, name)) is not None:
            option = "FILE" if name == "file" else f"--{name.replace('_', '-')}"
            raise FewstepError(f"{option} {value}: is not of {args.family}; leave it out")


# Defaults of a search; what is not here has none.
SEARCH: dict[str, Any] = {
    "prompts": "builtin:emoji",
    "num": 64,
    "reference_steps": 50,
    "dtype": "float32",
    "seed": 0,
    "batch_size": 16,
}


@COMMANDS.command(
    "floor",
    "search a teacher's best schedule of few steps, which a student has to beat",
    argument(
        "teacher",
        help="pipeline folder, hub id or builtin:...; or a recipe, to measure its floors as its evaluation does",
    ),
    *WEIGHTS,
    argument("--steps", type=integers, required=True, metavar="4,8", help="numbers of steps"),
    output("--out", record="floor.json", required=True, help="folder for floor.json and N-steps/"),
    argument(
        "--prompts",
        default=SEARCH["prompts"],
        metavar="F",
        help="one a line, a table, or a built-in name (default: %(default)s)",
    ),
    COLUMN,
    argument("--num", type=number(Count), default=SEARCH["num"], help="reference paths (default: 64)"),
    argument("--guidance", type=number(Number), help="scale (default: the pipeline's)"),
    argument(
        "--reference-steps",
        type=number(Count),
        default=SEARCH["reference_steps"],
        metavar="M",
        help="of a path (default: 50)",
    ),
    argument(
        "--solver",
        choices=["dpm++", "euler", "heun"],
        help="default: the best one; euler for a flow, heun for EDM alone",
    ),
    argument(
        "--families",
        metavar="F,F",
        help="of nodes to choose from: even, searched, ays, karras, power, stopped (default: all)",
    ),
    argument("--free-u", action="store_true", help="try Free-U too, which UNets have"),
    argument(
        "--size", type=size, metavar="PIXELS", help="of a square, or HEIGHTxWIDTH (default: the pipeline's)"
    ),
    argument("--dtype", choices=["float32", "bfloat16"], default=SEARCH["dtype"]),
    DEVICE,
    argument("--seed", type=number(Seed), default=SEARCH["seed"], help="of the noise"),
    argument("--batch-size", type=number(Count), default=SEARCH["batch_size"], help="paths at once"),
    overrides=True,
)
def floor(args: argparse.Namespace) -> int:
    """What a teacher does in few steps without training, with the best schedule."""
    if args.teacher in recipe_files() or Path(args.teacher).suffix in (".py", ".yaml", ".yml"):
        return _measured_floor(args)
    if args.overrides:
        words = " ".join(args.overrides)
        raise FewstepError(f"floor: {words}: options of a recipe, but {args.teacher} is a teacher")
    return _searched_floor(args)


def _searched_floor(args: argparse.Namespace) -> int:
    from ..data.prompts import load_prompts
    from ..evaluation.floor import FAMILIES, calibrate
    from ..evaluation.statistics import table
    from ..evaluation.stock import write_floor
    from ..teachers import load_teacher
    from ..teachers.pipelines import own_guidance

    prompts = load_prompts(args.prompts, "--prompts", args.column)
    options = {"dtype": args.dtype, "resolution": args.size, "device": args.device}
    teacher = load_teacher(args.teacher, **options, **weights_of(args))
    record = calibrate(
        teacher,
        prompts,
        args.steps,
        guidance=own_guidance(teacher.pipe) if args.guidance is None else args.guidance,
        num=args.num,
        reference_steps=args.reference_steps,
        solver=args.solver,
        families=args.families.split(",") if args.families else FAMILIES,
        freed=args.free_u,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    record |= {**teacher.origin.record(), "prompts": args.prompts}
    write_floor(args.out, teacher.pipe.scheduler, record)
    found = record["schedules"].items()
    names = list(dict.fromkeys(name for _, entry in found for name in entry["error"]))
    rows = [
        (
            n,
            *(f"{entry['error'][name]:.4f}" if name in entry["error"] else "" for name in names),
            _chosen(entry),
        )
        for n, entry in found
    ]
    print("Root mean square distance to the reference's samples of the same noise, on paths held out:\n")
    print(table(("steps", *names, "chosen"), rows))
    print(args.out)
    return 0


def _chosen(entry: dict[str, Any]) -> str:
    """A walk in words: power, order 1: 999, 772.5, 556.7, 354.2, 170"""
    free = ", Free-U" if "free_u" in entry else ""
    times = ", ".join(f"{time:.4g}" for time in entry["times"])
    stop = f", stop at {entry['stop']:.4g}" if "stop" in entry else ""
    jumps = "Heun" if "heun" in entry else f"order {entry['order']}"
    return f"{entry['family']}{free}, {jumps}: {times}{stop}"


# Options of a search -> the field of a recipe that says the same of its evaluation.
OF_A_RECIPE = {
    "variant": "teacher.variant",
    "config": "teacher.config",
    "base_lora": "teacher.loras",
    "prompts": "evaluation.prompts",
    "column": "data.column",
    "num": "evaluation.num",
    "guidance": "evaluation.teacher_guidance",
    "reference_steps": "evaluation.teacher_steps",
    "solver": "evaluation.floor_solvers",
    "families": "evaluation.floor_solvers",
    "free_u": "evaluation.floor_solvers",
    "size": "teacher.resolution",
    "dtype": "teacher.dtype",
    "seed": "evaluation.seed",
    "batch_size": "evaluation.batch_size",
}


def _measured_floor(args: argparse.Namespace) -> int:
    """The rows of a recipe's evaluation that need no student: what it will have to beat."""
    from ..evaluation.of_run import evaluate_run
    from ..recipe import override
    from ..runs.checks import check_data
    from ..runs.shapes import check_shapes
    from ..teachers import load_teacher

    for name, field in OF_A_RECIPE.items():
        if getattr(args, name) not in (SEARCH.get(name), False, []):
            option = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise FewstepError(f"{option}: {args.teacher} is a recipe, whose {field} counts; give --{field}")
    words = [*args.overrides, "--evaluation.floor_steps", str(args.steps)]
    recipe = override(load_recipe(args.teacher), words)
    if not recipe.evaluation.num:
        raise FewstepError("floor: this recipe has evaluation.num 0: give --evaluation.num 500")
    check_place(args.out, True, option="--out")
    prompts, images = check_data(recipe)
    teacher = load_teacher(recipe.teacher.path, **recipe.teacher.options(), device=args.device)
    check_shapes(recipe, teacher)
    evaluate_run(recipe, args.out, teacher, prompts, images)
    print(args.out / "eval" / "table.json")
    return 0
