"""The command line. Heavy imports wait until a command runs, so ``fewstep --help`` is quick."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..errors import FewstepError, TrainingError, tell
from ..files import replacing, write, write_json
from ..runs.library import load_recipe, recipe_files


# ---------------------------------------------------------------------------------------------------------- commands
def _train(args, rest) -> int:
    from ..runs.session import run

    run(load_recipe(args.recipe), rest)
    return 0


def _resume(args, rest) -> int:
    from ..runs.session import resume

    resume(args.run_folder, rest)
    return 0


def _replay(args, _rest) -> int:
    from ..runs.session import replay

    return TrainingError.code if replay(args.run_folder) else 0


def _sample(args, _rest) -> int:
    from functools import partial

    from ..export import at_steps, load_exported, stock_call
    from ..report.grid import image_grid
    from ..teachers.generate import generate

    if not args.prompt:
        raise FewstepError("sample: give at least one --prompt")
    folder = args.export / "export" if (args.export / "export").is_dir() else args.export
    pipe, record = load_exported(folder, args.teacher)
    record = at_steps(record, args.steps)
    pipe.to(args.device)
    images, _ = generate(pipe, args.prompt * args.num, partial(stock_call, pipe, record), seed=args.seed)
    with replacing(args.out) as part:
        image_grid(images, min(8, len(images)), scale=args.scale).save(part)
    print(args.out)
    return 0


def _pairs(args, rest) -> int:
    """Noise and samples of a recipe's teacher, at the recipe's guidance."""
    from .. import recipe as recipes
    from ..data.pairs import make_pairs
    from ..data.prompts import load_prompts
    from ..process import start
    from ..teachers import load_teacher

    recipe = recipes.override(load_recipe(args.recipe), rest)
    folder: Path | None = args.out or (Path(recipe.data.pairs) if recipe.data.pairs else None)
    if folder is None:
        raise FewstepError("pairs: give --out, or a recipe with data.pairs")
    prompts, process = load_prompts(recipe.data.prompts), start(recipe.train.device)
    teacher = load_teacher(recipe.teacher.path, **recipe.teacher.options(), device=process.device)
    make_pairs(
        folder,
        teacher,
        prompts,
        num=args.num,
        solver=args.solver,
        steps=args.steps,
        guidance=getattr(recipe.method, "guidance_scale", 1.0),
        seed=args.seed,
        batch_size=args.batch_size,
        process=process,
    )
    if process.main:
        print(folder)
    return 0


def _convert(args, _rest) -> int:
    """Published checkpoints as a pipeline folder that recipes take as their teacher."""
    from ..teachers.pipelines import hushed
    from ..tokens.convert import CHECKPOINTS

    options = {name: value for name in ("top_k", "top_p") if (value := getattr(args, name)) is not None}
    if args.tokens and args.family == "llamagen":
        options["tokens"] = args.tokens
    pipe = CHECKPOINTS[args.family](args.transformer, args.tokenizer, **options)
    with hushed():
        pipe.save_pretrained(args.to)
    print(args.to)
    return 0


def _floor(args, rest) -> int:
    """What a teacher does in few steps without training, with the best schedule."""
    import inspect

    if args.teacher in recipe_files() or Path(args.teacher).suffix in (".py", ".yaml", ".yml"):
        return _measured_floor(args, rest)
    if rest:
        raise FewstepError(f"floor: {' '.join(rest)}: options of a recipe, but {args.teacher} is a teacher")

    from ..data.prompts import load_prompts
    from ..evaluation.floor import calibrate, write_floor
    from ..evaluation.statistics import table
    from ..teachers import load_teacher

    prompts = load_prompts(args.prompts, "--prompts")
    options = {"dtype": args.dtype, "resolution": args.size, "device": args.device}
    teacher = load_teacher(args.teacher, **options)
    own = inspect.signature(teacher.pipe.__call__).parameters["guidance_scale"].default
    record = calibrate(
        teacher,
        prompts,
        args.steps,
        guidance=own if args.guidance is None else args.guidance,
        num=args.num,
        reference_steps=args.reference_steps,
        solver=args.solver,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    write_floor(args.out, teacher.pipe.scheduler, {**record, "prompts": args.prompts})
    found = record["schedules"].items()
    names = list(dict.fromkeys(name for _, entry in found for name in entry["error"]))
    rows = [
        (n, *(f"{entry['error'][name]:.4f}" for name in names), entry.get("timesteps") or entry["sigmas"])
        for n, entry in found
    ]
    print("Root mean square distance to the reference's samples of the same noise, on paths not searched:\n")
    print(table(("steps", *names, "searched nodes"), rows))
    print(args.out)
    return 0


def _measured_floor(args, rest) -> int:
    """The rows of a recipe's evaluation that need no student: what it will have to beat."""
    from .. import recipe as recipes
    from ..evaluation.of_run import evaluate_run
    from ..runs.checks import check_data
    from ..teachers import load_teacher

    recipe = recipes.override(load_recipe(args.teacher), [*rest, "--evaluation.floor_steps", str(args.steps)])
    if not recipe.evaluation.num:
        raise FewstepError("floor: this recipe has evaluation.num 0: give --evaluation.num 500")
    if args.out.exists() and any(args.out.iterdir()):
        raise FewstepError(f"--out {args.out} is not empty: give another folder")
    prompts, images = check_data(recipe)
    teacher = load_teacher(recipe.teacher.path, **recipe.teacher.options(), device=args.device)
    evaluate_run(recipe, args.out, teacher, prompts, images)
    print(args.out / "eval.json")
    return 0


def _prepare(args, _rest) -> int:
    """A teacher whose time embedding is smooth, for sCM and SANA-Sprint."""
    from ..data.images import load_images
    from ..runs.prepare import PrepareConfig, prepare
    from ..teachers import load_teacher

    names = ("error", "stiffness", "steps", "check_every", "turns", "qk_norm", "lr", "batch_size", "seed")
    config = PrepareConfig(**{name: getattr(args, name) for name in names})
    if args.out.exists():
        raise FewstepError(f"prepare: {args.out} is there already; give another --out")
    images = load_images(args.images)
    options = {"autocast": args.autocast, "attention": args.attention, "device": args.device}
    teacher = load_teacher(args.teacher, **options)
    record = prepare(teacher, args.out, images, config)
    after, before = record["after"], record["before"]
    words = "" if record["reached"] else f"; its bounds were not reached in {config.steps} steps"
    print(
        f"fewstep: {args.out}: error {after['error']:.4f}, stiffness {before['stiffness']:.2f} -> "
        f"{after['stiffness']:.2f}, {after['step']} steps{words}"
    )
    return 0 if record["reached"] else 1


def _export(args, _rest) -> int:
    """Exports a checkpoint of a run again, e.g. in another dtype or with Kohya keys."""
    from ..runs.session import reexport

    rest = [word for name, value in (("dtype", args.dtype), ("kohya", args.kohya)) if value
            for word in (f"--export.{name}", str(value).lower())]  # fmt: skip
    reexport(args.run_folder, rest, args.step)
    return 0


def _recipes(args, _rest) -> int:
    if args.action == "copy":
        source = recipe_files().get(args.name or "")
        if source is None:
            raise FewstepError(f"recipes copy: {args.name!r} is none of {', '.join(recipe_files())}")
        target = Path(args.to) / source.name if Path(args.to).is_dir() else Path(args.to)
        if target.exists():
            raise FewstepError(f"recipes copy: {target} exists already; give another place")
        write(target, source.read_bytes())
        print(target)
        return 0
    for name, path in recipe_files().items():
        first = next((line for line in path.read_text().splitlines() if line.startswith('"""')), "").strip(
            '"'
        )
        print(f"{name:24} {first}")
    return 0


def _methods(_args, _rest) -> int:
    from ..methods import METHODS

    for name, cls in sorted(METHODS.items()):
        print(f"{name:12} {cls.summary}")
    return 0


def _doctor(_args, _rest) -> int:
    from .doctor import report

    text, healthy = report()
    print(text)
    return 0 if healthy else 1


def _bench(args, rest) -> int:
    from ..cost.bench import bench

    measured = bench(load_recipe(args.recipe), rest, args.iterations, args.baseline, args.random_weights)
    if args.out:
        write_json(args.out, {"recipe": args.recipe, "arguments": rest, **measured})
    print(json.dumps(measured, indent=1))
    return 0


def _step(text: str) -> str:
    if text not in ("newest", "best") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected newest, best, or the number of a step")
    return text


def _cache(args, rest) -> int:
    from .. import recipe as recipes
    from ..runs.session import cache

    for name, store in cache(recipes.override(load_recipe(args.recipe), rest)).items():
        size = sum(path.stat().st_size for path in store.folder.iterdir())
        print(f"{name:16} {len(store):9} rows {size / 1e6:10.1f} MB  {store.folder}")
    return 0


def _plan(args, rest) -> int:
    from .. import recipe as recipes
    from ..cost import GPUS, check_fits, plan

    if args.gpu not in GPUS:
        raise FewstepError(f"--gpu {args.gpu}: expected one of {', '.join(GPUS)}")
    if args.processes < 1:
        raise FewstepError(f"--processes {args.processes}: expected at least 1")
    made = plan(recipes.override(load_recipe(args.recipe), rest), args.processes, quiet=False)
    print(json.dumps(made.to_dict(args.gpu), indent=1) if args.json else made.text(args.gpu))
    check_fits(made, args.gpu)
    return 0


def parser() -> argparse.ArgumentParser:
    from ..version import __version__
    from .eval import add_parser as add_eval
    from .eval_sampling import integers

    main = argparse.ArgumentParser(
        prog="fewstep",
        description="Distill diffusion image models into 1 to 8 steps.",
        epilog="Exit codes: 0 done; 2 bad input; 3 the numbers went wrong; 4 a file cannot be read or written; "
        "5 another process was lost; 130, 138, 143 stopped by SIGINT, SIGUSR1, SIGTERM, with everything saved. Slurm: "
        "#SBATCH --signal=USR1@120 and srun fewstep ..., or B:USR1@120 and exec fewstep ...; under torchrun also "
        "--signals-to-handle SIGTERM,SIGINT,SIGUSR1.",
    )
    main.add_argument("--version", action="version", version=__version__)
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(function=function)
        return sub

    train = command(
        "train", _train, "run a recipe: name, script or recipe.yaml; --a.b VALUE overrides, --smoke tries"
    )
    train.add_argument("recipe")
    resume = command("resume", _resume, "continue an interrupted run, exactly; --a.b VALUE changes it")
    resume.add_argument("run_folder", type=Path, metavar="RUN")
    replay = command("replay", _replay, "repeat the step at which a run gave up, from its snapshot")
    replay.add_argument("run_folder", type=Path, metavar="RUN")
    sample = command("sample", _sample, "images from an exported student, by stock diffusers")
    sample.add_argument("export", type=Path, metavar="EXPORT", help="export folder, or the run that holds it")
    sample.add_argument("--prompt", action="append", help="may be given several times")
    sample.add_argument("--teacher", help="the teacher's folder, if it moved")
    sample.add_argument("--steps", type=int)
    sample.add_argument("--num", type=int, default=1, help="images per prompt")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--scale", type=int, default=1, help="integer enlargement")
    sample.add_argument("--device", help="auto (default), cpu, cuda, cuda:1, ...")
    sample.add_argument("--out", type=Path, default=Path("sample.png"))
    prepare = command("prepare", _prepare, "a teacher with a smooth time embedding, which sCM needs")
    prepare.add_argument("teacher", metavar="TEACHER", help="pipeline folder, hub id or builtin: name")
    prepare.add_argument("--out", type=Path, required=True, help="folder of the prepared pipeline")
    prepare.add_argument("--images", required=True, help="folder of captioned images, or builtin:emoji")
    prepare.add_argument("--error", type=float, default=0.05, help="stop at this relative error, and")
    prepare.add_argument("--stiffness", type=float, default=3.0, help="this ratio of |dF/dt| to |J_x v|")
    prepare.add_argument("--steps", type=int, default=5000, help="at most")
    prepare.add_argument("--check-every", type=int, default=250)
    prepare.add_argument("--turns", type=float, default=1.0, help="of the fastest sinusoid that is kept")
    prepare.add_argument("--qk-norm", action="store_true", help="normalise queries and keys (SANA, SD3)")
    prepare.add_argument("--lr", type=float, default=2e-5)
    prepare.add_argument("--batch-size", type=int, default=16)
    prepare.add_argument("--seed", type=int, default=0)
    prepare.add_argument("--device", help="auto (default), cpu, cuda, cuda:1, ...")
    prepare.add_argument("--autocast", choices=["auto", "bfloat16"])
    prepare.add_argument(
        "--attention", default="auto", choices=["auto", "sdpa", "math", "flash", "efficient", "cudnn"]
    )
    export = command("export", _export, "export a checkpoint of a run again")
    export.add_argument("run_folder", type=Path, metavar="RUN")
    export.add_argument("--step", default="newest", type=_step, help="newest (default), best, or a step")
    export.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    export.add_argument("--kohya", action="store_true", help="also keys for ComfyUI and A1111")
    pairs = command(
        "pairs", _pairs, "noise and samples of a recipe's teacher, for methods that regress on them"
    )
    pairs.add_argument("recipe")
    pairs.add_argument("--out", type=Path, help="folder; default the recipe's data.pairs")
    pairs.add_argument("--num", type=int, default=10_000)
    pairs.add_argument("--solver", help="ddim, euler, dpm++ or unipc; midpoint, heun or euler for tokens")
    pairs.add_argument("--steps", type=int, help="of the solver; default 50, or 10 for tokens")
    pairs.add_argument("--seed", type=int, default=0)
    pairs.add_argument("--batch-size", type=int, default=32)
    convert = command(
        "convert", _convert, "published weights of an autoregressive model as a teacher's folder"
    )
    convert.add_argument("family", choices=["llamagen", "var"])
    convert.add_argument("--transformer", required=True, help=".safetensors, .pt or .pth")
    convert.add_argument("--tokenizer", required=True, help=".safetensors, .pt or .pth")
    convert.add_argument("--tokens", type=int, help="of an image of LlamaGen: 256 at 256 px, 576 at 384 px")
    convert.add_argument("--top-k", type=int)
    convert.add_argument("--top-p", type=float)
    convert.add_argument("--to", type=Path, required=True, help="folder")
    floor = command(
        "floor", _floor, "search a teacher's best schedule of few steps, which a student has to beat"
    )
    floor.add_argument(
        "teacher",
        help="pipeline folder, hub id or builtin:...; or a recipe, to measure its floors as its evaluation does",
    )
    floor.add_argument("--steps", type=integers, required=True, metavar="4,8")
    floor.add_argument("--out", type=Path, required=True, help="folder for floor.json and scheduler/")
    floor.add_argument(
        "--prompts",
        default="builtin:emoji",
        metavar="F",
        help="one a line, or a built-in name (default: %(default)s)",
    )
    floor.add_argument("--num", type=int, default=64, help="reference paths (default: 64)")
    floor.add_argument("--guidance", type=float, help="scale (default: the pipeline's)")
    floor.add_argument("--reference-steps", type=int, default=50, metavar="M", help="of a path (default: 50)")
    floor.add_argument("--solver", choices=["dpm++", "euler"], help="default: dpm++, or euler for a flow")
    floor.add_argument(
        "--size", type=int, metavar="PIXELS", help="height and width (default: the pipeline's)"
    )
    floor.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    floor.add_argument("--device", help="auto (default), cpu, cuda, cuda:1, ...")
    floor.add_argument("--seed", type=int, default=0)
    floor.add_argument("--batch-size", type=int, default=16)
    add_eval(commands)
    recipes = command("recipes", _recipes, "list the recipes, or copy one to change it")
    recipes.add_argument("action", nargs="?", choices=["list", "copy"], default="list")
    recipes.add_argument("name", nargs="?")
    recipes.add_argument("to", nargs="?", default=".")
    command("methods", _methods, "list the methods")
    command(
        "cache", _cache, "encode a recipe's prompts and images ahead of its runs; goes on where it stopped"
    ).add_argument("recipe")
    bench = command("bench", _bench, "what a step takes: seconds, memory, arithmetic, and where they go")
    bench.add_argument("recipe")
    bench.add_argument("--iterations", type=int, default=30)
    bench.add_argument("--baseline", choices=["bare"], help="time a loop of the same network calls beside it")
    bench.add_argument(
        "--random-weights", action="store_true", help="random weights of the teacher's shape, noise for data"
    )
    bench.add_argument("--out", type=Path, help="also write the result there, as JSON")
    plan = command(
        "plan", _plan, "memory, arithmetic and hours of a recipe, counted before anything is loaded"
    )
    plan.add_argument("recipe")
    plan.add_argument("--gpu", default="h100-80gb", help="card, e.g. h100-80gb, a100-40gb, rtx4090-24gb")
    plan.add_argument("--processes", type=int, default=1, help="cards, each with a process of its own")
    plan.add_argument("--json", action="store_true")
    command("doctor", _doctor, "versions, devices, extras, known bad pairs")
    return main


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done; what else there is, :func:`fewstep.errors.tell` says."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args, rest = parser().parse_known_args(words)
    if rest and args.command not in ("train", "resume", "bench", "pairs", "floor", "plan", "cache"):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if "device" in args:
            from ..device import choose

            args.device = str(choose(args.device, "--device"))
        return args.function(args, rest) if hasattr(args, "function") else args.run(args)
    except BaseException as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
