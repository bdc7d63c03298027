"""`fewstep eval run`: generates and measures every row, and writes one table as JSON, Markdown and a page."""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.errors import FewstepError
from fewstep.evaluation.compare import cell, check_alike
from fewstep.evaluation.images import FirstImages, ImageSource, open_images
from fewstep.evaluation.measures import describe
from fewstep.evaluation.mixture import Mixture, counted
from fewstep.evaluation.models import check_model, check_steps, open_model, record_of, solver_name
from fewstep.evaluation.page import write_page
from fewstep.evaluation.prompts import Prompts, read_prompts
from fewstep.evaluation.sampling import Job, check_num, is_complete, sample_folder
from fewstep.evaluation.spec import Entry, Spec, slug
from fewstep.evaluation.statistics import table
from fewstep.evaluation.yardstick import Yardstick, write_json
from fewstep.files import replacing, write
from fewstep.report.grid import centred, image_grid
from fewstep.report.rows import row_name
from fewstep.shape import Shape

SHOWN = 8  # images of each row, and as many of prompts that name a real one


@dataclass(frozen=True)
class Row:
    """One model at one number of steps; images that were made elsewhere have no job."""

    entry: Entry
    job: Job | None

    @property
    def label(self) -> str:
        steps, solver = (self.job.steps, solver_name(self.job.solver)) if self.job else (None, "own")
        return row_name({"name": self.entry.name, "steps": steps, "solver": solver})

    @property
    def folder(self) -> str:
        """Inside `samples/`."""
        if self.job is None:
            return slug(self.entry.name)
        guidance = "" if self.job.guidance is None else f"-g{self.job.guidance:g}"
        solver = self.job.solver if solver_name(self.job.solver) != "search" else Path(self.job.solver).name
        return f"{slug(self.entry.name)}/{slug(solver)}{guidance}/{self.job.steps:03d}-steps"


def rows_of(spec: Spec) -> list[Row]:
    """All rows, each model's in the order of solvers, guidances and steps."""
    shared = {name: getattr(spec, name) for name in ("per_prompt", "seed", "size", "rounding", "mixture")}
    rows = []
    for entry in spec.models:
        if entry.images:
            rows.append(Row(entry, None))
            continue
        rows += [
            Row(entry, Job(steps, solver, guidance, **shared))
            for solver in entry.solver
            for guidance in entry.guidance
            for steps in entry.steps
        ]
    folders = [row.folder for row in rows]
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        raise FewstepError(
            f"models: two rows are called {twice[0]}: expected different names, solvers or steps"
        )
    return rows


def sized(spec: Spec) -> Spec:
    """With the pixels of all rows, where none are asked for and students have some: of other sizes no two rows would
    have the same noise, and a pipeline's own size need not be its student's. Of a student of several shapes these, with
    the shares that it was trained with.

    Raises:
        FewstepError: students of different sizes, or a damaged export.
    """
    if spec.size is not None or spec.shapes:
        return spec
    records = {e.name: record_of(e.lora or e.pipeline) for e in spec.models if e.pipeline}
    made = {name: _made_in(record) for name, record in records.items() if record}
    made = {name: one for name, one in made.items() if one}
    if len({*made.values()}) > 1:
        told = ", ".join(
            f"{name} {one.said if isinstance(one, Shape) else one}" for name, one in made.items()
        )
        raise FewstepError(
            f"models: students of different sizes in pixels ({told}) have no noise in common; expected one size: "
            "measure them apart, or give size in a file"
        )
    one = next(iter(made.values()), None)
    if isinstance(one, Mixture):
        return dataclasses.replace(spec, shapes=tuple(one.items()))
    return dataclasses.replace(spec, size=one and one.said)


def _made_in(record: dict[str, Any]) -> Shape | Mixture | None:
    """The size or the shapes that a student was trained in; None of one that says nothing of it."""
    call = record["call"]
    if "height" not in call:
        return None
    return Mixture.recorded(record) or Shape(call["height"], call.get("width", call["height"]))


def run_spec(
    spec: Spec, out: Path, *, device: str = "cpu", rank: int = 0, world: int = 1, replace: bool = False
) -> dict[str, Any]:
    """Everything that is not there yet; the first process measures while others only generate.

    Args:
        spec: what to compare.
        out: gets `samples/`, `results/`, `grids/`, `table.json`, `table.md` and `index.html`.
        device: of the networks. rank, world: this process and how many share the generation.
        replace: images that were made in another way make way, instead of being an error.

    Returns:
        The table.

    Raises:
        FewstepError: anything wrong with the inputs, before a model is loaded.
    """
    prompts = read_prompts(spec.prompts, spec.column)
    num = check_num(spec.num, prompts, spec.per_prompt)
    spec = sized(spec)
    rows = rows_of(spec)
    for entry in spec.models:
        if entry.pipeline:
            check_model(entry.pipeline, entry.lora, entry.network)
            record = record_of(entry.lora or entry.pipeline)
            if record and "own" in entry.solver:
                check_steps(record, entry.steps)
    yardstick = Yardstick(spec, prompts, device) if rank == 0 else None
    records: list[dict[str, Any]] = []
    if yardstick and not (out / "table.json").exists():  # by which the folder is known from now on
        _write(out, spec, rows, records, yardstick)
    for row, manifest, pipe in _made(spec, rows, prompts, num, out, device, rank, world, replace):
        if yardstick is None:
            continue
        folder = Path(row.entry.images or out / "samples" / row.folder)
        if row.job is not None:
            _wait(folder, row.job, num)
        images = FirstImages(open_images(folder), num)
        run = manifest["run"] if manifest else {"images": images.sha256}
        result = yardstick.measure(images, out / "results" / f"{row.folder}.json", run, pipe)
        records.append(_record(row, manifest, result, _shapes_of(images) if spec.mixture else {}))
        _save_grid(out / records[-1]["grid"], images, yardstick)
        _write(out, spec, rows, records, yardstick)  # rows that are done survive an interruption
    return _write(out, spec, rows, records, yardstick) if yardstick else {}


def _made(
    spec: Spec,
    rows: list[Row],
    prompts: Prompts,
    num: int,
    out: Path,
    device: str,
    rank: int,
    world: int,
    replace: bool,
) -> Iterator[tuple[Row, dict[str, Any] | None, Any]]:
    """Each row after this process has made its share, with the manifest and the pipeline of what was drawn.

    A model is loaded once, the row that others are compared with comes first.
    """
    first = [row for row in rows if row.entry is spec.reference]
    order = [*first[-1:], *first[:-1], *(row for row in rows if row.entry is not spec.reference)]
    model, loaded = None, None
    for row in order:
        if row.job is None:
            yield row, None, None
            continue
        if loaded is not row.entry:
            model, loaded = None, row.entry  # frees the one before
            about = (loaded.base, loaded.lora, loaded.network)
            model = open_model(*about, spec.dtype, device, spec.size)
        manifest = sample_folder(
            model,
            prompts,
            row.job,
            out / "samples" / row.folder,
            num=num,
            batch_size=spec.batch_size,
            rank=rank,
            world=world,
            speed_runs=spec.speed_runs,
            replace=replace,
            label=row.label,
        )
        yield row, manifest, model.pipe


def _wait(folder: Path, job: Job, num: int) -> None:
    """Until other processes have made their images; the launcher ends this one if they fail."""
    while not is_complete(folder, job, num):
        time.sleep(2)


def _shapes_of(images: ImageSource) -> dict[str, int]:
    """How many images there are of each shape, most of them first."""
    return {str(Shape(*size)): count for size, count in Counter(images.each).most_common()}


def _record(
    row: Row, manifest: dict[str, Any] | None, result: dict[str, Any], shapes: dict[str, int]
) -> dict[str, Any]:
    drawn = {}
    if row.job is not None and manifest is not None:
        drawn = {
            "solver": solver_name(row.job.solver),
            "guidance": manifest["run"]["guidance"],
            "steps": row.job.steps,
            "samples": f"samples/{row.folder}",
        }
    return {
        "name": row.entry.name,
        "kind": row.entry.kind,
        **({"shapes": shapes} if shapes else {}),
        **drawn,
        "folder": row.folder,
        "grid": f"grids/{row.folder.replace('/', '_')}.png",
        "speed": manifest.get("speed") if manifest else None,
        "metrics": result["metrics"],
        "warnings": result["warnings"],
        "result": result,
    }


def shown(yardstick: Yardstick) -> list[int]:
    """Indices of the images in the grids: the first of some prompts, and some that name a real image."""
    firsts = list(range(0, yardstick.cut, yardstick.spec.per_prompt))[:SHOWN]
    return [*firsts, *range(yardstick.cut, len(yardstick.captions))[:SHOWN]]


def _save_grid(path: Path, images: Any, yardstick: Yardstick) -> None:
    """The same prompts and noise in every row's grid; small images enlarged, large ones made smaller. Images of several
    shapes stand in the middle of cells of one size."""
    from PIL import Image

    tiles = []
    for i in shown(yardstick):
        (batch,) = FirstImages(images, 1, after=i).batches(1)
        tile = Image.fromarray(batch[0].numpy())
        tile.thumbnail(LARGEST)
        tiles.append(np.asarray(tile))
    cell = Shape(*map(max, zip(_tile(yardstick.spec), *(tile.shape[:2] for tile in tiles))))
    with replacing(path, durable=False) as part:
        grid = np.concatenate([centred(tile[None], cell) for tile in tiles])
        image_grid(grid, SHOWN, scale=_scale(cell.width)).save(part)


LARGEST = (256, 256)  # pixels of an image in a grid


def _scale(width: int) -> int:
    return max(1, 96 // width)


def _tile(spec: Spec) -> Shape:
    """What holds an image of every shape in a grid, before it is enlarged; of an unknown size next to nothing."""
    from PIL import Image

    made = []
    for shape in spec.mixture.shapes if spec.mixture else [Shape.of(spec.size or 1)]:
        tile = Image.new("L", (shape.width, shape.height))
        tile.thumbnail(LARGEST)
        made.append((tile.height, tile.width))
    return Shape(*map(max, zip(*made)))


def _cell(spec: Spec) -> dict[str, list[int]]:
    """How large a cell of a grid is, where it is no square."""
    tile = _tile(spec)
    if tile.height == tile.width:
        return {}
    return {"cell": [side * _scale(tile.width) for side in tile]}


def _write(
    out: Path, spec: Spec, rows: list[Row], records: list[dict[str, Any]], yardstick: Yardstick
) -> dict[str, Any]:
    """table.json, table.md, index.html; rows that were not made in the same way are refused."""
    results, others = {r["folder"]: r["result"] for r in records}, yardstick.others
    if len(results) + len(others) > 1:
        check_alike({**(results if yardstick.real is not None else _unpaired(results)), **others})
    order = [row.folder for row in rows]
    made = sorted(records, key=lambda r: order.index(r["folder"]))
    reference = next((r for r in records if "samples" in r), None)
    table_rows = [_row(r, reference) for r in made]
    table_rows += [
        {"name": name, "kind": "model", "speed": None, "metrics": r["metrics"], "warnings": r["warnings"]}
        for name, r in others.items()
    ]
    whole = {
        "schema": 1,
        "title": spec.title,
        "images": len(yardstick.captions),
        "named": len(yardstick.named),
        "prompts": [yardstick.captions[i] for i in shown(yardstick)],
        "columns": SHOWN,
        **_cell(spec),
        **({"mixture": spec.mixture.plain()} if spec.mixture else {}),
        "real": describe(yardstick.real) if yardstick.real is not None else None,
        "protocol": yardstick.protocol.name if yardstick.protocol else None,
        "rows": table_rows,
        "notes": _notes(made, yardstick, reference),
        "warnings": list(dict.fromkeys(w for row in table_rows for w in row["warnings"])),
    }
    write_json(out / "table.json", whole)
    write(out / "table.md", to_markdown(whole))
    write_page(whole, out)
    return whole


def _row(record: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any]:
    """How a table holds it, with how many times faster it is than the reference, both timed alike."""
    row = {k: v for k, v in record.items() if k not in ("result", "folder")}
    own, other = row["speed"], reference and reference["speed"]
    alike = own and other and all(own[key] == other[key] for key in ("batch", "device", "threads"))
    if alike and record is not reference:
        row["speed-up"] = round(other["seconds"] / own["seconds"], 3)
    return row


def _notes(
    records: list[dict[str, Any]], yardstick: Yardstick, reference: dict[str, Any] | None
) -> list[str]:
    """What one has to know to read the numbers."""
    images = f"{yardstick.cut} images"
    if yardstick.named:
        images += f", and {len(yardstick.named)} by name for retrieval,"
    notes = [f"{images} in every row, of the same prompts and the same noise; ± is a standard error."]
    if yardstick.spec.mixture:
        told = "; ".join(dict.fromkeys(counted(r["shapes"]) for r in records if r.get("shapes")))
        notes.append(
            f"Each prompt has one of several shapes, the same in every row: {told}. Real images are those that belong "
            "to these, cropped to them; features are of each image at its own shape, resized as the extractor does."
        )
    speeds = [r["speed"] for r in records if r["speed"]]
    if devices := sorted({speed["device"] for speed in speeds}):
        batches = ", ".join(str(b) for b in sorted({speed["batch"] for speed in speeds}))
        spec = yardstick.spec
        one = f", of {spec.mixture.at(spec.seed, 0)}" if spec.mixture and spec.speed_runs else ""
        notes.append(
            f"Seconds: median at batch {batches}{one}, from the prompt to pixels, on {', '.join(devices)}."
        )
    if reference and len(records) > 1:
        notes.append(
            f"Same-noise distance: to {row_name(reference)}, guidance {reference['guidance']:g}, as the mean of 1 - "
            "cosine of the features of both images of a sample."
        )
    return notes


def _unpaired(results: dict[str, Any]) -> dict[str, Any]:
    """Without real images each result stands against itself, which is no difference between them."""
    none = {"name": "none", "n": 0, "sha256": None}
    return {name: {**result, "real": none} for name, result in results.items()}


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """Labels of all metrics in the order of their first appearance."""
    return list(dict.fromkeys(label for row in rows for label in row["metrics"]))


def to_markdown(whole: dict[str, Any]) -> str:
    """The table with a standard error beside every measured number, and the warnings below."""
    labels = columns(whole["rows"])
    shapes = ["images"] * any(row.get("shapes") for row in whole["rows"])
    header = ("model", *shapes, "solver", "guidance", "steps", "NFE", "s / image", "peak MiB", *labels)
    body = []
    for row in whole["rows"]:
        speed = row.get("speed") or {}
        seconds = {"value": speed["seconds"], "error": speed["seconds_error"]} if speed else None
        guidance = "" if row.get("guidance") is None else f"{row['guidance']:g}"
        memory = f"{speed['peak_memory_mb']:.0f}" if speed else ""
        told = [counted(row.get("shapes", {}))] * len(shapes)
        facts = (row["name"], *told, row.get("solver", ""), guidance, row.get("steps", ""))
        measured = (cell(row["metrics"].get(label)) for label in labels)
        body.append((*facts, f"{speed['nfe']:g}" if speed else "", cell(seconds), memory, *measured))
    lines = [f"# {whole['title']}", "", table(header, body), ""]
    return "\n".join([*lines, *(f"- {line}" for line in (*whole["notes"], *whole["warnings"]))]) + "\n"
