"""Stock diffusers pipelines to be measured: a teacher, a student on top of it, and how either is called."""

import copy
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import FewstepError
from fewstep.evaluation.stock import RECORD, floor_sampler, free_u
from fewstep.shape import Shape, Size
from fewstep.teachers import load_pipeline
from fewstep.teachers.origin import Origin
from fewstep.teachers.pipelines import (
    fix_shift,
    hands_sigmas,
    network_of,
    own_guidance,
    size_options,
    takes,
)
from fewstep.teachers.schedulers import for_steps, is_edm, is_flow

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SOLVERS = ("own", "lcm", "ddim", "euler", "heun", "dpm++", "unipc", "ays")
STEPPING = (
    "num_inference_steps",
    "timesteps",
    "sigmas",
)  # the part of a call that says where the network is called


def solver_name(solver: str) -> str:
    """What a table calls it: a folder of `fewstep floor` holds a searched schedule, wherever it lies."""
    return solver if solver in SOLVERS else "search"


def check_solver(solver: str, field: str) -> None:
    """Refuses what is neither one of `SOLVERS` nor a folder of `fewstep floor`."""
    if solver not in SOLVERS and not (Path(solver) / RECORD).is_file():
        raise FewstepError(
            f"{field} {solver}: expected one of {', '.join(SOLVERS)}, or a folder that `fewstep floor` wrote"
        )


@dataclass
class Model:
    """A pipeline with what is needed to call it for any number of steps.

    Attributes:
        pipe: the diffusers pipeline, on its device.
        about: JSON-ready names: `pipeline`, `lora`, `network`, whichever were given.
        record: `fewstep.json` of an export, or None.
        size: of its images, or None for the pipeline's own.
    """

    pipe: Any
    about: dict[str, str]
    record: dict[str, Any] | None = None
    size: Size | None = None

    def __post_init__(self):
        # Pipelines of tokens have none. As it was loaded its shift may depend on the size.
        self.scheduler = self.published = getattr(self.pipe, "scheduler", None)
        if self.scheduler is not None:
            fix_shift(self.pipe, self.size)
            self.scheduler = self.pipe.scheduler

    def at(self, shape: Shape) -> "Model":
        """The same weights for images of another shape: its times are those of the stock call for it, and its fixed
        noise has its latents."""
        view = copy.copy(self)
        view.size = shape.said
        view.record = self.record and record_at(self.record, shape)
        if self.published is not None and self.published.config.get("use_dynamic_shifting"):
            view.pipe = copy.copy(self.pipe)
            view.pipe.scheduler = self.published
            fix_shift(view.pipe, shape)
            view.scheduler = view.pipe.scheduler
        return view

    @property
    def network(self) -> torch.nn.Module:
        """The denoiser, or the part of it whose evaluations are counted."""
        return getattr(self.pipe, "counted", None) or network_of(self.pipe)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def prepare(
        self,
        steps: int,
        solver: str = "own",
        guidance: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Sets the scheduler and returns the arguments of the pipeline's call beside prompt and noise.

        Args:
            steps: calls of the solver.
            solver: "own" keeps the pipeline's scheduler, which is the student's for an export; "lcm" is for
                published few-step weights; the others, see `floor_sampler`, are training-free.
            guidance: None takes the export's or the pipeline's own.
            timesteps: where the network is called, `steps` falling numbers, if not where the scheduler would.

        Raises:
            FewstepError: a solver that the pipeline cannot have, or steps that the student's times cannot have.
        """
        call: dict[str, Any] = {"num_inference_steps": steps}
        scheduler = for_steps(self.scheduler, steps)
        flow, edm = is_flow(scheduler), is_edm(scheduler)
        free_u(self.network, None)  # a floor before this one may have asked for it
        if edm and (solver == "lcm" or timesteps):
            said = f"--timesteps {','.join(map(str, timesteps))}" if timesteps else f"--solver {solver}"
            raise FewstepError(
                f"{said}: an EDM pipeline has none; expected --solver ddim, euler, heun or dpm++"
            )
        if solver != "own" and not flow and not edm and not hasattr(scheduler, "alphas_cumprod"):
            raise FewstepError(
                f"--solver {solver}: {type(scheduler).__name__} of {self.about['pipeline']} has no noise table "
                "of alphas; use --solver own"
            )
        if solver == "lcm":
            from diffusers import FlowMatchLCMScheduler, LCMScheduler

            scheduler = (FlowMatchLCMScheduler if flow else LCMScheduler).from_config(scheduler.config)
        elif solver != "own":
            check_solver(solver, "--solver")
            scheduler, call = floor_sampler(solver, self.pipe, scheduler, steps)
        elif self.record:
            scheduler, call = self._student(steps)
        if timesteps:
            _check_timesteps(scheduler, timesteps)
            call = {**call, "timesteps": list(timesteps)}
            call.pop("num_inference_steps", None)
        if scheduler is not None:
            self.pipe.scheduler = scheduler
        call.setdefault("guidance_scale", 1.0 if "true_cfg_scale" in call else own_guidance(self.pipe))
        return call if guidance is None else {**call, "guidance_scale": guidance}

    def _student(self, steps: int) -> tuple[Any, dict[str, Any]]:
        """Scheduler and call of an export: its own times, or an even grid of another number of steps."""
        from fewstep.export import at_steps, student_scheduler

        if steps == self.record["num_steps"] or str(steps) in self.record.get("steps", {}):
            return self.scheduler, dict(at_steps(self.record, steps)["call"])
        check_steps(self.record, [steps])
        trained = ", ".join(self.record.get("steps", [str(self.record["num_steps"])]))
        print(
            f"fewstep: note: {self.about.get('lora', self.about['pipeline'])} was trained for {trained} steps; {steps} "
            "are evenly spaced from its first time",
            file=sys.stderr,
        )
        own = self.record["call"]
        if "max_timesteps" in own:  # SanaSprintPipeline, whose scheduler spreads angles evenly
            return self.scheduler, {**own, "num_inference_steps": steps, "intermediate_timesteps": None}
        from fewstep.diffusion.schedules import Flow
        from fewstep.diffusion.times import even_times
        from fewstep.teachers.schedulers import schedule_of

        flow = is_flow(self.scheduler)  # whose scheduler may have another shift than its times
        schedule = Flow(self.record.get("shift", 1.0)) if flow else schedule_of(self.scheduler)
        try:
            times = even_times(schedule, steps, self.record["timesteps"][0])
        except FewstepError:
            start = self.record["timesteps"][0]
            raise FewstepError(
                f"--steps {steps}: this student starts at time {start:g}; expected at most {int(start)} steps"
            ) from None
        noise = self.record.get("noise") if self.record.get("noise") in ("ddim", "tcd") else "fresh"
        scheduler, call = student_scheduler(self.scheduler, times, noise, handed=hands_sigmas(self.pipe))
        kept = {k: v for k, v in own.items() if k not in STEPPING}
        return scheduler, {**call, **kept}

    @property
    def _switches(self) -> bool:
        return bool(self.record) and _switches(self.record)

    def arguments(self, call: dict[str, Any], generators: list[torch.Generator]) -> dict[str, Any]:
        """The call for one batch: a student of experts or of fixed noise acts between its steps."""
        if takes(self.pipe, "use_resolution_binning"):
            call = {**size_options(self.pipe), **call}
        if not self._switches or getattr(self.pipe, "scheduler", None) is not self.scheduler:
            return call
        from fewstep.export import stock_call

        return {**stock_call(self.pipe, self.record, generators), **call}

    def fingerprint(self) -> str:
        """Hash over all weights and buffers as loaded, the same on every device and wherever they came from."""
        digest = hashlib.sha256(type(self.pipe).__name__.encode())
        for part, module in sorted(self.pipe.components.items()):
            if isinstance(module, torch.nn.Module):
                for name, tensor in module.state_dict().items():
                    # A sum of the bits as integers is exact in any order, unlike a sum of floats.
                    total = int(
                        tensor.contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
                    )
                    digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype} {total}".encode())
        return digest.hexdigest()


def record_at(record: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """What an export says of itself, of images of another shape: the latents of its fixed noise are as many more."""
    call = record["call"]
    if "latent_shape" not in record or "height" not in call:
        return dict(record)
    before = Shape(call["height"], call.get("width", call["height"]))

    def scaled(one: Sequence[int]) -> list[int]:
        """(C, H, W), or the rows of (N, D), which are packed tokens."""
        if len(one) == 2:
            return [one[0] * shape.area // before.area, one[1]]
        return [one[0], one[1] * shape.height // before.height, one[2] * shape.width // before.width]

    names = ("latent_shape", "given_shape")
    return {**record, **{name: scaled(record[name]) for name in names if name in record}}


def _switches(record: Mapping[str, Any]) -> bool:
    """Whether something happens between the steps of an export."""
    return bool(record.get("experts")) or record.get("noise") == "fixed"


def check_steps(record: Mapping[str, Any], asked: Sequence[int]) -> None:
    """Refuses numbers of steps that an export has no way to make.

    Raises:
        FewstepError: with those it has.
    """
    known = list(record.get("steps", [str(record["num_steps"])]))
    wrong = next((steps for steps in asked if str(steps) not in known), None)
    if wrong is not None and (_switches(record) or "student" in record):  # of tokens
        raise FewstepError(
            f"--steps {wrong}: a student of tokens, of several experts or of fixed noise runs at its "
            f"{', '.join(known)} steps only"
        )


def _check_timesteps(scheduler: Any, timesteps: Sequence[int]) -> None:
    """Refuses times that a scheduler does not take, before anything is drawn."""
    most = scheduler.config.num_train_timesteps - 1
    falling = all(a > b for a, b in pairwise(timesteps))
    if not falling or timesteps[0] > most or timesteps[-1] < 0:
        given = ",".join(map(str, timesteps))
        raise FewstepError(f"--timesteps {given}: expected falling times from {most} to 0")
    try:
        copy.deepcopy(scheduler).set_timesteps(timesteps=list(timesteps))
    except (ValueError, TypeError) as error:
        raise FewstepError(f"--timesteps: {type(scheduler).__name__} does not take these: {error}") from error


def open_model(
    pipeline: str | Origin,
    lora: str | None = None,
    network: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    size: Size | None = None,
) -> Model:
    """Loads what is to be measured, by stock diffusers.

    Args:
        pipeline: folder, hub id or file of a diffusers pipeline, "builtin:..." or the export of a fully trained
            student; an :class:`Origin` has LoRAs merged into it too.
        lora: an export of fewstep (or the run that holds one), or a LoRA file in diffusers' format.
        network: safetensors file (or a .bin that is read as weights only) with another state dict of the
            denoiser, as DMD2 publishes.
        dtype: of the weights. device: where to. size: of its images, which a schedule may depend on.

    Raises:
        FewstepError: nothing there, not loadable, or weights that do not fit.
    """
    base = pipeline if isinstance(pipeline, Origin) else Origin(pipeline)
    pipeline = base.path
    check_model(pipeline, lora, network)
    about = {"pipeline": pipeline, **{name: str(value) for name, value in base.said().items()}}
    record = None
    if lora and _export(lora):
        record, pipe = _load_export(_export(lora), pipeline, dtype)
        about["lora"] = str(lora)
    elif not lora and _export(pipeline):
        record, pipe = _load_export(_export(pipeline), None, dtype)
    else:
        pipe = load_pipeline(base, dtype)
        if lora:
            about["lora"] = str(lora)
            _attach_lora(pipe, Path(lora))
    if network:
        about["network"] = str(network)
        _replace_network(pipe, Path(network))
    pipe.set_progress_bar_config(disable=True)
    return Model(pipe.to(device), about, record, size)


def check_model(pipeline: str, lora: str | None = None, network: str | None = None) -> None:
    """What can be known of a model's files before any is read: they are there.

    Raises:
        FewstepError: which is not.
    """
    place = Path(pipeline)
    local = (place.is_absolute() or place.is_dir()) and not _export(pipeline) and not Origin(pipeline).single
    if local and not (place / "model_index.json").is_file():
        raise FewstepError(
            f"{pipeline}: expected the folder of a pipeline, with a model_index.json, or an export"
        )
    if lora and not _export(lora) and not Path(lora).is_file():
        raise FewstepError(
            f"--lora {lora}: expected the export folder of a fewstep run, or a LoRA file (.safetensors)"
        )
    if network and not Path(network).is_file():
        raise FewstepError(f"--network {network} does not exist: expected a state dict (.safetensors)")


def _export(path: str) -> Path | None:
    """The export folder that `path` is or, being a run, holds."""
    return next((p for p in (Path(path), Path(path) / "export") if (p / "fewstep.json").is_file()), None)


def record_of(path: str) -> dict[str, Any] | None:
    """What an export, or the run that holds one, says of itself; None of anything else.

    Raises:
        FewstepError: it is damaged.
    """
    from fewstep.export.load import read_record

    folder = _export(path)
    return read_record(folder) if folder else None


def _load_export(folder: Path, teacher: str | None, dtype: str) -> tuple[dict[str, Any], Any]:
    from fewstep.export import load_exported

    pipe, record = load_exported(folder, teacher, dtype)
    return record, pipe


def _attach_lora(pipe: Any, file: Path) -> None:
    if file.suffix != ".safetensors":
        raise FewstepError(f"--lora {file}: pickled files can run code; expected a .safetensors file")
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    except Exception as error:  # keys of another network, a damaged file
        raise FewstepError(f"--lora {file} does not fit {type(pipe).__name__}: {error}") from error


def _replace_network(pipe: Any, file: Path) -> None:
    from safetensors.torch import load_file

    module = network_of(pipe)
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except Exception as error:  # absent, damaged, pickled code, other keys or shapes
        summary = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FewstepError(
            f"--network {file} does not fit {type(module).__name__}: {summary}; expected its state dict"
        ) from error
