"""The shapes of a run's images, ``data.shapes``: checked, and what belongs to each."""

from __future__ import annotations

from collections.abc import Mapping

from ..data.buckets import Bucket, Rows, shares_of, split
from ..data.cache import sizes_of
from ..data.images import CaptionedImages
from ..errors import FewstepError, RecipeError
from ..evaluation.mixture import mixture_of
from ..evaluation.real import check_enough, check_real
from ..process import Process
from ..recipe import Recipe
from ..shape import Shape
from ..teachers.base import Teacher


def shapes_of(recipe: Recipe) -> list[Shape]:
    """Those of ``data.shapes``; none where ``teacher.resolution`` is the only one."""
    return [Shape.of(one.size) for one in recipe.data.shapes]


def check_method(recipe: Recipe, adapter: type[Teacher]) -> None:
    """Refuses what has one shape only, before anything is loaded.

    Raises:
        RecipeError: with what stands in the way.
    """
    if not recipe.data.shapes:
        return
    name, said = adapter.pipeline_class, [shape.said for shape in shapes_of(recipe)]
    if adapter.kind != "diffusion":
        why = f"an {adapter.kind} teacher's map of tokens has one size"
    elif adapter.edits:
        why = f"a {name} edits images, whose results have teacher.resolution"
    elif "pairs" in recipe.method_class.needs(recipe.method):
        why = "pairs of the teacher are of teacher.resolution alone"
    else:
        return
    raise RecipeError(f"data.shapes: {said}: {why}; leave it out")


def check_shapes(recipe: Recipe, teacher: Teacher) -> None:
    """Refuses shapes that a teacher does not make.

    Raises:
        RecipeError: naming the shape.
    """
    shapes = shapes_of(recipe)
    if not shapes:
        return
    try:
        for shape in shapes:
            teacher.check_shape(shape, "data.shapes")
    except FewstepError as error:
        raise RecipeError(str(error).replace("leave it null", "leave it out")) from None
    if teacher.shape not in shapes:
        raise RecipeError(
            f"data.shapes: {[shape.said for shape in shapes]}: expected teacher.resolution among them, "
            f"{teacher.resolution}, in which the student is exported; add it, or set teacher.resolution"
        )


def look(recipe: Recipe, teacher: Teacher, images: CaptionedImages | None, process: Process) -> None:
    """Reads how large the images are, where that decides of which shape they are: one process first, for all.

    Raises:
        RecipeError: a shape of which images are wanted, to train on or to compare samples with, and none belongs to it;
            images to compare with alone of which too many are too small; fewer images than can be compared with.
    """
    wanted = "images" in recipe.method_class.needs(recipe.method)
    measured = bool(recipe.evaluation.num or recipe.samples.distance)
    if images is None or not (measured or (wanted and recipe.data.shapes)):
        return
    if not process.main:
        process.barrier()
    if wanted and recipe.data.shapes:
        split(images, sizes_of(images), shapes_of(recipe))
    elif wanted:
        check_enough(images, teacher.resolution)
    else:
        check_real(images, teacher.resolution, mixture_of(recipe, images))
    if process.main:
        process.barrier()


def parts_of(
    recipe: Recipe, teacher: Teacher, images: CaptionedImages
) -> list[tuple[Teacher, CaptionedImages]]:
    """The teacher of each shape with the images that belong to it; the teacher with all of them where there is one."""
    shapes = shapes_of(recipe)
    if not shapes:
        return [(teacher, images)]
    parts = split(images, sizes_of(images), shapes)
    return [(teacher.at(shape), part) for shape, part in zip(shapes, parts)]


def buckets_of(recipe: Recipe, teacher: Teacher, encoded: Mapping[str, Rows]) -> list[Bucket]:
    """The shapes of micro-batches, with the rows of :func:`fewstep.runs.build.encode`; none where there is one."""
    shapes = shapes_of(recipe)
    rows = [encoded.get(stream(shape)) for shape in shapes]
    shares = shares_of([one.share for one in recipe.data.shapes], rows)
    return [
        Bucket(view.latent_shape, part, stream(shape), share, view.sized)
        for shape, view, part, share in zip(shapes, map(teacher.at, shapes), rows, shares)
    ]


def stream(shape: Shape) -> str:
    """What the images of a shape are called among the rows of a run."""
    return f"images {shape}"
