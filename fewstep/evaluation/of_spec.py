"""`fewstep eval run`: generates and measures every row, and writes one table as JSON, Markdown and a page."""

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.evaluation import protocols
from fewstep.evaluation.compare import cell, check_alike, load_result
from fewstep.evaluation.evaluate import check_captions, evaluate_images, open_side
from fewstep.evaluation.features import extract
from fewstep.evaluation.images import ArrayImages, FirstImages, ImageSource, open_images
from fewstep.evaluation.measures import describe
from fewstep.evaluation.metrics import paired_distance
from fewstep.evaluation.models import open_model
from fewstep.evaluation.page import write_page
from fewstep.evaluation.prompts import Prompts, read_prompts
from fewstep.evaluation.sampling import Job, check_num, is_complete, sample_folder
from fewstep.evaluation.spec import Entry, Spec, slug
from fewstep.evaluation.statistics import table
from fewstep.files import write
from fewstep.vision.extractor import Extractor
from fewstep.vision.extractors import DEFAULT, get_extractor
from fewstep.vision.scores import get_scorer


@dataclass(frozen=True)
class Row:
    """One model at one number of steps."""

    entry: Entry
    job: Job

    @property
    def folder(self) -> str:
        """Inside `samples/`."""
        guidance = "" if self.job.guidance is None else f"-g{self.job.guidance:g}"
        return f"{slug(self.entry.name)}/{slug(self.job.solver)}{guidance}/{self.job.steps:03d}-steps"


def rows_of(spec: Spec) -> list[Row]:
    """All rows, each model's in the order of solvers, guidances and steps."""
    shared = {name: getattr(spec, name) for name in ("per_prompt", "seed", "size", "rounding")}
    return [
        Row(entry, Job(steps, solver, guidance, **shared))
        for entry in spec.models
        for solver in entry.solver
        for guidance in entry.guidance
        for steps in entry.steps
    ]


def run_spec(spec: Spec, out: Path, *, device: str = "cpu", rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Everything that is not there yet; the first process measures while others only generate.

    Args:
        spec: what to compare.
        out: gets `samples/`, `results/`, `table.json`, `table.md` and `index.html`.
        device: of the networks. rank, world: this process and how many share the generation.

    Returns:
        The table.

    Raises:
        FewstepError: anything wrong with the inputs, before a model is loaded.
    """
    prompts = read_prompts(spec.prompts)
    num = check_num(spec.num, prompts, spec.per_prompt)
    rows = rows_of(spec)
    bench = None
    if rank == 0:
        bench = Bench(spec, prompts.of_images(num, spec.per_prompt), device)
    records: list[dict[str, Any]] = []
    for entry, row, manifest in _generate(spec, rows, prompts, num, out, device, rank, world):
        if bench is None:
            continue
        _wait(out / "samples" / row.folder, row.job, num)
        images = FirstImages(open_images(out / "samples" / row.folder), num)
        result = bench.measure(images, out / "results" / f"{row.folder}.json", manifest)
        bench.measured_first = bench.measured_first or f"samples/{row.folder}"
        records.append(_record(entry, row, manifest, result))
        _write(out, spec, records, bench)  # rows that are done survive an interruption
    return _write(out, spec, records, bench) if bench else {}


class Bench:
    """One yardstick for all rows, checked before anything is generated."""

    def __init__(self, spec: Spec, captions: list[str], device: str):
        self.spec, self.captions, self.device = spec, captions, device
        self.protocol = protocols.load(spec.protocol) if spec.protocol else None
        self.extractor: Extractor = (
            self.protocol.get_extractor(spec.extractor, device, spec.weights)
            if self.protocol
            else get_extractor(spec.extractor or DEFAULT, device, spec.weights)
        )
        clip = self.protocol.clip if self.protocol else None
        self.scorers = [get_scorer(scorer, device, clip) for scorer in spec.scorers]
        if self.scorers:
            check_captions(captions, len(captions))
        self.real = None if spec.real is None else open_real(spec.real)
        self.others = {name: load_result(path) for name, path in spec.results.items()}
        self.reference: tuple[dict[str, Any], Any] | None = None  # the first row: its run and features
        self.measured_first = ""

    def measure(self, images: ImageSource, file: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        """The result of one row, from its file if that was made of the same images in the same way."""
        groups = [i // self.spec.per_prompt for i in range(len(images))]
        made_of = {
            "run": manifest["run"],
            "num": len(images),
            "metrics": list(self.spec.measured),
            "scorers": [[s.label, s.name, s.weights_sha256] for s in self.scorers],
            "real": describe(self.real) if self.real is not None else None,
            "extractor": [self.extractor.name, self.extractor.weights_sha256, self.extractor.resize],
            "protocol": dataclasses.asdict(self.protocol) if self.protocol else None,
            "reference": self.reference and self.reference[0],
        }
        made_of = json.loads(json.dumps(made_of))
        features = None
        if self.reference is None:  # the first row that is measured
            features = extract(images, self.extractor, cached=True)
            self.reference = (manifest["run"], features)
        if file.is_file():
            found = load_result(file)
            if found.get("made_of") == made_of:
                return found
        result = evaluate_images(
            self.real if self.real is not None else images,
            images,
            extractor=self.extractor,
            metrics=self.spec.measured,
            groups=groups if self.spec.per_prompt > 1 else None,
            protocol=self.protocol,
            captions=self.captions,
            scorers=self.scorers,
        )
        if features is None:
            features = extract(images, self.extractor, cached=True)
            value, error = paired_distance(self.reference[1], features)
            result["metrics"][f"same-noise distance({self.extractor.name})"] = {
                "value": value,
                "error": error,
                "error_kind": "over pairs of the same prompt and noise",
                "n_real": len(features),
                "n_fake": len(features),
            }
        if self.real is None:
            result["warnings"] = []
        _write_json(file, {**result, "made_of": made_of})
        return {**result, "made_of": made_of}


def open_real(name: str) -> Any:
    """Images or statistics; "builtin:emoji" are those that come with fewstep."""
    if name == "builtin:emoji":
        from fewstep.data import emoji

        return ArrayImages(emoji.load()[0], name)
    return open_side(name)


def _generate(
    spec: Spec, rows: list[Row], prompts: Prompts, num: int, out: Path, device: str, rank: int, world: int
) -> Iterator[tuple[Entry, Row, dict[str, Any]]]:
    """Each row after this process has made its share; a model is loaded once, the reference row first."""
    first = [row for row in rows if row.entry is spec.models[0]]
    order = [first[-1], *first[:-1], *(row for row in rows if row.entry is not spec.models[0])]
    model, loaded = None, None
    for row in order:
        if loaded is not row.entry:
            model, loaded = None, row.entry  # frees the one before
            model = open_model(loaded.pipeline, loaded.lora, loaded.network, spec.dtype, device)
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
        )
        yield row.entry, row, manifest


def _wait(folder: Path, job: Job, num: int) -> None:
    """Until other processes have made their images; the launcher ends this one if they fail."""
    while not is_complete(folder, job, num):
        time.sleep(2)


def _record(entry: Entry, row: Row, manifest: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": entry.name,
        "solver": row.job.solver,
        "guidance": manifest["run"]["guidance"],
        "steps": row.job.steps,
        "samples": f"samples/{row.folder}",
        "speed": manifest.get("speed"),
        "metrics": result["metrics"],
        "warnings": result["warnings"],
        "result": result,
    }


def _write(out: Path, spec: Spec, records: list[dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """table.json, table.md, index.html; rows that were not made in the same way are refused."""
    results = {r["samples"]: r["result"] for r in records}
    if len(results) + len(bench.others) > 1:
        check_alike(
            {**results, **bench.others} if bench.real is not None else {**_unpaired(results), **bench.others}
        )
    order = [f"samples/{row.folder}" for row in rows_of(spec)]
    shown = sorted(records, key=lambda r: order.index(r["samples"]))
    rows = [{k: v for k, v in r.items() if k != "result"} for r in shown]
    rows += [
        {"name": name, "metrics": r["metrics"], "warnings": r["warnings"]} for name, r in bench.others.items()
    ]
    whole = {
        "schema": 1,
        "title": spec.title,
        "images": len(bench.captions),
        "prompts": bench.captions[: 8 * spec.per_prompt : spec.per_prompt],
        "real": describe(bench.real) if bench.real is not None else None,
        "protocol": bench.protocol.name if bench.protocol else None,
        "rows": rows,
        "notes": _notes(shown, len(bench.captions), bench.measured_first),
        "warnings": list(dict.fromkeys(w for row in rows for w in row["warnings"])),
    }
    _write_json(out / "table.json", whole)
    text = to_markdown(whole)
    write(out / "table.md", text)
    write_page(whole, out)
    return whole


def _notes(records: list[dict[str, Any]], images: int, first: str) -> list[str]:
    """What one has to know to read the numbers."""
    notes = [f"{images} images in every row, of the same prompts and the same noise; ± is a standard error."]
    if devices := sorted({r["speed"]["device"] for r in records if r["speed"]}):
        notes.append(f"Seconds: median at batch 1, from the prompt to pixels, on {', '.join(devices)}.")
    if len(records) > 1:
        reference = next(r for r in records if r["samples"] == first)
        facts = f"{reference['name']}, {reference['steps']} steps, {reference['solver']}"
        notes.append(
            f"Same-noise distance: to {facts}, guidance {reference['guidance']:g}, as the mean of 1 - cosine of the "
            "features of both images of a sample."
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
    header = ("model", "solver", "guidance", "steps", "NFE", "s / image", "peak MiB", *labels)
    body = []
    for row in whole["rows"]:
        speed = row.get("speed") or {}
        seconds = {"value": speed["seconds"], "error": speed["seconds_error"]} if speed else None
        guidance = "" if row.get("guidance") is None else f"{row['guidance']:g}"
        memory = f"{speed['peak_memory_mb']:.0f}" if speed else ""
        facts = (row["name"], row.get("solver", ""), guidance, row.get("steps", ""))
        measured = (cell(row["metrics"].get(label)) for label in labels)
        body.append((*facts, f"{speed['nfe']:g}" if speed else "", cell(seconds), memory, *measured))
    lines = [f"# {whole['title']}", "", table(header, body), ""]
    return "\n".join([*lines, *(f"- {line}" for line in (*whole["notes"], *whole["warnings"]))]) + "\n"


def _write_json(path: Path, data: dict[str, Any]) -> None:
    try:
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise FewstepError(f"{path}: a number is not finite; look at the images of this row") from None
    write(path, text)
