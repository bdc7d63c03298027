"""SiD: score identity distillation (Zhou et al., ICML 2024, arXiv 2404.04057) and its relatives.

The student minimises the Fisher divergence between its diffused law and the teacher's. The estimate needs no data:
two networks, the teacher and a critic trained on what the student makes, and the gradient through both of them.
With guidance on all four evaluations it is SiD-LSG (arXiv 2406.01561), with several steps the uniform mixture of
arXiv 2505.12674, with a GAN on the critic's encoder SiDA (arXiv 2410.14919).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import objectives
from ..cond import Cond
from ..denoiser import Denoiser
from ..discriminator import tap_features
from ..errors import RecipeError
from ..rng import Rng
from ..schedules import EDM, VP, Flow, Schedule, expand
from ..student import Student, check_times, uniform_times
from .base import Batch, Method, Phase, Progress, register

START = 2.5  # sigma / alpha of the first input: EDM's 2.5, t = 625 of Stable Diffusion's table
Kind = Literal["native", "x0", "eps", "v", "flow", "edm"]


# ------------------------------------------------------------------------------------------ shared with its relatives
@dataclass
class TimeLaw:
    """Which times a loss is taken at.

    Attributes:
        kind: "uniform" over a part of the schedule (on EDM: of its rho = 7 grid); "log_normal":
            ``log(sigma / alpha) ~ N(mean, std^2)``, which is EDM's law and, on a flow, the logit-normal one; "auto"
            is the published law of the schedule: uniform 20..980 on VP; on EDM log-normal (-1.2, 1.2) for the critic
            and the noisiest fifth of the grid left out for the student; log-normal (log 2, 1.6) on a flow.
        low, high: of "uniform", as fractions of the schedule. mean, std: of "log_normal".
    """

    kind: Literal["auto", "uniform", "log_normal"] = "auto"
    low: float = 0.02
    high: float = 0.98
    mean: float = 0.0
    std: float = 1.0

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise RecipeError(f"low: {self.low}: expected 0 <= low < high <= 1 (high is {self.high})")
        if not self.std > 0:
            raise RecipeError(f"std: {self.std}: expected a positive number; published ones are 1.2 and 1.6")
        ranged, shaped = (self.low, self.high) != (0.02, 0.98), (self.mean, self.std) != (0.0, 1.0)
        if (ranged and self.kind != "uniform") or (shaped and self.kind != "log_normal"):
            wanted = "uniform, which reads low and high" if ranged else "log_normal, which reads mean and std"
            raise RecipeError(
                f"kind: {self.kind!r}: expected {wanted}; set it, or leave them at their defaults"
            )

    def on(self, schedule: Schedule, critic: bool) -> TimeLaw:
        """Itself, or what "auto" means on a schedule."""
        if self.kind != "auto":
            return self
        if isinstance(schedule, EDM):
            return TimeLaw("log_normal", mean=-1.2, std=1.2) if critic else TimeLaw("uniform", 0.0, 0.8)
        if isinstance(schedule, Flow):
            return TimeLaw("log_normal", mean=math.log(2), std=1.6)
        return TimeLaw("uniform")

    def draw(self, schedule: Schedule, rng: Rng, count: int) -> Tensor:
        """Times (count,), float64; whole numbers on a discrete schedule."""
        if self.kind == "uniform":
            return schedule.draw_times(rng.uniform(count), self.low, self.high)
        log_ratio = self.mean + self.std * rng.normal(count).double()
        t = schedule.t_from_log_snr(-2 * log_ratio).clamp(schedule.t_min, schedule.t_max)
        return t.round() if isinstance(schedule, VP) else t


def student_times(
    schedule: Schedule, num_steps: int, start: float | None = None, times: Sequence[float] | None = None
) -> list[float]:
    """The given times, or equal strides from ``start``, by default sigma / alpha = 2.5 (a flow: its end).

    On a discrete schedule the stride is whole, so that a stock scheduler meets the grid: 625 for one step of Stable
    Diffusion, 623, 467, 311, 155 for four (the paper's 625, 468, 312, 156 has no such stride; give it as ``times``).

    Raises:
        RecipeError: start or times do not fit the schedule.
    """
    if times is None and start is None:
        level = schedule.t_from_log_snr(torch.tensor(-2 * math.log(START), dtype=torch.float64)).item()
        start = schedule.t_max if isinstance(schedule, Flow) else min(level, schedule.t_max)
        if isinstance(schedule, VP):
            start = max(1, round((start + 1) / num_steps)) * num_steps - 1
            start = start if start <= schedule.t_max else start - num_steps
    try:
        if times is None and isinstance(schedule, VP):
            times = uniform_times(num_steps, start)
        elif times is None:
            times = [
                schedule.t_min + (start - schedule.t_min) * (1 - k / num_steps) for k in range(num_steps)
            ]
            times[0] = start
        check_times(times, schedule)
    except RecipeError as error:
        raise RecipeError(f"method.{'start' if start is not None else 'times'}: {error}") from None
    return list(times)


def through_networks(
    make: Callable[[], Tensor],
    noised: Callable[[Tensor], Tensor],
    networks: Sequence[Callable[[Tensor], Tensor]],
    loss: Callable[..., Tensor],
    lean: bool,
) -> Tensor:
    """``loss(x0, *[network(noised(x0)) for network in networks])`` with the gradient through everything.

    Lean holds the activations of one network at a time: values first, then the loss as a function of them, one
    vector-Jacobian product per network, and the student's own forward again. The same gradient for one more forward
    of each. A sample whose gradient is not finite is left out.

    Args:
        make: the student's x0 (B, ...), the same at every call. noised: x0 -> x_t. networks: x_t -> (B, ...).
    """

    def clean(gradient: Tensor) -> Tensor:
        return torch.where(expand(objectives.finite_rows(gradient), gradient).bool(), gradient, 0.0)

    if not lean:
        x0 = make()
        if x0.requires_grad:
            x0.register_hook(clean)
        x_t = noised(x0)
        return loss(x0, *(network(x_t) for network in networks))
    with torch.no_grad():
        x0 = make()
        outputs = [network(noised(x0)) for network in networks]
    leaves = [value.detach().requires_grad_() for value in (x0, *outputs)]
    with torch.enable_grad():
        value = loss(*leaves)
        gradient, *cotangents = torch.autograd.grad(value, leaves)
        for network, cotangent in zip(networks, cotangents):
            leaf = x0.detach().requires_grad_()
            gradient = gradient + torch.autograd.grad(network(noised(leaf)), leaf, cotangent)[0]
    made = make()
    finite = torch.where(expand(objectives.finite_rows(made), made).bool(), made, 0.0)
    return value.detach() + ((finite - finite.detach()) * clean(gradient)).sum()


def exit_step(batch: Batch, student: Student) -> int:
    """The step that is trained, drawn once per iteration: the same on all ranks, for critic and student."""
    if "exit" not in batch.carry:
        batch.carry["exit"] = torch.tensor(batch.shared.integer(student.num_steps))
    return int(batch.carry["exit"])


def made_by(student: Student, batch: Batch) -> Callable[[], Tensor]:
    """What the student makes of fresh noise in the step of this iteration; earlier steps carry no gradient."""
    step = exit_step(batch, student)
    x = student.inputs(batch.rng.normal(*batch.shape), batch.cond, batch.rng.normal_like, step)
    return lambda: student.x0(x, step, batch.cond)


def error_weight(critic: Denoiser, kind: Kind, t: Tensor) -> Tensor:
    """Weight (B,) of the critic's squared x0 error; "edm" is EDM's lambda with a data spread of 0.5."""
    if kind == "edm":
        ratio = critic.schedule.sigma(t) / critic.schedule.alpha(t)
        return (ratio**2 + 0.25) / (0.5 * ratio) ** 2
    if kind == "native":
        kind = getattr(critic, "prediction", "x0")
    return critic.schedule.error_weight(kind, t)


def critic_denoising(
    critic: Denoiser, kind: Kind, x0: Tensor, x_t: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0
) -> Tensor:
    """Regression of the (guided) critic on samples of the student; samples that are not finite are left out."""
    keep = objectives.finite_rows(x0)
    x0, x_t = (torch.where(expand(keep, v).bool(), v, 0.0) for v in (x0, x_t))
    weight = error_weight(critic, kind, t) * keep
    return objectives.denoising(critic.x0(x_t, t, cond, guidance=guidance), x0, weight)


def drop_captions(cond: Cond, null: Cond | None, rng: Rng, rate: float) -> Cond:
    """Each row replaced by the null condition with this probability."""
    if null is None or not len(cond) or rate == 0:
        return cond
    dropped, null = rng.uniform(len(cond)) < rate, null.expand(len(cond))
    return Cond(
        {
            name: torch.where(expand(dropped, value).bool(), null[name].to(value), value)
            for name, value in cond.tensors.items()
        }
    )


# -------------------------------------------------------------------------------------------------------- the method
@register("sid")
class SiD(Method):
    """Score identity distillation: critic and student in turn, the critic first."""

    summary = "score identity: Fisher divergence by a critic, gradient through both networks, data-free"
    networks = ("student", "critic")

    @dataclass
    class Config:
        """Options; the paper's values are the defaults where there is one for all its experiments.

        The losses are means over pixels where published code sums, so weights of terms are relative to a mean. Both
        turns of an iteration share its conditions; noise, times and rollouts of the student's turn are drawn anew.

        Attributes:
            num_steps, start, times: of the student, see :func:`student_times`. noise: between its steps.
            alpha: 1 or 1.2 as published; 0.5 is the exact gradient of the Fisher divergence.
            weight: see :func:`fewstep.objectives.identity_weight`; "auto" is "1-sigma" on a flow and else "l1".
            guidance: which of the four scales is what. "long_short" (SiD-LSG): all are ``guidance_scale``.
                "teacher_only": the teacher's is. "zero_cfg": a plain teacher and an unconditional critic (1, and 0
                three times). "anti_cfg": a plain teacher and a critic trained plainly and used with the scale
                ``-guidance_scale``. The last two (arXiv 2505.12674) leave alignment with the text to the GAN.
            guidance_scale: g of ``u + g (c - u)``.
            kappa1, kappa2, kappa3, kappa4: override single scales: critic in training, critic in its two places of
                the loss, teacher. kappa1 and kappa2 should be equal, or the critic used is no posterior mean.
            caption_dropout: of the critic's turn, where kappa1 or kappa2 is not 1.
            generator_times, critic_times: see :class:`TimeLaw`; they are two laws on pixels, one on latents.
            critic_loss: prediction whose squared error the critic minimises; "edm" is EDM's weight.
            critic_steps: iterations, each with one critic update, per student update.
            lean: hold one network's activations at a time in the student's turn; same gradient, one more forward each.
            gan_weight: of the adversarial term beside the identity's, 0 for none. SiDA: 0.01 to 100, so 1e-4.
            discriminator_weight: of its loss beside the critic's sum over pixels (SiDA 1, on EDM2 100).
            tap: block of the critic whose features, averaged over channels, are the logits; no further weights.
            gan_schedule: images seen when the student starts to learn, and when the GAN joins, half and half.
        """

        num_steps: int = 1
        start: float | None = None
        times: list[float] | None = None
        noise: Literal["fresh", "fixed", "ddim"] = "fresh"
        alpha: float = 1.0
        weight: Literal[
            "auto",
            "l1",
            "one",
            "1-sigma",
            "(1-sigma)^2",
            "1/sigma",
            "1/sigma^2",
            "alpha/sigma",
            "(alpha/sigma)^2",
        ] = "auto"
        guidance: Literal["long_short", "teacher_only", "zero_cfg", "anti_cfg"] = "long_short"
        guidance_scale: float = 1.0
        kappa1: float | None = None
        kappa2: float | None = None
        kappa3: float | None = None
        kappa4: float | None = None
        caption_dropout: float = 0.1
        generator_times: TimeLaw = field(default_factory=TimeLaw)
        critic_times: TimeLaw = field(default_factory=TimeLaw)
        critic_loss: Kind = "native"
        critic_steps: int = 1
        lean: bool = False
        gan_weight: float = 0.0
        discriminator_weight: float = 1.0
        tap: str = "mid_block"
        gan_schedule: tuple[int, int] = (100_000, 200_000)

        def __post_init__(self):
            checks = {
                "num_steps": (self.num_steps >= 1, "at least 1"),
                "critic_steps": (self.critic_steps >= 1, "at least 1; published runs have 1"),
                "alpha": (math.isfinite(self.alpha), "a number; 1 and 1.2 are the published ones"),
                "caption_dropout": (0 <= self.caption_dropout < 1, "0 <= rate < 1; published is 0.1"),
                "gan_weight": (self.gan_weight >= 0, "0 or more; 0 is data-free, 1e-4 is SiDA's"),
                "discriminator_weight": (self.discriminator_weight > 0, "a positive number; SiDA has 1"),
                "gan_schedule": (
                    0 <= self.gan_schedule[0] <= self.gan_schedule[1],
                    "0 <= first <= second; SiDA has 100000, 200000",
                ),
                "guidance_scale": (
                    self.guidance != "zero_cfg" or self.guidance_scale == 1.0,
                    "1 with guidance zero_cfg, which reads no scale; drop it or choose another guidance",
                ),
            }
            for name, (fine, expected) in checks.items():
                if not fine:
                    raise RecipeError(f"method.{name}: {getattr(self, name)}: expected {expected}")

        @property
        def kappas(self) -> tuple[float, float, float, float]:
            g = self.guidance_scale
            preset = {
                "long_short": (g, g, g, g),
                "teacher_only": (1.0, 1.0, 1.0, g),
                "zero_cfg": (0.0, 0.0, 0.0, 1.0),
                "anti_cfg": (1.0, -g, -g, 1.0),
            }[self.guidance]
            given = (self.kappa1, self.kappa2, self.kappa3, self.kappa4)
            return tuple(k if own is None else own for k, own in zip(preset, given))

    def __init__(
        self,
        config: SiD.Config,
        teacher: Denoiser,
        latent_shape: Sequence[int],
        *,
        student: Denoiser,
        critic: Denoiser,
    ):
        self.config, self.teacher, self.critic = config, teacher, critic
        schedule = critic.schedule
        times = student_times(schedule, config.num_steps, config.start, config.times)
        self.student = Student(student, times, config.noise)
        self.kappas = config.kappas
        self.weight = config.weight
        if self.weight == "auto":
            self.weight = "1-sigma" if isinstance(schedule, Flow) else "l1"
        self.generator_times = config.generator_times.on(schedule, critic=False)
        self.critic_times = config.critic_times.on(schedule, critic=True)
        self.pixels = math.prod(latent_shape)
        for i, (kappa, view) in enumerate(zip(self.kappas, (critic, critic, critic, teacher)), 1):
            if kappa != 1 and getattr(view, "null", None) is None:
                raise RecipeError(
                    f"method.kappa{i}: {kappa:g}: expected 1, because this teacher has no null condition to guide "
                    "with; leave guidance_scale at 1"
                )
        if config.gan_weight > 0:
            blocks = dict(critic.net.named_modules()) if hasattr(critic, "net") else {}
            if config.tap not in blocks:
                known = ", ".join(n for n in blocks if n and "." not in n)
                raise RecipeError(
                    f"method.tap: {config.tap!r}: expected a block of the network, e.g. {known}"
                )

    @classmethod
    def needs(cls, config: SiD.Config) -> tuple[str, ...]:
        return ("prompts", "images") if config.gan_weight > 0 else ("prompts",)

    def phases(self) -> list[Phase]:
        # With a GAN, critic and discriminator warm up first.
        first = self.config.gan_schedule[0] if self.config.gan_weight > 0 else 0
        return [
            Phase("critic", ("critic",), self.critic_loss),
            Phase(
                "generator",
                ("student",),
                self.generator_loss,
                every=self.config.critic_steps,
                when=lambda progress: progress.images >= first,
            ),
        ]

    # ------------------------------------------------------------------------------------------------- losses
    def critic_loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        with torch.no_grad():
            x0 = made_by(self.student, batch)()
        schedule, kappa1, kappa2 = self.critic.schedule, *self.kappas[:2]
        t, eps = self.critic_times.draw(schedule, batch.rng, len(x0)), batch.rng.normal_like(x0)
        x_t, cond = schedule.add_noise(x0, eps, t), batch.cond
        if kappa1 != 1 or kappa2 != 1:
            cond = drop_captions(cond, self.critic.null, batch.rng, self.config.caption_dropout)
        kind = self.config.critic_loss
        losses = {"denoising": critic_denoising(self.critic, kind, x0, x_t, t, cond, kappa1)}
        if self.config.gan_weight > 0:
            # The same noise and time on both sides, each with its own captions, in one forward.
            both = torch.cat([schedule.add_noise(batch.real, eps, t), x_t])
            logits = self.logits(both, torch.cat([t, t]), Cond.cat(batch.real_cond, batch.cond))
            keep = objectives.finite_rows(x0)
            losses["discriminator"] = self.discrimination(*logits.chunk(2), t, keep)
        return losses

    def discrimination(self, real: Tensor, fake: Tensor, t: Tensor, keep: Tensor) -> Tensor:
        """Half of both cross-entropies, logits (B, n); SiDA weighs them as it does the critic's error on EDM."""
        both = (F.softplus(fake) + F.softplus(-real)).mean(1) / 2
        edm = self.config.critic_loss == "edm"
        weight = error_weight(self.critic, "edm", t) if edm else torch.ones_like(both)
        both = torch.where(keep, both, 0.0) * weight.to(both)
        return self.config.discriminator_weight / self.pixels * both.mean()

    def generator_loss(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        config, schedule, cond = self.config, self.teacher.schedule, batch.cond
        make = made_by(self.student, batch)
        t = self.generator_times.draw(schedule, batch.rng, batch.shape[0])
        eps = batch.rng.normal(*batch.shape)
        _, kappa2, kappa3, kappa4 = self.kappas
        # No no_grad here: weights are frozen, but the gradient passes through both networks. Without it the value
        # stays and the method silently becomes distribution matching.
        networks = [
            lambda x_t: self.teacher.x0(x_t, t, cond, guidance=kappa4),
            lambda x_t: self.critic.x0(x_t, t, cond, guidance=kappa2),
        ]
        if kappa3 != kappa2:
            networks.append(lambda x_t: self.critic.x0(x_t, t, cond, guidance=kappa3))
        adversarial = config.gan_weight > 0 and progress.images >= config.gan_schedule[1]
        if adversarial:
            networks.append(lambda x_t: self.logits(x_t, t, cond))

        def loss(x0: Tensor, real: Tensor, fake: Tensor, *others: Tensor) -> Tensor:
            batch.note_health(x0, real, fake)
            weight = objectives.identity_weight(self.weight, x0, real, schedule, t)
            subtracted = others[0] if kappa3 != kappa2 else None
            identity = objectives.score_identity(x0, real, fake, weight, config.alpha, subtracted)
            if not adversarial:
                return identity
            fooled = F.softplus(-others[-1].clamp(-10, 10)).mean(1)
            keep = objectives.finite_rows(x0, real, fake)
            gan = torch.where(keep, weight, 0.0) * torch.where(keep, fooled, 0.0)
            batch.log |= {"identity": identity.detach(), "gan": gan.mean().detach()}
            return 0.5 * identity + 0.5 * config.gan_weight * gan.mean()

        noised = lambda x0: schedule.add_noise(x0, eps, t)  # noqa: E731
        return {"sid": through_networks(make, noised, networks, loss, config.lean)}

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Logits (B, n): the map of the critic's features, averaged over channels."""
        (features,) = tap_features(self.critic, [self.config.tap], x_t, t, cond)
        return features.mean(1 if features.ndim == 4 else -1).flatten(1)
