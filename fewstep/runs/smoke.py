"""``--smoke``: any recipe in seconds, through the code of the real run."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..configs import EvalConfig, RoleConfig, SampleConfig, ShapeConfig, TeacherConfig
from ..data.prompts import CLASSES, UNCONDITIONAL
from ..data.texts import REFERENCE
from ..methods.base import guidance_of
from ..recipe import Recipe, family, to_dict
from ..shape import Shape
from ..teachers.base import Teacher
from ..teachers.pipelines import EDITING

RANK = 4
LARGER = (1, 2, 3)  # times the stand-in's size along a side


def smoke(recipe: Recipe, given: Collection[str] = ()) -> Recipe:
    """Four steps of two samples and a small rank, in a temporary folder, or where the output is to be and beside it.

    Unless the teacher is given or built in, a tiny random pipeline of the recipe's class stands in; where prompts and
    images are no files here, a few emoji do. What a recipe's roles start from is left out: weights of another run would
    be of other sizes than these, and may not be there yet; those of another ``--smoke`` can be given. ``given`` are the
    options that are the user's and not the recipe's, see :func:`fewstep.recipe.named`.
    """
    near = Path(recipe.output).absolute() if "output" in given else None
    if near is not None:
        near.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{near.name}-smoke-" if near else "fewstep-smoke-"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=near.parent if near else None))
    teacher, data = recipe.teacher, recipe.data
    if "teacher.path" not in given and not teacher.path.startswith("builtin:"):
        teacher = _stand_in(folder / "teacher", teacher, data.prompts)
    edits = teacher.pipeline_class in EDITING
    if data.shapes and teacher is not recipe.teacher:
        teacher, shapes = _small_shapes(recipe, teacher)
        data = dataclasses.replace(data, shapes=shapes)
    made = [Shape.of(one.size) for one in data.shapes]
    few = _few_emoji(folder, data.column or "text", 8, edits, data.prompts, made)
    data = dataclasses.replace(
        data,
        prompts=data.prompts
        if data.prompts in (CLASSES, UNCONDITIONAL) or Path(data.prompts).exists()
        else str(few / ("metadata.jsonl" if edits else "prompts.txt")),
        images=data.images if data.images is None or Path(data.images).exists() else str(few),
    )
    method = recipe.method.smoke()
    names = (*recipe.method_class.networks_for(method), *recipe.method_class.extras)
    roles = {name: _small(name, recipe.role(name), given) for name in names}
    train = dataclasses.replace(
        recipe.train,
        steps=4,
        batch_size=2,
        accumulate=1,
        shard=1,
        log_every=1,
        sample_every=2,
        checkpoint_every=2,
    )
    if "pairs" in recipe.method_class.needs(recipe.method):
        data = dataclasses.replace(data, pairs=str(_few_pairs(folder / "pairs", teacher, data, method)))
    small = dataclasses.replace(
        recipe,
        output=recipe.output if near else str(folder / "run"),
        teacher=teacher,
        data=data,
        roles=roles,
        train=train,
        method=method,
        samples=SampleConfig(count=2, teacher_steps=2, columns=2),
        evaluation=EvalConfig(num=0),
    )
    _say_what_is_other(recipe, small, given)
    return small


def _say_what_is_other(recipe: Recipe, small: Recipe, given: Collection[str]) -> None:
    """An option that a smoke run decides itself would else be one without effect."""
    before, after = to_dict(recipe), to_dict(small)
    said = {f"teacher.{name}" for name in recipe.teacher.weights()}  # by the stand-in
    pairs = {name: (_value(before, name), _value(after, name)) for name in sorted({*given} - said)}
    other = {name: b for name, (a, b) in pairs.items() if a != b and not isinstance(a, dict)}
    if other:
        words = ", ".join(f"{name} is {json.dumps(value)}" for name, value in other.items())
        print(f"fewstep: note: --smoke: {words} here, whatever is given", file=sys.stderr)


def _value(plain: Any, name: str) -> Any:
    """Of a dotted name; a role's by its own name, else by that of its kind."""
    for part in name.split("."):
        if isinstance(plain, dict):
            plain = plain.get(part, next((v for key, v in plain.items() if family(key) == part), None))
    return plain


def _stand_in(folder: Path, teacher: TeacherConfig, prompts: str) -> TeacherConfig:
    from ..teachers.tiny import RESOLUTION, write_tiny_pipeline

    name = teacher.pipeline_class or "StableDiffusionXLPipeline"
    # Of LlamaGen's models some read texts, some labels.
    reads_texts = name == "LlamaGenPipeline" and prompts != CLASSES
    options: dict[str, Any] = {"num_classes": None} if reads_texts else {}
    if name == "EDMPipeline" and prompts == CLASSES:
        options = {"num_class_embeds": 1000}
    if told := teacher.weights():
        said = f"--smoke: teacher.{', teacher.'.join(told)}: left out, for the stand-in is of another size"
        print(f"fewstep: note: {said}", file=sys.stderr)
    return dataclasses.replace(
        teacher,
        variant=None,
        config=None,
        loras=[],
        path=str(write_tiny_pipeline(name, folder, **options)),
        dtype="float32",
        autocast=None,
        resolution=RESOLUTION.get(teacher.pipeline_class or ""),
    )


def _small_shapes(recipe: Recipe, teacher: TeacherConfig) -> tuple[TeacherConfig, list[ShapeConfig]]:
    """The stand-in at its size of ``teacher.resolution``, and ``data.shapes`` as much smaller, in the proportions that
    its latents allow; without those that would be the same as another."""
    from ..teachers import load_teacher

    tiny = load_teacher(teacher.path, resolution=teacher.resolution)
    home = Shape.of(recipe.teacher.resolution or recipe.data.shapes[0].size)
    # Of coarse latents all would be the same square, unless they are a little larger.
    tries = [_scaled_shapes(recipe, home, tiny, larger) for larger in LARGER]
    own, found = max(tries, key=lambda one: len(one[1]))
    if len(found) < len(recipe.data.shapes):
        kept = ", ".join(map(str, found))
        print(
            f"fewstep: note: --smoke: data.shapes: {kept} here, for others are as small as one of them",
            file=sys.stderr,
        )
    shapes = list(found.values()) if len(found) > 1 else []
    return dataclasses.replace(teacher, resolution=_plain(own)), shapes


def _scaled_shapes(
    recipe: Recipe, home: Shape, tiny: Teacher, larger: int
) -> tuple[Shape, dict[Shape, ShapeConfig]]:
    """Of the stand-in's area, so many times along a side: the size of its stock call, and all of ``data.shapes``."""
    factor = larger * (tiny.shape.area / home.area) ** 0.5

    def scaled(shape: Shape, unit: int) -> Shape:
        return Shape(*(max(unit, round(side * factor / unit) * unit) for side in shape))

    own, found = scaled(home, math.lcm(8, tiny.unit)), dict[Shape, ShapeConfig]()
    for one in recipe.data.shapes:
        size = Shape.of(one.size)
        shape = own if size == home else scaled(size, tiny.unit)
        found.setdefault(shape, ShapeConfig(_plain(shape), one.share))
    return own, found


def _plain(shape: Shape) -> int | tuple[int, int]:
    """As a recipe has it."""
    return shape.height if shape.height == shape.width else (shape.height, shape.width)


def _small(name: str, config: RoleConfig, given: Collection[str]) -> RoleConfig:
    start = config.start_from
    if start is not None and not {f"roles.{n}.start_from" for n in (name, family(name))} & set(given):
        print(f"fewstep: note: --smoke: {name} starts from the teacher, not from {start}", file=sys.stderr)
        start = None
    return dataclasses.replace(config, rank=min(RANK, config.rank), start_from=start)


def _few_pairs(folder: Path, teacher, data, method) -> Path:
    from ..data.pairs import make_pairs
    from ..data.prompts import load_prompts
    from ..data.texts import column_for
    from ..teachers import load_teacher

    options: dict[str, Any] = {"num": 4, "steps": 2, "guidance": guidance_of(method)}
    prompts = load_prompts(data.prompts, column=column_for(data.prompts, data.column))
    return make_pairs(folder, load_teacher(teacher.path, **teacher.weights()), prompts, **options)


def _few_emoji(
    folder: Path,
    column: str = "text",
    count: int = 8,
    edits: bool = False,
    prompts: str = "builtin:emoji",
    shapes: Sequence[Shape] = (),
) -> Path:
    """A folder of captioned images with its prompts, as a user would bring one; with ``edits`` each image is to be made
    of the next one. ``prompts`` are a recipe's: of class labels captions are numbers, of kinds kinds. Images are
    squares, or have some shapes in turn."""
    from PIL import Image, ImageOps

    from ..data import emoji

    count = max(count, len(shapes))
    images, captions = emoji.load()
    if prompts in ("builtin:emoji-groups", emoji.SMALL):
        captions = emoji.groups()
    chosen = range(0, len(captions), len(captions) // count)[:count]
    texts = [str(k) if prompts == CLASSES else captions[i] for k, i in enumerate(chosen)]
    rows = [{"file_name": f"{i:04d}.png", column: text} for i, text in zip(chosen, texts)]
    if edits:
        rows = [{**row, REFERENCE: after["file_name"]} for row, after in zip(rows, rows[1:] + rows[:1])]
    target = folder / "emoji"
    target.mkdir(parents=True)
    for k, (i, row) in enumerate(zip(chosen, rows)):
        image = Image.fromarray(images[i])
        if shapes:
            height, width = shapes[k % len(shapes)]
            image = ImageOps.fit(image, (width, height))
        image.save(target / row["file_name"])
    (target / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (target / "prompts.txt").write_text("".join(row[column] + "\n" for row in rows))
    return target
