"""Sampling in EDM's parametrisation, in diffusers' style: x = x0 + sigma eps, and a network that predicts x0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...device import real
from ...diffusion.few_steps import jump
from ...errors import FewstepError

SOLVERS = ("heun", "euler", "dpm++", "fresh")


class EDMSchedulerOutput(BaseOutput):
    """``prev_sample``: what the network is given next, shape of the sample."""

    prev_sample: Tensor


class EDMScheduler(SchedulerMixin, ConfigMixin):
    """Teachers' solvers, and the steps of their students.

    Args:
        sigma_min, sigma_max, rho: EDM's grid (arXiv 2206.00364, eq. 5); a last step leads to the clean image.
        solver: "heun" (algorithm 1 without churn: two calls a step, one in the last), "euler" (which is DDIM), "dpm++"
            (DPM-Solver++(2M)), or "fresh": each step's prediction, noised anew to the next level.
        sigmas: of a student, the levels of each of its numbers of steps.
        prediction_type: "sample", there is no other.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        solver: str = "heun",
        sigmas: Sequence[Sequence[float]] | None = None,
        prediction_type: str = "sample",
    ):
        if solver not in SOLVERS:
            raise FewstepError(f"EDMScheduler: solver {solver!r}: expected one of {', '.join(SOLVERS)}")
        self.set_timesteps(self.default_steps)

    @property
    def default_steps(self) -> int:
        """Steps where nobody says how many: of a student's first grid, and 18 of a teacher."""
        return len(self.config.sigmas[0]) if self.config.sigmas else 18

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied with to begin."""
        return float(self.sigmas[0])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Levels of so many steps: a student's own where it has them, else EDM's grid; or these, falling, above 0.

        Raises:
            ValueError: no step, or so many as a student was not trained for; levels that do not fall, or not above 0.
        """
        config = self.config
        if sigmas is not None:
            levels = torch.tensor(sigmas, dtype=torch.float64)
            above = ((levels > 0) & levels.isfinite()).all()
            if not len(levels) or not bool(above) or not bool((levels.diff() < 0).all()):
                raise ValueError(f"sigmas {list(sigmas)}: expected at least one, falling, finite and above 0")
        elif num_inference_steps is None or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps {num_inference_steps}: expected 1 or more, or sigmas")
        elif config.sigmas:
            known = {len(levels): levels for levels in config.sigmas}
            if num_inference_steps not in known:
                raise ValueError(
                    f"{num_inference_steps} steps: this student has {', '.join(map(str, known))}"
                )
            levels = torch.tensor(known[num_inference_steps], dtype=torch.float64)
        else:
            ends = (config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho))
            levels = torch.linspace(*ends, num_inference_steps, dtype=torch.float64) ** config.rho
        self.sigmas = torch.cat([levels, levels.new_zeros(1)])
        twice = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])
        self.timesteps = (twice if config.solver == "heun" else levels).to(device or "cpu")
        self.num_inference_steps, self._call = len(levels), 0
        self._before: tuple[Tensor, Tensor] | None = (
            None  # of the call before: sample and slope, or prediction
        )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EDMSchedulerOutput | tuple[Tensor]:
        """From one call of the network to the input of the next; calls come in the order of ``timesteps``.

        Args:
            model_output: x0 (B, C, H, W). timestep: not read. sample: the call's input. generator: of fresh noise.
        """
        exact = real(sample.device)
        x, x0 = sample.to(exact), model_output.to(exact)
        made = self._heun(x, x0) if self.config.solver == "heun" else self._single(x, x0, generator)
        self._call += 1
        made = made.to(sample.dtype)
        return EDMSchedulerOutput(prev_sample=made) if return_dict else (made,)

    def _heun(self, x: Tensor, x0: Tensor) -> Tensor:
        """Calls are: a slope at the first level, then at each one a corrected slope and a slope of its own."""
        k, corrects = (self._call + 1) // 2, self._call % 2 == 1
        sigmas = self.sigmas.tolist()
        slope = (x - x0) / sigmas[k]
        if corrects:
            assert self._before is not None
            start, first = self._before
            return start + (sigmas[k] - sigmas[k - 1]) * (first + slope) / 2
        self._before = x, slope
        return x + (sigmas[k + 1] - sigmas[k]) * slope

    def _single(self, x: Tensor, x0: Tensor, generator: Any) -> Tensor:
        k = self._call
        now, then = self.sigmas[k].item(), self.sigmas[k + 1].item()
        if self.config.solver == "fresh":
            noise = randn_tensor(x.shape, generator, x.device, torch.float32) if then else 0.0
            return x0 + then * noise
        second = self.config.solver == "dpm++" and k > 0 and then > 0
        a, b, c = jump((1.0, self.sigmas[k - 1].item()) if second else None, (1.0, now), (1.0, then))
        made = a * x + b * x0 + (c * self._before[1] if second and self._before else 0)
        self._before = x, x0
        return made
