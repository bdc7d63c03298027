"""Folders of generated images: one seed per sample, shards by rank, resumable after a kill at any moment.

Sample i takes all of its noise, the initial and what few-step samplers add between steps, from its own CPU
generator with seed `seed + i`. So the image depends on no batch size, no number of processes and no point of
resumption. (Kernels may round differently for another batch size: then pixels differ by one level at most.)
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fewstep.data.image_sets import MANIFEST
from fewstep.errors import FewstepError
from fewstep.evaluation.files import check_file
from fewstep.evaluation.images import FirstImages, ImageSource
from fewstep.evaluation.mixture import Mixture
from fewstep.evaluation.models import Model
from fewstep.evaluation.prompts import Prompts
from fewstep.evaluation.speed import Stopwatch, measure_speed
from fewstep.evaluation.statistics import table
from fewstep.evaluation.stock import free_u_of
from fewstep.files import check_place, create, replacing, sweep, write, write_json
from fewstep.report.bar import Bar
from fewstep.shape import Shape, Size
from fewstep.teachers.generate import call_pipeline
from fewstep.teachers.lengths import too_long
from fewstep.teachers.pipelines import check_size, size_options

ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"nearest": np.round, "truncate": np.floor}
LAYOUTS: dict[str, Callable[[int, int], str]] = {
    "flat": lambda i, per_prompt: f"{i:06d}.png",
    "geneval": lambda i, per_prompt: f"{i // per_prompt:05d}/samples/{i % per_prompt:04d}.png",
}


@dataclass(frozen=True)
class Job:
    """How images are made of prompts.

    Attributes:
        steps: of the solver. solver: see `Model.prepare`. guidance: scale, or None for the model's own.
        seed: sample i uses `seed + i`.
        per_prompt: images of each prompt, in a row.
        size: pixels of a square's side, or height and width; None for the pipeline's own.
        mixture: several sizes in place of one: all images of a prompt have the one of its place and of the seed.
        rounding: from 0..1 times 255 to uint8: "nearest", or "truncate" as the DMD2 protocols do.
        layout: "flat" or "geneval".
        timesteps: `steps` falling times of the network's calls, or None for the scheduler's own.
    """

    steps: int
    solver: str = "own"
    guidance: float | None = None
    seed: int = 0
    per_prompt: int = 1
    size: Size | None = None
    rounding: str = "nearest"
    layout: str = "flat"
    timesteps: tuple[int, ...] | None = None
    mixture: Mixture | None = None

    def __post_init__(self):
        for name, known in (("rounding", ROUNDINGS), ("layout", LAYOUTS)):
            if getattr(self, name) not in known:
                raise FewstepError(f"--{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("steps", "per_prompt"):
            if getattr(self, name) < 1:
                raise FewstepError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more")

        if not 0 <= self.seed < 2**62:
            raise FewstepError(f"--seed is {self.seed}, expected 0 or more, below 2^62")
        if self.size is not None and min(Shape.of(self.size)) < 1:
            raise FewstepError(f"--size is {self.size}, expected a number of pixels from 1 on")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise FewstepError(f"--guidance is {self.guidance}, expected a number that is finite")
        if self.timesteps and len(self.timesteps) != self.steps:
            raise FewstepError(f"--timesteps has {len(self.timesteps)} times for --steps {self.steps}")

    def shape(self, i: int) -> Shape | None:
        """Of sample i; None for the pipeline's own."""
        if self.mixture:
            return self.mixture.at(self.seed, i // self.per_prompt)
        return Shape.of(self.size) if self.size else None

    def plain(self) -> dict[str, Any]:
        """JSON-ready. Shapes stand in it only where there are several, so that folders from before are known again."""
        mixture = {"mixture": self.mixture.plain()} if self.mixture else {}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "mixture"}
        return {**own, **mixture}

    def path(self, i: int) -> str:
        """File of sample i inside the folder."""
        return LAYOUTS[self.layout](i, self.per_prompt)


def check_batches(batch_size: int, speed_runs: int) -> None:
    if batch_size < 1:
        raise FewstepError(f"--batch-size is {batch_size}, expected 1 or more")
    if speed_runs < 0:
        raise FewstepError(f"--speed-runs is {speed_runs}, expected 0 (none) or more")


def check_num(num: int | None, prompts: Prompts, per_prompt: int) -> int:
    """The number of images, all that there are prompts for by default; FewstepError if prompts do not suffice."""
    most = len(prompts.texts) * per_prompt
    if num is not None and not 0 < num <= most:
        raise FewstepError(
            f"--num is {num}, expected 1 to {most}: {len(prompts.texts)} prompts with {per_prompt} images each; "
            "give more prompts or a larger --per-prompt"
        )
    return num or most


def sample_folder(
    model: Model,
    prompts: Prompts,
    job: Job,
    folder: Path,
    *,
    num: int | None = None,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
    speed_runs: int = 5,
    replace: bool = False,
    label: str = "",
) -> dict[str, Any]:
    """Fills a folder with this process's share of the images; those that exist already are kept.

    Args:
        model: what makes them. prompts: of the images. job: how.
        folder: gets `manifest.json` and the files of the layout.
        num: images in all, by all processes. batch_size: images at once.
        rank, world: this process makes the samples i with `i % world == rank`.
        speed_runs: images timed at batch 1 by the first process; 0 times its share as it is made.
        replace: images of another run make way, instead of being an error.
        label: what people are told is being drawn, by default the folder's name.

    Returns:
        The manifest.

    Raises:
        FewstepError: the folder holds another run (with a table of what differs), or images are not finite.
    """
    num = check_num(num, prompts, job.per_prompt)
    check_batches(batch_size, speed_runs)
    ready = _ready(model, job)
    first, call = next(iter(ready.values()))
    manifest = _claim(folder, _describe(first, prompts, job, call), num, replace)
    mine = list(range(rank, num, world))
    sweep(folder)
    if rank == 0 and (cut := too_long(model.pipe, prompts.texts)):
        print(f"fewstep: note: {cut}", file=sys.stderr)
    if job.layout == "geneval":
        _write_metadata(folder, prompts, mine, job.per_prompt)
    bar = Bar(f"drawing {label or folder.name}", unit="images", quiet=rank > 0)
    watch = _fill(ready, prompts, job, folder, _batches(job, mine, batch_size), bar)
    if rank == 0 and "speed" not in manifest and (speed_runs or watch.images):
        first, call = ready[job.shape(0)]
        one = ([prompts.texts[0]], [0], job, call)
        alone = partial(measure_speed, lambda: draw(first, *one), first.network)
        manifest["speed"] = alone(speed_runs) if speed_runs else watch.read()
        write_json(folder / MANIFEST, manifest)
    return manifest


Ready = dict[Shape | None, tuple[Model, dict[str, Any]]]  # shape -> the model and the arguments of its call


def _ready(model: Model, job: Job) -> Ready:
    """Each shape has the times and the arguments of size that the stock call has for it.

    Raises:
        FewstepError: a shape that the pipeline does not make.
    """
    found: Ready = {}
    for shape in job.mixture.shapes if job.mixture else [job.shape(0)]:
        if shape:
            check_size(model.pipe, shape)
        view = model.at(shape) if job.mixture and shape else model
        call = view.prepare(job.steps, job.solver, job.guidance, job.timesteps)
        found[shape] = view, call | (size_options(view.pipe, shape) if shape else {})
    return found


def _batches(job: Job, samples: list[int], size: int) -> list[list[int]]:
    """At most so many samples of one shape each."""
    of_shape: dict[Shape | None, list[int]] = {}
    for i in samples:
        of_shape.setdefault(job.shape(i), []).append(i)
    return [some[start : start + size] for some in of_shape.values() for start in range(0, len(some), size)]


def _fill(
    ready: Ready,
    prompts: Prompts,
    job: Job,
    folder: Path,
    batches: list[list[int]],
    bar: Bar,
) -> Stopwatch:
    """Draws what is missing and times it.

    Whole batches are made again for one missing image, so that a resumed run repeats the arithmetic exactly.
    """
    missing = [[i for i in batch if not _is_image(folder / job.path(i))] for batch in batches]
    watch = Stopwatch(next(iter(ready.values()))[0].network)
    bar.total = sum(map(len, missing))
    with bar:
        for batch, wanted in zip(batches, missing):
            if wanted:
                texts = [prompts.texts[i // job.per_prompt] for i in batch]
                model, call = ready[job.shape(batch[0])]
                with watch.drawing(len(batch)):
                    images = draw(model, texts, batch, job, call)
                for i in wanted:
                    save_png(images[batch.index(i)], folder / job.path(i))
                bar.update(len(wanted))
    return watch


@torch.no_grad()
def draw(model: Model, texts: list[str], indices: list[int], job: Job, call: dict[str, Any]) -> np.ndarray:
    """Images uint8 (B, H, W, 3) of the samples with these indices, each from its own generator."""
    generators = [torch.Generator().manual_seed(job.seed + i) for i in indices]
    call = model.arguments(call, generators)
    images = call_pipeline(model.pipe, texts, generators, output_type="np", **call).images
    if not np.isfinite(images).all():
        raise FewstepError(
            f"samples {indices[0]} to {indices[-1]} have pixels that are not finite: try --dtype float32, "
            "or another guidance"
        )
    return ROUNDINGS[job.rounding](images * 255).clip(0, 255).astype(np.uint8)


def save_png(image: np.ndarray, path: Path) -> None:
    """Writes uint8 (H, W, 3)."""
    with replacing(path, durable=False) as part:
        Image.fromarray(image).save(part)


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """What `sample_folder` wrote, or None for a folder of other images.

    Raises:
        FewstepError: a manifest that cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] == 1 and {"run", "about", "num"} <= set(manifest):
            return manifest
        problem = f"schema {manifest['schema']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise FewstepError(f"{path} is no manifest of `fewstep eval generate` ({problem}): use another folder")


def is_complete(folder: Path, job: Job, num: int) -> bool:
    """Whether all images are there, whoever made them."""
    return all((folder / job.path(i)).is_file() for i in range(num))


def check_pairs(images: ImageSource, lines: int, per_prompt: int = 1, what: str = "prompts") -> None:
    """Refuses images that are more or fewer than those of some prompts: all behind the first gap would be shifted.

    Args:
        images: all of a set, or as many as were asked for by a number. lines: how many prompts there are.
        what: they are, for errors.
    """
    wanted = lines * per_prompt
    first = isinstance(images, FirstImages)
    if len(images) == wanted or (first and len(images) < wanted):
        return
    of = f"{lines} {what}" + (f" with {per_prompt} images each" if per_prompt > 1 else "")
    raise FewstepError(
        f"{images.name}: {len(images)} images for {of}, expected {wanted}: one too few or too many shifts all behind "
        "it. Put back what is missing, or remove what is too much; --per-prompt K is for K images of each in a row"
        + (
            ""
            if first or what != "prompts"
            else f", --num {min(len(images), wanted)} takes the first of both"
        )
    )


def check_made_from(images: ImageSource, per_prompt: int, prompts_sha256: str | None = None) -> str | None:
    """Refuses generated images that are of other prompts, or not all there; other images cannot be checked.

    Args:
        images: those of a folder of `sample_folder`, or the first of them. prompts_sha256: None where any will do.

    Returns:
        The hash of the prompts that they were made from, if that is known.
    """
    manifest = read_manifest(images.name)
    if manifest is None:
        return None
    wanted = {"prompts_sha256": prompts_sha256, "per_prompt": per_prompt}
    rows = [
        (key, str(manifest["run"][key]), str(value))
        for key, value in wanted.items()
        if value is not None and manifest["run"][key] != value
    ]
    if rows:
        raise FewstepError(
            f"{images.name} was made from other prompts:\n" + table(("", "there", "given"), rows)
        )
    check_whole(images, manifest)
    return manifest["run"]["prompts_sha256"]


def check_whole(images: ImageSource, manifest: dict[str, Any] | None) -> None:
    """Refuses generated images of which some are not there yet, or not any more."""
    if manifest is None:
        return
    num = len(images) if isinstance(images, FirstImages) else max(manifest["num"], len(images))
    path, per_prompt = LAYOUTS[manifest["run"]["layout"]], manifest["run"]["per_prompt"]
    there = {
        file.relative_to(images.name).as_posix() for file in images.files or () if isinstance(file, Path)
    }
    if missing := [name for name in (path(i, per_prompt) for i in range(num)) if name not in there]:
        raise FewstepError(
            f"{images.name}: {len(missing)} of {num} images are missing or unreadable, such as {missing[0]}: run the "
            "`fewstep eval generate` that began it again, which makes these alone, or give --num"
        )


def _describe(model: Model, prompts: Prompts, job: Job, call: dict[str, Any]) -> dict[str, Any]:
    """`run`, which decides the images, and `about`, which only names them; of several shapes the first one's call."""
    import diffusers
    import transformers

    versions = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
    return {
        "run": {
            "prompts_sha256": prompts.sha256,
            **job.plain(),
            "guidance": call["guidance_scale"],
            "scheduler": type(getattr(model.pipe, "scheduler", None)).__name__,
            "scheduler_config": _config_sha256(getattr(model.pipe, "scheduler", None)),
            "timesteps": call.get("timesteps"),
            **{key: call[key] for key in ("sigmas",) if key in call},
            **({"free_u": scales} if (scales := free_u_of(model.network)) else {}),
            "pipeline_class": type(model.pipe).__name__,
            "weights": model.fingerprint(),
            **{name: module.__version__ for name, module in versions.items()},
        },
        "about": model.about,
    }


def _config_sha256(scheduler: Any) -> str:
    """Of what a scheduler was made from, its order and noise table among it; not of names, which start with _."""
    config = {key: value for key, value in dict(getattr(scheduler, "config", {})).items() if key[0] != "_"}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _claim(folder: Path, wanted: dict[str, Any], num: int, replace: bool) -> dict[str, Any]:
    """Writes the manifest of a new folder, or checks that of an old one, which may grow in number."""
    if replace and (old := read_manifest(folder)) and old["run"] != json.loads(json.dumps(wanted["run"])):
        shutil.rmtree(folder)  # its manifest says who made it
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"schema": 1, "num": num, **wanted}
    found = read_manifest(folder)
    if found is None:
        check_place(folder, True, MANIFEST)  # what lies there would pass for samples of this run
        if create(folder / MANIFEST, json.dumps(wanted, indent=1) + "\n"):
            return wanted
        found = read_manifest(folder)  # another process was first
    if found["run"] != wanted["run"]:
        rows = [
            (key, str(found[part].get(key)), str(wanted[part].get(key)))
            for part in ("run", "about")
            for key in dict.fromkeys([*found[part], *wanted[part]])
            if found[part].get(key) != wanted[part].get(key)
        ]
        raise FewstepError(
            f"{folder} holds the images of another run:\n"
            + table(("", "there", "asked for"), rows)
            + "\nUse another --out, or remove that folder."
        )
    if num > found["num"]:
        found["num"] = num
        write_json(folder / MANIFEST, found)
    return found


def _write_metadata(folder: Path, prompts: Prompts, indices: list[int], per_prompt: int) -> None:
    """GenEval's `metadata.jsonl` in the folder of each prompt."""
    for k in sorted({i // per_prompt for i in indices}):
        record = prompts.records[k] if prompts.records else {"prompt": prompts.texts[k]}
        path = folder / f"{k:05d}" / "metadata.jsonl"
        if not path.is_file():
            write(path, json.dumps(record) + "\n")


def _is_image(path: Path) -> bool:
    try:
        check_file(path)
    except Exception:  # absent, or cut short by a loss of power
        return False
    return True
