"""A SANA student that is told its guidance, as the stock ``SanaSprintPipeline`` samples it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..configs import RoleConfig
from ..diffusion.student import Sampler
from ..errors import RecipeError
from ..teachers.base import Teacher
from .target import Edition, Samplers, Stock, Weights, scalars_of
from .weights import save_network


class Sprint(Stock):
    """A pipeline of another class than the teacher's, with an embedding of the guidance and a scheduler of its own."""

    keeps_class = False

    @classmethod
    def fits(cls, teacher: Teacher, student: Sampler, role: RoleConfig) -> bool:
        return teacher.pipeline_class == "SanaPipeline" and "guidance" in scalars_of(student)

    def check_role(self, role: RoleConfig) -> None:
        super().check_role(role)
        if role.kind != "full":
            raise RecipeError(
                f"roles.student.kind: {role.kind}: SanaSprintPipeline, whose network is told the guidance, is exported "
                "whole; use full"
            )
        teacher = self.teacher
        scale = teacher.net.config.get("timestep_scale", 1.0) * teacher.denoiser.schedule.time_scale
        if abs(scale - 1) > 1e-6:
            raise RecipeError(
                f"teacher.path: {teacher.source}: its network sees t in [0, {scale:g}], and SanaSprintPipeline gives "
                "it t in [0, 1]; prepare the teacher first (fewstep prepare), or set method.guidance_embedding false"
            )

    def schedulers(self) -> Samplers:
        guidance = self.told["guidance"].default
        return {one.num_steps: scm_scheduler(one.times, guidance) for one in self.student.variants()}

    def save(self, folder: Path, weights: Weights, edition: Edition) -> None:
        self.scheduler.save_pretrained(folder / "scheduler")
        (tensors,) = weights.values()
        scale = self.told["guidance"].scale
        save_sprint(self.teacher, tensors, scale, self.scheduler, edition.precision, folder / "pipeline")


def scm_scheduler(times: list[float], guidance: float):
    """``SCMScheduler`` and the call of ``SanaSprintPipeline`` at the times (K,) of a flow.

    The scheduler has TrigFlow's angles. It takes ``intermediate_timesteps`` with two steps only, and spreads others
    evenly from the first angle down; a list of its own (``timesteps``) the pipeline's call cannot hand on to it.

    Raises:
        RecipeError: a first time other than pi/2, or three steps or more that are not even in the angle.
    """
    from diffusers import SCMScheduler

    if times[0] != 1:
        raise RecipeError(
            f"method.angles: a first time of {math.atan2(times[0], 1 - times[0]):.4f}: SanaSprintPipeline would shrink "
            "the noise it starts from; begin at pi/2, or set method.guidance_embedding false"
        )
    first, *rest = (math.atan2(t, 1 - t) for t in times)
    even = [first * (1 - k / len(times)) for k in range(1, len(times))]
    if len(times) > 2 and max(abs(a - b) for a, b in zip(rest, even)) > 1e-6:
        raise RecipeError(
            f"method.angles: {[round(a, 4) for a in (first, *rest)]}: SanaSprintPipeline takes more than two steps on "
            f"an even grid only, {[round(a, 4) for a in (first, *even)]}; use that, or set method.guidance_embedding "
            "false"
        )
    call = {
        "num_inference_steps": len(times),
        "max_timesteps": first,
        "intermediate_timesteps": rest[0] if len(rest) == 1 else None,
        "guidance_scale": guidance,
    }
    return SCMScheduler(), call


def save_sprint(
    teacher: Teacher, weights: Mapping[str, Tensor], scale: float, scheduler, dtype: torch.dtype, folder: Path
) -> None:
    """A SANA student that is told its guidance, times ``scale``, as the stock ``SanaSprintPipeline`` has it."""
    from diffusers import SanaSprintPipeline, SanaTransformer2DModel

    names = {
        "guidance_embedding.embedder.": "time_embed.guidance_embedder.",
        "time_embed.emb.": "time_embed.",
    }
    renamed = {}
    for name, value in weights.items():
        old = next((prefix for prefix in names if name.startswith(prefix)), "")
        renamed[names.get(old, "") + name[len(old) :]] = value.float()
    net = SanaTransformer2DModel.from_config(
        {**teacher.net.config, "guidance_embeds": True, "guidance_embeds_scale": scale}
    )
    net.load_state_dict({**net.state_dict(), **renamed})
    save_network(teacher, net.to(dtype), scheduler, folder, SanaSprintPipeline)
