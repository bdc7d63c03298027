"""One measurement for all rows of a teacher: the same drawings are asked of everybody, from exports by stock diffusers.

Kinds, captions that many images share, are compared with as many real images of each; names, captions of one image,
tell what is found again. Whether a drawing is one of the training set's is measured on the kinds, against that set as
the teacher's VAE gives it back: what it cannot draw, a copyist cannot either.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..configs import DataConfig
from ..data.images import load_images
from ..device import choose
from ..diffusion.rng import Rng
from ..errors import FewstepError
from ..evaluation.evaluate import evaluate_images
from ..evaluation.images import ArrayImages, FirstImages, ImageSource, open_images
from ..evaluation.models import Model, open_model, record_of
from ..evaluation.of_run import CEILING, reconstruct
from ..evaluation.of_spec import Row as Drawn
from ..evaluation.prompts import read_prompts
from ..evaluation.real import real_images
from ..evaluation.sampling import Job, sample_folder
from ..evaluation.spec import Entry, slug
from ..evaluation.yardstick import write_json
from ..files import write
from ..shape import Shape
from ..teachers import load_teacher
from ..vision.extractor import Extractor, identity
from ..vision.extractors import get_extractor
from .board import Board, BoardTeacher, hash_of

OF_KINDS = ("fd", "kid", "prdc", "diversity", "vendi")
LEFT_OUT = ("density", "coverage")  # of prdc: another view of precision and recall
VERSION = 1  # of what is measured; another one measures again
KEPT = ("value", "error", "n_real", "n_fake")


class Ruler:
    """What all rows of a teacher are measured by; a row whose numbers are there is not measured again.

    Attributes:
        prompts: of the drawings: every kind as often as the board says, then names. groups: kind of each of the former.
        named: image that each name is of.

    Raises:
        FewstepError: fewer than two kinds with so many images.
    """

    def __init__(self, board: Board, teacher: BoardTeacher, out: Path):
        self.board, self.teacher, self.out = board, teacher, out
        self.loaded = load_teacher(teacher.path)
        data = DataConfig(prompts=board.images, images=board.images)
        self.images, self.all = real_images(load_images(board.images), self.loaded.resolution, data)
        self.kinds, names = self._captions()
        kinds, each = self.kinds, board.per_kind
        self.groups = [group for _ in range(each) for group in range(len(kinds))]
        self.reference = [files[turn] for turn in range(each) for files in kinds.values()]
        order = Rng(board.seed, "named").permutation(len(names)).tolist()[: board.named]
        chosen = [names[i] for i in order] if len(order) > 1 else []
        self.prompts = [*list(kinds) * each, *(name for name, _ in chosen)]
        self.named = [index for _, index in chosen]
        self.extractor: Extractor = get_extractor(board.extractor, str(choose("auto")))
        asked = [self.prompts, self.reference, self.named, board.images, board.seed]
        self.identity = hash_of([VERSION, *asked, identity(self.extractor)])
        write(out / "prompts.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in self.prompts))

    def _captions(self) -> tuple[dict[str, list[int]], list[tuple[str, int]]]:
        """Kind -> its images in an order by chance; names with theirs."""
        files: dict[str, list[int]] = defaultdict(list)
        for i, caption in enumerate(self.images.captions or ()):
            files[caption].append(i % len(self.images.files))
        kinds = {}
        for caption, found in files.items():
            if len(found) >= self.board.per_kind and len(found) > 1:
                order = Rng(self.board.seed, "kind", caption).permutation(len(found)).tolist()
                kinds[caption] = [found[i] for i in order]
        if len(kinds) < 2:
            raise FewstepError(
                f"per_kind: {self.board.per_kind}: {len(kinds)} captions of {self.board.images} have so many images; "
                "expected at least two: make it smaller"
            )
        return kinds, [(caption, found[0]) for caption, found in files.items() if len(found) == 1]

    @cached_property
    def training(self) -> ImageSource:
        """The training set as students could copy it: through the teacher's VAE, where there is one."""
        if self.loaded.autoencoder is None:
            return self.all
        folder, count = self.out / "samples" / "training", len(self.images.files)
        if not (folder / f"{count - 1:06d}.png").is_file():  # the last to be written
            reconstruct(self.loaded, self.images, list(range(count)), folder)
        return open_images(folder)

    def others(self) -> list[dict[str, Any]]:
        """Rows of real images, of the VAE that gives them back, of the teacher and of the floor."""
        teacher = self.teacher
        made: dict[str, Any] = {"pipeline": teacher.path, "guidance": (teacher.guidance,)}
        rows = self.of(Entry("teacher", kind="teacher", steps=(teacher.steps,), **made))
        if self.loaded.autoencoder is not None:
            rows = [self._ceiling(), *rows]
        rows = [*self._unseen(), *rows]
        if teacher.floor:
            steps, solver = tuple(teacher.floor), tuple(teacher.solvers)
            rows += self.of(Entry("floor", kind="floor", steps=steps, solver=solver, **made))
        return rows

    def student(self, name: str, export: Path) -> list[dict[str, Any]]:
        """Rows of a run's export, at each number of steps that it has."""
        record = record_of(str(export))
        if record is None:
            return [{"name": name, "error": "its export is not there"}]
        steps = tuple(map(int, record.get("steps", [record["num_steps"]])))
        return self.of(
            Entry(name, self.teacher.path, lora=str(export), kind="student", steps=steps, guidance=(None,))
        )

    def of(self, entry: Entry) -> list[dict[str, Any]]:
        """All rows of an entry, measured or with an ``error``."""
        rows, model = [], None
        size = Shape.of(self.loaded.resolution).said
        for guidance in entry.guidance:
            for solver in entry.solver:
                for steps in entry.steps:
                    how: dict[str, Any] = {"guidance": guidance, "seed": self.board.seed, "size": size}
                    drawn = Drawn(entry, Job(steps, solver, **how))
                    try:
                        result, model = self._row(drawn, model)
                    except FewstepError as error:
                        result = {"error": str(error)}
                    about = {
                        "name": entry.name,
                        "kind": entry.kind,
                        "solver": Path(solver).name,
                        "steps": steps,
                    }
                    rows.append({**about, **result})
        return rows

    def _row(self, drawn: Drawn, model: Model | None) -> tuple[dict[str, Any], Model | None]:
        assert drawn.job is not None
        file, folder = self.out / "results" / f"{drawn.folder}.json", self.out / "samples" / drawn.folder
        made_of = hash_of([dataclasses.asdict(drawn.job), self.teacher.path, drawn.entry.name, self.identity])
        if (known := self._known(file, made_of)) is not None:
            return known, model
        base, lora = drawn.entry.base, drawn.entry.lora
        assert base is not None
        model = model or open_model(base, lora, device=str(choose("auto")), size=drawn.job.size)
        asked = read_prompts(self.out / "prompts.jsonl")
        options: dict[str, Any] = {
            "batch_size": self.board.batch_size,
            "speed_runs": 0,
            "replace": True,
            "label": drawn.label,
        }
        manifest = sample_folder(model, asked, drawn.job, folder, **options)
        found = {"nfe": manifest["speed"]["nfe"], "guidance": manifest["run"]["guidance"]}
        return self._keep(file, made_of, {**found, **self._measured(folder)}), model

    def _ceiling(self) -> dict[str, Any]:
        """The very images of the reference, and the named ones, through the VAE: what no student can pass."""

        def measured(folder: Path) -> dict[str, Any]:
            reconstruct(self.loaded, self.images, [*self.reference, *self.named], folder)
            return self._measured(folder)

        return self._real(CEILING, measured)

    def _unseen(self) -> list[dict[str, Any]]:
        """Other real images, of the kinds that have as many again: what a student would have that draws such ones."""
        each = self.board.per_kind
        kinds = [files for files in self.kinds.values() if len(files) >= 2 * each]
        if len(kinds) < 2:
            return []
        real, other = ([files[turn + k] for turn in range(each) for files in kinds] for k in (0, each))
        name = f"other images of {len(kinds)} kinds"

        def measured(folder: Path) -> dict[str, Any]:
            drawn: ImageSource = ArrayImages(self._pixels(other), name)
            if self.loaded.autoencoder is not None:
                reconstruct(self.loaded, self.images, other, folder)
                # A board of larger kinds may have left more there.
                drawn = FirstImages(open_images(folder), len(other))
            return {"metrics": self._kept(self._beside(real, drawn, list(range(len(kinds))) * each))}

        return [self._real(name, measured)]

    def _real(self, name: str, measured: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """A row of real images; what they are drawn to, where they are, is a folder of its own."""
        file = self.out / "results" / f"{slug(name)}.json"
        made_of = hash_of([self.teacher.path, name, self.identity])
        row = self._known(file, made_of)
        if row is None:
            row = self._keep(file, made_of, {"nfe": 0, **measured(self.out / "samples" / slug(name))})
        return {"name": name, "kind": "reference", "solver": "own", "steps": None, **row}

    def _known(self, file: Path, made_of: str) -> dict[str, Any] | None:
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            return kept["row"] if kept["made_of"] == made_of else None
        except (OSError, ValueError, KeyError):
            return None

    def _keep(self, file: Path, made_of: str, row: dict[str, Any]) -> dict[str, Any]:
        write_json(file, {"made_of": made_of, "row": row})
        return row

    def _measured(self, folder: Path) -> dict[str, Any]:
        """Everything of the drawings of kinds but retrieval, which is of those of names."""
        images, kinds = open_images(folder), len(self.groups)
        drawn = FirstImages(images, kinds)
        metrics = self._beside(self.reference, drawn, self.groups)
        shared = {"extractor": self.extractor}
        metrics |= evaluate_images(self.training, drawn, metrics=("nearest",), **shared)["metrics"]
        if self.named:
            rest: ImageSource = FirstImages(images, len(self.named), after=kinds)
            asked = {"metrics": ("retrieval",), "prompted": self.named}
            metrics |= evaluate_images(self.all, rest, **asked, **shared)["metrics"]
        return {"samples": folder.relative_to(self.out).as_posix(), "metrics": self._kept(metrics)}

    def of_kinds(self, drawn: ImageSource) -> dict[str, Any]:
        """Metrics of drawings of kinds, in the order of :attr:`groups`, that were not made here."""
        return self._kept(self._beside(self.reference, drawn, self.groups))

    def _beside(self, reference: list[int], drawn: ImageSource, groups: list[int]) -> dict[str, Any]:
        """Metrics of drawings beside real images of the same kinds, which stand in the same order."""
        real = ArrayImages(
            self._pixels(reference), f"{self.board.images}, {self.board.per_kind} of each kind"
        )
        kinds = groups if self.board.per_kind > 1 else None
        asked = {"metrics": OF_KINDS, "groups": kinds, "extractor": self.extractor}
        metrics: dict[str, Any] = evaluate_images(real, drawn, **asked)["metrics"]
        return metrics

    @staticmethod
    def _kept(metrics: dict[str, Any]) -> dict[str, Any]:
        return {
            name.partition("(")[0]: {key: value[key] for key in KEPT}
            for name, value in metrics.items()
            if not name.startswith(LEFT_OUT)
        }

    def _pixels(self, chosen: list[int]) -> Any:
        return np.stack([self.images.load(i, self.loaded.resolution) for i in chosen])

    def shown(self, most: int) -> Iterator[int]:
        """Indices of drawings for a sheet: some kinds, and as many names."""
        kinds = len({*self.groups})
        yield from range(min(kinds, most))
        yield from range(len(self.groups), len(self.groups) + min(len(self.named), most))
