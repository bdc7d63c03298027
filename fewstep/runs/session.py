"""One recipe from start to end: check, encode, train, export, verify, evaluate, report.

``python recipes/x.py``, ``torchrun recipes/x.py`` and ``fewstep train recipes/x.py`` all end up in :func:`run`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import export, extensions
from .. import recipe as recipes
from ..data.batches import Ahead, Batches
from ..data.buckets import Part, Rows
from ..data.images import CaptionedImages
from ..data.places import PLACE
from ..data.store import Store
from ..device import choose, keep_freed, total
from ..diffusion import kernels
from ..diffusion.frozen import numel
from ..errors import FewstepError, LostProcess, RecipeError, TrainingError, interruptible, tell
from ..evaluation.mixture import mixture_of
from ..files import WriteError, check_room, check_writable, held, write, write_json
from ..methods.base import guidance_of
from ..process import Process, start
from ..recipe import Recipe
from ..report.report import write_report
from ..teachers import load_teacher
from ..teachers.base import Teacher
from ..training import checkpoint
from ..training.roles import averaged
from ..training.sharding import gathered
from ..training.trainer import Trainer
from . import inputs
from .build import TOOLS, build, encode, on_pixels
from .checks import (
    check_best,
    check_class,
    check_data,
    check_frozen,
    check_length,
    check_output,
    check_space,
)
from .disk import beside, to_encode
from .preview import Preview
from .shapes import buckets_of, check_shapes, look
from .starts import check_starts
from .summary import hardware, memory, versions
from .trackers import Trackers


def run(recipe: Recipe, arguments: Sequence[str] | None = None) -> Path:
    """Runs a recipe with command-line overrides; the entry point of every recipe script.

    Args:
        arguments: ``--train.steps 100`` and the like, default ``sys.argv[1:]``. ``--smoke`` shrinks the run to
            seconds, with a tiny random teacher of the right class where the real one is not given.

    Returns:
        The run directory. Whatever goes wrong exits with one message, see :func:`fewstep.errors.tell`.
    """
    extensions.only_read()
    words = list(sys.argv[1:] if arguments is None else arguments)
    smoke = "--smoke" in words
    words = [w for w in words if w != "--smoke"]
    try:
        with interruptible():
            recipe = recipes.override(recipe, words)
            if smoke:
                from .smoke import smoke as shrink

                given = recipes.named(words)
                if "output" in given:
                    check_output(Path(recipe.output))
                recipe = shrink(recipe, given)
            return execute(recipe)
    except BaseException as error:
        raise SystemExit(tell(error)) from None


def resume(folder: str | Path, arguments: Sequence[str] = ()) -> Path:
    """Continues a run from its last whole checkpoint, exactly; or not quite, with options such as a lower rate."""
    recipe = _recipe_of(Path(folder))
    return execute(recipes.override(recipe, arguments), resuming=True, meant=recipes.named(arguments))


def _recipe_of(folder: Path) -> Recipe:
    if not (folder / "recipe.yaml").is_file():
        raise FewstepError(f"{folder} is no run (no recipe.yaml in it); expected the output folder of a run")
    return dataclasses.replace(recipes.load(folder / "recipe.yaml"), output=str(folder))


def reexport(folder: str | Path, arguments: Sequence[str] = (), step: str = "newest") -> Path:
    """Exports a checkpoint of a run again, with other export options or from an earlier step.

    Args:
        step: "newest", "best" (see ``train.best``) or a number.

    Raises:
        FewstepError: no such checkpoint, or a damaged one.
    """
    folder = Path(folder)
    recipe = recipes.override(_recipe_of(folder), arguments)
    check_writable(folder / "export", "output:", record=export.RECORD)
    session = Session(recipe, *check_data(recipe), start("cpu"), begun=True, meant=recipes.named(arguments))
    if not session.trainer.restore():
        raise FewstepError(f"{folder}: no checkpoint to export; train it first")
    if step != "newest":
        session.trainer.restore(checkpoint.at(folder / "checkpoints", step, session.trainer.best))
    from ..evaluation.of_run import tell_measured_again

    with held(folder):
        session.export()
        tell_measured_again(folder)
    return folder / "export"


def replay(folder: str | Path) -> bool:
    """The iteration at which a run gave up, from its snapshot: says again what was not finite.

    Returns:
        Whether it fails again.
    """
    folder = Path(folder)
    snapshot = folder / "diverged"
    if not snapshot.is_dir():
        raise FewstepError(
            f"{folder}: holds no snapshot of a failure (no folder diverged in it); nothing to replay"
        )
    if reason := checkpoint.fault(snapshot):
        raise FewstepError(f"{snapshot}: {reason}; nothing to replay")
    recipe = _recipe_of(folder)
    process = start(recipe.train.device, recipe.train.shard)
    trainer = Session(recipe, *check_data(recipe), process, begun=True).trainer
    trainer.restore(snapshot)
    trainer.folder = None  # leaves everything as it is
    try:
        trainer.iterate()
    except TrainingError as error:
        print(f"fewstep: again: {error}")
        return True
    print(f"fewstep: step {trainer.progress.iteration - 1} went well this time")
    return False


def execute(recipe: Recipe, resuming: bool = False, meant: Collection[str] = ()) -> Path:
    """The whole run; cheap checks come before anything is loaded, and loading before anything is written.

    Args:
        meant: options that a resumed run was given, see :func:`fewstep.runs.inputs.check_inputs`.

    Raises:
        KeyboardInterrupt: with what there is of the run.
    """
    recipe = recipes.from_dict(recipes.to_dict(recipe))
    try:
        return _execute(recipe, Path(recipe.output), resuming, meant)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_left(Path(recipe.output))) from None


def _left(folder: Path) -> str:
    """What a run that is stopped leaves behind, and how it goes on."""
    if not (folder / "recipe.yaml").is_file():
        return "stopped before the run began; nothing is kept of it"
    kept = [checkpoint.step_of(one) for one in checkpoint.every(folder / "checkpoints")]
    if not kept:
        return f"stopped before the first checkpoint; it begins again with: fewstep resume {folder}"
    return f"stopped; its checkpoint of step {max(kept)} goes on with: fewstep resume {folder}"


def _execute(recipe: Recipe, folder: Path, resuming: bool, meant: Collection[str]) -> Path:
    if not resuming:
        check_output(folder)
    check_writable(folder / "export", "output:", record=export.RECORD)
    if recipe.data.encoder_device:
        choose(recipe.data.encoder_device, "data.encoder_device")
    device = choose(recipe.train.device)  # which becomes the current one
    kernels.check_attention(recipe.teacher.attention, device, recipe.teacher.autocast)
    check_frozen(recipe)
    prompts, images = check_data(recipe)
    check_class(recipe, prompts, images)
    kept = checkpoint.every(folder / "checkpoints") if resuming else []
    if kept and (done := max(map(checkpoint.step_of, kept))) > recipe.train.steps:
        raise RecipeError(
            f"train.steps: {recipe.train.steps}: this run is at step {done} already; expected at least that"
        )
    begun = bool(kept)
    if not begun:
        check_starts(recipe)
    process = start(recipe.train.device, recipe.train.shard)
    with _others(process, folder):
        session = Session(recipe, prompts, images, process, begun, meant)
        if process.main and (note := kernels.doubt(session.recipe.teacher.autocast, process.device)):
            print(f"fewstep: note: {note}", file=sys.stderr)
        with held(folder) if process.main else contextlib.nullcontext():
            if process.main:
                if not resuming:
                    check_output(folder)  # which another may have made meanwhile
                _claim(folder, session)
            process.barrier()
            session.train(resuming)
            session.export()
            if process.main:
                if recipe.evaluation.num:
                    from ..evaluation.of_run import evaluate_run

                    evaluate_run(session.recipe, folder, session.teacher, prompts, images)
                print(f"fewstep: report {write_report(folder)}")
        process.barrier()
    return folder


def _claim(folder: Path, session: Session) -> None:
    """The run directory comes into being when everything is known to fit together."""
    recipe = session.recipe
    named = [getattr(recipe.method, "reward", None) or "", recipe.evaluation.extractor]
    used = [type(session.teacher), recipe.method_class]
    extensions.keep(folder / "code", used, [name.partition(":")[0] for name in named])
    write(folder / "recipe.yaml", recipes.dump(recipe))
    inputs.keep(folder, session.inputs, session.teacher)
    session.write_summary(report=False)


@contextlib.contextmanager
def _others(process: Process, folder: Path) -> Iterator[None]:
    """Where another process ends, from the first thing that all do together, this one says no more than that.

    Raises:
        LostProcess: with how to go on.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own for a connection that broke
        if process.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        begun = (folder / "recipe.yaml").is_file()
        how = f"Continue from the last checkpoint with: torchrun ... -m fewstep resume {folder}"
        raise LostProcess(
            f"another of the {process.world} processes has ended or cannot be reached; its own message says why. "
            + (how if begun else "The run has not begun: start it again")
        ) from error


def settled(recipe: Recipe, teacher: Teacher, process: Process) -> Recipe:
    """With what ``auto`` became, on all ranks as on the first one, so that the run goes on with it anywhere."""
    denoiser = teacher.denoiser
    denoiser.autocast, denoiser.attention = process.collect((denoiser.autocast, denoiser.attention))[0]
    autocast: Any = str(denoiser.autocast).removeprefix("torch.") if denoiser.autocast else None
    config = dataclasses.replace(recipe.teacher, autocast=autocast, attention=denoiser.attention)
    return dataclasses.replace(recipe, teacher=config)


class Session:
    """What a recipe becomes once loaded: teacher, roles, method, data, trainer.

    Args:
        begun: a checkpoint will fill the weights, so what they started from is not read. meant: options whose inputs
            may differ from those that the run began with.
    """

    def __init__(
        self,
        recipe: Recipe,
        prompts: list[str],
        images: CaptionedImages | None,
        process: Process,
        begun: bool = False,
        meant: Collection[str] = (),
    ):
        self.process, self.folder = process, Path(recipe.output)
        places: dict[str, Any] = {"device": process.device, "encoder_device": recipe.data.encoder_device}
        self.teacher = load_teacher(recipe.teacher.path, **recipe.teacher.options(), **places)
        check_shapes(recipe, self.teacher)
        look(recipe, self.teacher, images, process)
        self.mixture = mixture_of(recipe, images)
        self.inputs = inputs.inputs_of(recipe, self.teacher, prompts, images)
        if begun:
            inputs.check_inputs(self.folder, self.inputs, recipe, meant)
        self.recipe = recipe = self._placed(settled(recipe, self.teacher, process), prompts, images)
        kernels.set_precision(process.device, recipe.train.tf32)
        keep_freed(process.device)
        self.roles, self.method = build(recipe, self.teacher, process, read=not begun)
        train = recipe.train
        check_best(self.method, train.best)
        check_length(self.method, train.steps, train.batch_size * train.accumulate * process.world)
        self.experts = [self.roles[name] for name in dict.fromkeys(self.method.student.roles)]
        check_space(self.folder, self.roles, recipe, to_encode(recipe, self.teacher, prompts, images))
        self._check_export(None if begun else prompts[0])
        encoded, to_verify = self._encode(prompts, images)
        self.preview = Preview(
            recipe,
            self.teacher,
            self.method,
            self.experts,
            prompts,
            self.folder,
            images if process.main else None,
            self.mixture,
        )
        self.export_prompts = [*self.preview.prompts[:2], *(prompts[i] for i in to_verify)]
        live = recipe.data.cache_prompts is False
        with_vae = on_pixels(recipe) or recipe.data.cache_images is False or (live and self.teacher.edits)
        self.teacher.drop_encoders(vae=not with_vae, texts=not live)
        self.ahead = Ahead(self._batches(encoded))
        self.trainer = Trainer(
            self.method,
            self.roles,
            self.ahead,
            recipe.train,
            folder=self.folder,
            process=process,
            scaled=recipe.teacher.autocast == "float16",
            on_sample=self._sample,
            on_save=self.preview.settle,
        )

    def _batches(self, encoded: dict[str, Rows]) -> Batches:
        train, process = self.recipe.train, self.process
        return Batches(
            latent_shape=self.teacher.latent_shape,
            batch_size=train.batch_size,
            per_iteration=train.accumulate * process.world,
            seed=train.seed,
            device=process.device,
            pixels=self.teacher.autoencoder is None,
            buckets=buckets_of(self.recipe, self.teacher, encoded),
            **{name: rows for name, rows in encoded.items() if not isinstance(rows, Part)},
        )

    def _encode(
        self, prompts: list[str], images: CaptionedImages | None
    ) -> tuple[dict[str, Rows], list[int]]:
        """What the method trains on, and the prompts that its export is to be verified on beside the first."""
        main, encoded = self.process.main, encode(self.recipe, self.teacher, prompts, images, self.process)
        to_verify = self.method.prepare(encoded["conditions"])
        if not main:
            self.process.barrier()  # the first one keeps what tools read, the others find it
        for tool in self.method.wants(self.recipe.method):
            setattr(self.method, tool, TOOLS[tool](self.recipe.method, self.teacher, prompts))
        if main:
            self.process.barrier()
        return encoded, to_verify

    def _placed(self, recipe: Recipe, prompts: list[str], images: CaptionedImages | None) -> Recipe:
        """With when prompts and images are encoded, where it is left open, for the run to go on alike."""
        data = recipe.data
        for name, gb in self.process.collect(beside(recipe, self.teacher, prompts, images))[0].items():
            if gb and self.process.main:
                print(
                    f"fewstep: note: {name.removeprefix('cache_')} are encoded beside training: their cache would take "
                    f"{gb:.0f} GB; with data.{name} true it is made first",
                    file=sys.stderr,
                )
            choice: dict[str, Any] = {name: not gb}
            data = dataclasses.replace(data, **choice)
        return dataclasses.replace(recipe, data=data)

    def _check_export(self, prompt: str | None) -> None:
        """What an export would fail at is found before training; a prompt is for the first process to sample."""
        student, configs = self.method.student, [role.config for role in self.experts]
        export.check_exportable(student, configs, self.teacher, self.recipe.export.kohya)
        if prompt is None or not self.process.main:
            return
        try:
            self._encoders_to(
                self.process.device
            )  # a call of the stock pipeline wants them beside its network
            difference = export.rehearse_export(student, configs, self.teacher, prompt)
        except torch.OutOfMemoryError:
            difference = None
        finally:
            if self.recipe.data.encoder_device:
                self._encoders_to(self.recipe.data.encoder_device)
        if difference is not None:
            print(
                f"fewstep: stock {self.teacher.pipeline_class} samples the untrained student as it is trained, largest "
                f"difference {difference:.1e}",
                file=sys.stderr,  # a bench's output is its result
            )

    def _encoders_to(self, device: torch.device | str) -> None:
        for name in self.teacher.encoders:
            getattr(self.teacher.pipe, name).to(device)

    def _sample(self, step: int) -> dict[str, float]:
        measured = self.preview.draw(step, self.process.main)
        self.preview.then(self.write_summary)  # so that the report can be looked at while it trains
        return measured

    def train(self, resuming: bool) -> None:
        if resuming:
            found, main = self.trainer.restore(), self.process.main
            if main and found:
                print(f"fewstep: resuming at step {self.trainer.progress.iteration}")
            elif main:
                print("fewstep: no checkpoint yet, beginning again", file=sys.stderr)
        names = self.recipe.train.trackers if self.process.main else []
        try:
            with Trackers(names, self.folder, recipes.to_dict(self.recipe)) as trackers:
                self.trainer.on_record = trackers.log
                self.trainer.train()
            self.ahead.settle()  # who encodes beside training has done
            self.preview.settle()
        except BaseException:
            with contextlib.suppress(WriteError):  # the first fault is the one to tell
                self.preview.settle()
                self.write_summary()
            raise
        self.write_summary()

    def export(self) -> None:
        recipe, experts = self.recipe, self.experts
        self._make_room()
        self._encoders_to(self.teacher.device)
        with averaged(*experts):
            own = {
                student.num_steps: export.trainer_sample(student, self.teacher, self.export_prompts)
                for student in self.method.student.variants()
            }
        weights = {role.name: gathered(role.final_weights(), self.process) for role in experts}
        if not self.process.main:
            return
        differences: list[float] = []

        def verify(part: Path) -> None:
            dtype, bits = recipe.teacher.dtype, recipe.teacher.quantization
            args = (recipe.export.tolerance, recipe.export.dtype, dtype)
            for steps, sample in own.items():
                found = export.verify(part, sample, self.teacher, self.export_prompts, *args, steps, bits)
                differences.append(found)
            if bits:
                first = own[self.method.student.num_steps]
                whole = export.on_the_whole_base(part, first, self.teacher, self.export_prompts, dtype)
                if whole is not None:
                    print(
                        f"fewstep: on the base as it is published, not in {bits}: off by {whole:.1e} of the spread"
                    )

        folder = export.export_student(
            self.folder / "export",
            self.teacher,
            self.method.student,
            weights,
            [role.config for role in experts],
            check=verify,
            about=self._about(),
            dtype=recipe.export.dtype,
            kohya=recipe.export.kohya,
        )
        difference = max(differences)
        reader = "stock diffusers" if self.teacher.kind == "diffusion" else self.teacher.pipeline_class
        print(f"fewstep: export {folder} verified in {reader}, largest difference {difference:.1e}")

    def _make_room(self) -> None:
        """Training is over: where two pipelines in fp32, ours and a stock one, are more than the card has, they meet on
        the CPU, which takes longer."""
        process, parts = self.process, self.teacher.pipe.components.values()
        weights = sum(numel(part) for part in parts if isinstance(part, nn.Module))
        have = total(process.device)
        if process.world == 1 and have and 2 * 4 * weights > have:
            print(
                "fewstep: the export is compared on the CPU, for the card has no room for two pipelines in fp32"
            )
            for role in self.roles.values():
                role.module.to("cpu")
            self.teacher.to("cpu")

    def _about(self) -> dict[str, Any]:
        bits = self.recipe.teacher.quantization
        return {
            **({"trained_on": {"quantization": bits}} if bits else {}),
            "title": self.folder.name,
            "method": self.method.name,
            "recipe": recipes.digest(self.recipe),
            "guidance_scale": guidance_of(self.recipe.method),
            "trained_steps": self.trainer.progress.iteration,
            "prompt": self.export_prompts[0],
            **(self.mixture.plain() if self.mixture else {}),
        }

    def write_summary(self, report: bool = True) -> None:
        if not self.process.main:
            return
        summary = {
            "name": self.folder.name,
            "teacher": self.teacher.source,
            "method": self.method.name,
            "student_steps": self.method.student.num_steps,
            "steps": self.trainer.progress.iteration,
            "seconds": round(self.trainer.seconds, 1),
            "cpu_seconds": None if (cpu := self.trainer.cpu_seconds) is None else round(cpu, 1),
            "parameters": {n: sum(w.numel() for w in r.weights.values()) for n, r in self.roles.items()},
            "hardware": hardware(self.process),
            "memory": memory(self.process),
            "waited": round(self.trainer.waits.share, 4),  # for data, of the time
            "arithmetic": {name: getattr(self.recipe.teacher, name) for name in ("autocast", "attention")},
            "versions": versions(),
        }
        write_json(self.folder / "run.json", summary)
        if report:
            write_report(self.folder)


def cache(recipe: Recipe) -> dict[str, Store]:
    """Encodes what a recipe trains on, so that runs find it: after an interruption it goes on where it stopped.

    Raises:
        RecipeError: as :func:`execute`, for data and teacher.
    """
    recipe = recipes.from_dict(recipes.to_dict(recipe))
    recipe = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, cache_prompts=True, cache_images=True)
    )
    choose(recipe.train.device)
    check_frozen(recipe)
    prompts, images = check_data(recipe)
    check_class(recipe, prompts, images)
    process = start(recipe.train.device)
    places: dict[str, Any] = {"device": process.device, "encoder_device": recipe.data.encoder_device}
    teacher = load_teacher(recipe.teacher.path, **recipe.teacher.options(), **places)
    check_shapes(recipe, teacher)
    check_room(to_encode(recipe, teacher, prompts, images), f"or set {PLACE} to another disk")
    stores = encode(recipe, teacher, prompts, images, process)
    plain = {name: rows.store if isinstance(rows, Part) else rows for name, rows in stores.items()}
    return {name: store for name, store in plain.items() if isinstance(store, Store)}
