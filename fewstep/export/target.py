"""How a student leaves: which class samples it, which files hold it, and what ``fewstep.json`` says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..configs import RoleConfig
from ..diffusion.denoiser import Scalar
from ..diffusion.schedules import Flow
from ..diffusion.student import Sampler
from ..errors import RecipeError
from ..files import write, write_json
from ..teachers.base import Teacher
from ..teachers.classes import num_classes
from ..teachers.pipelines import guided, hands_sigmas, size_options, takes
from ..teachers.single import recorded
from ..version import __version__
from . import comfyui
from .card import model_card
from .licence import licence_of
from .scheduler import meets, own_times, student_scheduler

Weights = Mapping[
    str, Mapping[str, Tensor]
]  # trained tensors by the names of the role, for every role of a student
Samplers = dict[int, tuple[Any, dict[str, Any]]]  # scheduler and call for each number of steps


@dataclass(frozen=True)
class Edition:
    """What is asked of an export beside the student.

    Attributes:
        about: method, recipe hash, title and the like for ``fewstep.json`` and the model card. dtype: of the weights.
            kohya: also a LoRA's keys for ComfyUI and A1111.
    """

    about: Mapping[str, Any]
    dtype: str = "float32"
    kohya: bool = False

    @property
    def precision(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Target:
    """One way in which a student leaves.

    Args:
        roles: how each of the student's networks is trained, in the order of ``student.roles``.

    Attributes:
        kind: "lora" where the teacher's pipeline stays what it is, "full" where the export holds a whole one.
    """

    kind: ClassVar[str] = "full"

    def __init__(self, teacher: Teacher, student: Sampler, roles: Sequence[RoleConfig]):
        self.teacher, self.student = teacher, student
        self.roles = dict(zip(dict.fromkeys(student.roles), roles))

    @classmethod
    def fits(cls, teacher: Teacher, student: Sampler, role: RoleConfig) -> bool:
        """Whether such a student, its first network trained so, leaves in this way."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuses, before training, what no pipeline could sample.

        Raises:
            RecipeError: with the field, and what would do.
        """
        kinds = dict.fromkeys(role.kind for role in self.roles.values())
        if len(kinds) > 1:
            raise RecipeError(
                f"roles.student.kind: {' and '.join(kinds)}: expected the same kind for every student of one export"
            )
        for role in self.roles.values():
            self.check_role(role)

    def check_role(self, role: RoleConfig) -> None:
        """As :meth:`check`, for one of the student's networks."""

    def check_kohya(self) -> None:
        """Refuses, before training, ``export.kohya`` where there are no such keys."""
        raise RecipeError(
            "export.kohya: true: this student leaves as a whole pipeline, which has none of an adapter's keys; set it "
            "false"
        )

    def write(self, folder: Path, weights: Weights, edition: Edition) -> None:
        """The export folder, ``fewstep.json`` and model card included."""
        self.save(folder, weights, edition)
        describe(folder, self.record(edition))

    def save(self, folder: Path, weights: Weights, edition: Edition) -> None:
        """The weights, and what samples them."""
        raise NotImplementedError

    def record(self, edition: Edition) -> dict[str, Any]:
        """What ``fewstep.json`` says."""
        teacher = self.teacher
        return {
            "fewstep": __version__,
            **edition.about,
            **recorded(teacher.origin),
            "licence": licence_of(teacher.place),
            "pipeline_class": teacher.pipeline_class,
            "kind": self.kind,
            "num_steps": self.student.num_steps,
            **self.sampling(),
            "resolution": teacher.resolution,
            "latent_shape": list(teacher.stock_shape),
            **self.given(),
            "dtype": edition.dtype,
            **self.particulars(),
            **self.comfyui(edition),
        }

    def given(self) -> dict[str, Any]:
        """Of the record: the shape of one sample's ``latents=``, where a pipeline holds the columns of it as tokens."""
        held = torch.empty(1, *self.teacher.latent_shape, device="meta")
        shape = list(self.teacher.given(held).shape[1:])
        return {} if shape == list(self.teacher.stock_shape) else {"given_shape": shape}

    def comfyui(self, edition: Edition) -> dict[str, Any]:
        """Of the record: what ComfyUI reads, and its settings."""
        files = self.files(edition)
        if self.teacher.comfyui is None or not files:
            return {}
        read = self.kind == "full" or edition.kohya or self.teacher.network == "transformer"
        return {"comfyui": {"files": files, "read": read, **comfyui.settings(self.teacher, self.student)}}

    def files(self, edition: Edition) -> dict[str, str]:
        """Weights that ComfyUI reads, in the export -> their names among those of other students."""
        return {}

    def expert(self, role: str) -> str:
        """Of a file's name: which of several students it is."""
        return role if len(self.roles) > 1 else ""

    def sampling(self) -> dict[str, Any]:
        """Of the record: times, and the scheduler that has them."""
        return {}

    def particulars(self) -> dict[str, Any]:
        """Of the record: what only some exports have."""
        return {}


class Stock(Target):
    """A student that a stock pipeline of diffusers samples, with a stock scheduler.

    Attributes:
        keeps_class: whether pipeline and network stay of the teacher's class.
    """

    keeps_class: ClassVar[bool] = True

    @property
    def told(self) -> dict[str, Scalar]:
        """What the student is told beside its condition; it is exported at the defaults."""
        return scalars_of(self.student)

    @cached_property
    def samplers(self) -> Samplers:
        """Scheduler and call for each number of steps.

        Raises:
            RecipeError: no stock scheduler has such times, or the teacher's pipeline could not be told them.
        """
        samplers, student = self.schedulers(), self.student
        pipe, kind = self.teacher.pipe, self.teacher.pipeline_class
        for _, call in samplers.values():
            if self.teacher.denoiser.embeds_guidance:
                call["guidance_scale"] = getattr(student.denoisers[0], "embedded", 1.0)
            if len(self.roles) > 1 and takes(
                pipe, "use_kv_cache"
            ):  # of what the first expert made of the text
                call["use_kv_cache"] = False
            scale = call.pop("guidance_scale", None)
            if scale is not None and takes(pipe, "guidance_scale"):
                call |= guided(pipe, scale)
            if odd := [name for name in ("timesteps", "sigmas") if name in call and not takes(pipe, name)]:
                raise RecipeError(
                    f"method.times: {student.times}: a {kind} makes steps on an even grid only (its call has no "
                    f"{', '.join(odd)}); use num_steps and start"
                )
        if any("eta" in call for _, call in samplers.values()) and not takes(pipe, "eta"):
            raise RecipeError(
                f"method.noise: tcd: a {kind} hands its scheduler no eta; use fresh, which is an eta of 1, or ddim, "
                "which is 0"
            )
        if student.noise == "fixed" and student.num_steps > 1 and not takes(pipe, "callback_on_step_end"):
            raise RecipeError(
                f"method.noise: fixed: a {kind} has no callback that could rewind its noise; use fresh or ddim"
            )
        return samplers

    def schedulers(self) -> Samplers:
        """As :attr:`samplers`, as if every pipeline's call took everything.

        Where one configuration of the scheduler does not fit all numbers of steps, calls name the times.
        """
        pipe, student, variants = self.teacher.pipe, self.student, self.student.variants()
        stock, handed = pipe.scheduler, hands_sigmas(pipe)
        scheduler, call = student_scheduler(
            *(stock, student.times, student.noise),
            eta=student.eta,
            handed=handed,
            grids=[one.times for one in variants[1:]],
        )
        if "num_inference_steps" in call and all(meets(scheduler, one.times, handed) for one in variants):
            return {
                one.num_steps: (scheduler, {**call, "num_inference_steps": one.num_steps}) for one in variants
            }
        return {
            one.num_steps: student_scheduler(stock, one.times, one.noise, len(variants) > 1, one.eta, handed)
            for one in variants
        }

    @property
    def scheduler(self) -> Any:
        return self.samplers[self.student.num_steps][0]

    def check_role(self, role: RoleConfig) -> None:
        assert self.samplers

    def sampling(self) -> dict[str, Any]:
        scheduler, call = self.samplers[self.student.num_steps]
        return {
            "timesteps": _numbers(self.student.times),
            "noise": self.student.noise,
            "call": call | self._size(),
            "scheduler": type(scheduler).__name__,
        }

    def particulars(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if len(self.roles) > 1:
            found |= {"experts": list(self.student.roles), "network": self.teacher.network}
        if (classes := num_classes(self.teacher.pipe)) is not None:
            found["num_classes"] = classes
        if isinstance(
            self.student.schedule, Flow
        ):  # the exported scheduler's may be another, which has its times
            found["shift"] = float(self.student.schedule.for_steps(self.student.num_steps).shift)
        if absent := [name for name, part in self.teacher.pipe.components.items() if part is None]:
            found["absent"] = absent
        if len(self.samplers) > 1:
            times = {one.num_steps: one.times for one in self.student.variants()}
            found["steps"] = {
                str(steps): {"timesteps": _numbers(times[steps]), "call": call | self._size()}
                for steps, (_, call) in self.samplers.items()
            }
        if more := self._more():
            found["more_steps"] = more
        return found

    def _more(self, steps: int = 8) -> dict[str, Any]:
        """Of the record: at which times the scheduler has more steps than were trained, and how it is loaded then."""
        scheduler, call = self.samplers[self.student.num_steps]
        alone = "num_inference_steps" in call and self.student.num_steps < steps
        if not alone or len(set(self.student.roles)) > 1 or self.student.noise == "fixed":
            return {}
        options = {}
        if "original_inference_steps" in scheduler.config:
            options = {"original_inference_steps": steps}
            scheduler = type(scheduler).from_config(scheduler.config, **options)
        times = own_times(scheduler, steps, hands_sigmas(self.teacher.pipe))
        return {"steps": steps, "timesteps": _numbers(times), "scheduler": options} if times else {}

    def _size(self) -> dict[str, int]:
        return size_options(self.teacher.pipe, self.teacher.resolution)


def scalars_of(student: Sampler) -> dict[str, Scalar]:
    return getattr(student.denoisers[0], "scalars", {})


def describe(folder: Path, record: Mapping[str, Any]) -> None:
    write_json(folder / "fewstep.json", record)
    write(folder / "README.md", model_card(record))


def tell_measured(folder: Path, measured: Mapping[str, Any]) -> None:
    """Writes the model card of an export anew, with what was measured of it; see :func:`.card.model_card`."""
    record = json.loads((folder / "fewstep.json").read_text())
    write(folder / "README.md", model_card(record, measured))


def _numbers(times: Sequence[float]) -> list[float]:
    """Times of a table as integers, of a flow as they are."""
    return [int(t) if t == int(t) and t != 1 else t for t in times]
