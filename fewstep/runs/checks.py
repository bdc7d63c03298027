"""What a recipe asks for, checked before anything expensive starts: every refusal names the field and the remedy."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.image_sets import split, walk
from ..data.images import CaptionedImages, load_images, tables
from ..data.pairs import load_pairs
from ..data.places import PLACE
from ..data.prompts import load_prompts, shown_prompts
from ..data.texts import column_for, has_columns
from ..diffusion.frozen import check_quantization
from ..errors import FewstepError, RecipeError
from ..files import Need, check_room, check_writable, contents
from ..methods.base import Method, Progress
from ..recipe import Recipe
from ..teachers import adapters, pipeline_class_of
from ..teachers.base import Teacher
from ..teachers.load import check_origin
from ..teachers.origin import Origin
from ..teachers.references import check_references
from ..training.roles import Role
from .library import recipe_files
from .shapes import check_method
from .trackers import check_trackers


def check_output(folder: Path) -> None:
    if folder.is_dir() and contents(folder):
        if (folder / "recipe.yaml").exists():
            raise RecipeError(
                f"output: {folder} holds a run already; continue it with `fewstep resume {folder}`, or give another "
                "--output"
            )
        raise RecipeError(f"output: {folder} is not empty and holds no run; give another --output")
    check_writable(folder, "output:")


def check_space(folder: Path, roles: dict[str, Role], recipe: Recipe, stores: Sequence[Need] = ()) -> None:
    """Weights, two moments and an average per checkpoint, one more while it is written, and the export.

    Args:
        stores: what will be encoded, see :func:`fewstep.runs.disk.to_encode`.
    """
    trained = sum(w.numel() for role in roles.values() for w in role.weights.values())
    kept = Need(
        f"{recipe.train.keep} checkpoints and the export",
        "output",
        folder,
        4 * trained * 4 * (recipe.train.keep + 1) + (64 << 20),
    )
    try:
        check_room(
            [kept, *stores], f"lower train.keep, give another --output, or set {PLACE} to another disk"
        )
    except FewstepError as error:
        raise RecipeError(str(error)) from None


def check_best(method: Method, name: str | None) -> None:
    """``train.best`` is a number that the log will have, as far as its first word tells.

    Raises:
        RecipeError: it is none.
    """
    kinds = sorted({phase.name for phase in method.phases() if phase.loss} | {"health"})
    if name and name.partition("/")[0] not in kinds:
        raise RecipeError(
            f"train.best: {name}: expected a number of the log, whose names begin with {'/, '.join(kinds)}/"
        )


def check_data(recipe: Recipe) -> tuple[list[str], CaptionedImages | None]:
    check_trackers(recipe.train.trackers)
    data, measured = recipe.data, recipe.evaluation.prompts
    prompts = load_prompts(data.prompts, column=column_for(data.prompts, data.column))
    if measured:
        load_prompts(measured, "evaluation.prompts", column_for(measured, data.column))
    _check_column(recipe)
    _check_extractor(recipe)
    if recipe.samples.distance:
        _check_distance(recipe)
    needs = recipe.method_class.needs(recipe.method)
    if "pairs" in needs:
        name = Path(recipe.output).name  # of a recipe that comes with fewstep, unless its output is elsewhere
        load_pairs(recipe.data.pairs, name if name in recipe_files() else "RECIPE")
    if data.images is None and "images" not in needs:
        return prompts, None
    if data.images is None:
        raise RecipeError(
            "data.images: missing; this configuration needs real images. Give a folder of captioned images"
            + _without_images(recipe)
        )
    images = load_images(data.images, data.column, upscale=data.upscale, max_bad=data.max_bad)
    if images.passed_over:
        over = ", ".join(images.passed_over)
        print(f"fewstep: note: data.images: {recipe.data.images}: passed over {over}", file=sys.stderr)
    return prompts, images


def _without_images(recipe: Recipe) -> str:
    """An option of the method with which it needs none, where it has such an option."""
    for name, value, instead in (
        ("gan_weight", 0.0, "to run data-free"),
        ("synthetic", True, "to train on the teacher's own samples (fewstep pairs)"),
    ):
        try:
            changed = dataclasses.replace(recipe.method, **{name: value})
        except (TypeError, RecipeError):
            continue
        if "images" not in recipe.method_class.needs(changed):
            return f", or set method.{name} {str(value).lower().removesuffix('.0')} {instead}"
    return ""


def _check_column(recipe: Recipe) -> None:
    """A column that nothing has would be an option without effect."""
    data, images = recipe.data, recipe.data.images
    files = [source for source in (data.prompts, recipe.evaluation.prompts) if source]
    if data.column is None or any(map(has_columns, files)):
        return
    if (
        images is None
        or not has_columns(images)
        or (split(walk(Path(images))[0]).names and not tables(images))
    ):
        raise RecipeError(
            f"data.column: {data.column}: neither prompts nor captions are in a table; leave it out"
        )


def _check_extractor(recipe: Recipe) -> None:
    """The features that a run is measured in are there, which its end would be late to find out."""
    from ..vision.extractors import DEFAULT, get_extractor

    name, measured = recipe.evaluation.extractor, recipe.evaluation.num or recipe.samples.distance
    if not measured or name == DEFAULT:
        return
    try:
        get_extractor.__wrapped__(name)  # and forgotten, until it is wanted on its device
    except FewstepError as error:
        raise RecipeError(f"evaluation.extractor: {error}") from None


def _check_distance(recipe: Recipe) -> None:
    from ..evaluation.while_training import check_torchmetrics

    if recipe.samples.distance < 2 or recipe.data.images is None:
        raise RecipeError(
            f"samples.distance: {recipe.samples.distance} with data.images {recipe.data.images}: expected at least 2 "
            "samples, and real images to compare them with"
        )
    check_torchmetrics()


def _check_references(
    recipe: Recipe, adapter: type[Teacher], prompts: Sequence[str], images: CaptionedImages | None
) -> None:
    """Every text that will be encoded has the images that the teacher reads, and none that it does not."""
    data, measured = recipe.data, recipe.evaluation.prompts
    stores = {"data.prompts": prompts}
    if shown := shown_prompts(recipe.samples.prompts, data.column):
        stores["samples.prompts"] = shown
    if measured:
        stores["evaluation.prompts"] = load_prompts(measured, column=column_for(measured, data.column))
    if images is not None and "images" in recipe.method_class.needs(recipe.method):
        stores["data.images"] = images.captions
    try:
        for name, texts in stores.items():
            check_references(adapter, texts, name)
    except FewstepError as error:
        raise RecipeError(str(error)) from None


def check_class(recipe: Recipe, prompts: Sequence[str] = (), images: CaptionedImages | None = None) -> None:
    origin = Origin.of(recipe.teacher.path, **recipe.teacher.weights())
    found, expected = pipeline_class_of(origin), recipe.teacher.pipeline_class
    if expected and found != expected:
        raise RecipeError(
            f"teacher.path: {recipe.teacher.path} is a {found}, but this recipe was written for a {expected}; choose "
            "another recipe, or set teacher.pipeline_class null"
        )
    check_origin(origin)
    adapter, wanted = adapters()[found], recipe.method_class.teacher_kind
    _check_references(recipe, adapter, prompts, images)
    check_method(recipe, adapter)
    if adapter.kind != wanted:
        raise RecipeError(
            f"method.name: {recipe.method_class.name} distills {wanted} teachers, and {recipe.teacher.path} is "
            f"{adapter.kind} ({found}); choose another method or teacher"
        )
    if recipe.evaluation.floor_steps and not adapter.floor:
        raise RecipeError(
            f"evaluation.floor_steps: {recipe.evaluation.floor_steps}: a {found} has no training-free solver in few "
            "steps; leave them out"
        )


def check_frozen(recipe: Recipe, here: bool = True) -> None:
    """Refuses, before anything is loaded, ways of keeping frozen weights that a recipe has no use for.

    Args:
        here: whether it is run on this machine, and not only planned, so that packages have to be there.

    Raises:
        RecipeError: with what to give instead.
    """
    teacher, method = recipe.teacher, recipe.method_class
    if here:
        check_quantization(teacher.quantization)
    if not teacher.quantization and not teacher.offload:
        return
    option = f"quantization: {teacher.quantization}" if teacher.quantization else "offload: true"
    if teacher.compile:
        raise RecipeError(
            f"teacher.compile: true: torch.compile does not take weights that are fetched; expected false with "
            f"teacher.{option}"
        )
    if method.teacher_kind != "diffusion":
        raise RecipeError(
            f"teacher.{option}: is for diffusion teachers, and {method.name} distills {method.teacher_kind} ones"
        )
    full = [name for name in method.networks_for(recipe.method) if recipe.role(name).kind == "full"]
    if teacher.quantization and full:
        raise RecipeError(
            f"roles.{full[0]}.kind: full: trains a copy of weights that teacher.quantization {teacher.quantization} "
            "has rounded; expected lora, or teacher.quantization null (teacher.offload true takes full roles)"
        )


def check_gain(method: Method, teacher: Teacher) -> None:
    """An eps student near zero SNR multiplies its error, and at zero SNR has no x0; say so before hours are spent.

    Raises:
        RecipeError: at zero SNR.
    """
    start, denoiser = method.student.times[0], teacher.denoiser
    names = ("start", "one_step_time", "levels", "angles")
    option = next((f"method.{name}" for name in names if hasattr(method.config, name)), "first time")
    if denoiser.schedule.is_silent(start) and denoiser.prediction == "eps":
        raise RecipeError(
            f"{option}: {start:g}: there is no signal at this time of {teacher.source} (zero terminal SNR), so an "
            f"{denoiser.prediction} prediction says nothing of x0; give an earlier time, or a v-prediction teacher"
        )
    if (gain := denoiser.schedule.x0_gain(start, denoiser.prediction)) > 10:
        print(
            f"fewstep: note: at its first time {start} this {denoiser.prediction} student multiplies its error "
            f"by {gain:.1f}; an earlier {option} (399 for one-step SDXL) is gentler",
            file=sys.stderr,
        )


def check_length(method: Method, steps: int, per_iteration: int) -> None:
    """Refuses a run that ends before one of its roles has learned anything.

    Raises:
        RecipeError: with the role, its phase and a number of steps that would do.
    """
    phases = method.phases()
    trained = {role for phase in phases if phase.loss for role in phase.train}
    # To be copied is not to learn, unless it is all that a role is for.
    phases = [phase for phase in phases if phase.loss or not trained & {*phase.train}]

    def idle(steps: int) -> dict[str, str]:
        """Roles that no phase trains, and the first phase that would."""
        waiting: dict[str, str] = {}
        for phase in phases:
            waiting |= {role: phase.name for role in phase.train if role not in waiting}
        progress = Progress(0, steps, per_iteration)
        while waiting and progress.iteration < steps:
            for phase in phases:
                if phase.due(progress):
                    waiting = {r: name for r, name in waiting.items() if r not in phase.train}
            progress.iteration += 1
        return waiting

    for role, phase in idle(steps).items():
        enough = next((f", e.g. {steps << k}" for k in range(1, 20) if not idle(steps << k)), "")
        raise RecipeError(
            f"train.steps: {steps}: {method.name} would end before its phase {phase} trains {role}; expected more "
            f"steps{enough}, or shorter stages of the method"
        )
