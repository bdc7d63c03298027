"""Teachers whose score is known in closed form: the ground truth of every test, and toys one can think with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.denoiser import Guidance
from ..diffusion.rng import Rng
from ..diffusion.schedules import Schedule, expand


class GaussianMixture:
    """Mixture of K Gaussians with diagonal covariance in D dimensions, optionally conditional.

    Args:
        schedule: noise path. means: (K, D). variances: (K, D) or broadcastable.
        weights: (K,) for an unconditional mixture, or (L, K): row l holds the weights given ``cond["label"] == l``.
            The null condition is the mean of the rows, i.e. labels are uniform. Default: equal weights.

    K = 1 is a Gaussian.
    """

    def __init__(self, schedule: Schedule, means: Tensor, variances: Tensor, weights: Tensor | None = None):
        self.schedule, self.means = schedule, means
        self.variances = torch.as_tensor(variances, dtype=means.dtype).expand_as(means)
        uniform = torch.full((len(means),), 1 / len(means), dtype=means.dtype)
        self.weights = torch.as_tensor(uniform if weights is None else weights, dtype=means.dtype)
        self.null = Cond({"label": torch.tensor([-1])}) if self.weights.ndim == 2 else None
        self.example = self.null or Cond({})

    @classmethod
    def ring(
        cls, schedule: Schedule, modes: int = 8, radius: float = 1.0, std: float = 0.1
    ) -> GaussianMixture:
        """Equal Gaussians on a circle, the usual two-dimensional toy."""
        angle = torch.arange(modes) * (2 * math.pi / modes)
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        return cls(schedule, means, torch.tensor(std**2))

    def _log_weights(self, cond: Cond | None, rows: int, null: bool) -> Tensor:
        if self.weights.ndim == 1:
            return self.weights.log().expand(rows, -1)
        labels = torch.full((rows,), -1, device=self.weights.device) if null else cond["label"]
        table = torch.cat(
            [self.weights, self.weights.mean(0, keepdim=True)]
        )  # label -1 is the null condition
        return table[labels].log()

    def _components(self, x_t: Tensor, t: Tensor, cond: Cond | None, null: bool) -> tuple[Tensor, Tensor]:
        """Log joint (B, K) of component and x_t, and posterior means (B, K, D) of x0 given both."""
        a, s = (expand(c, x_t)[:, None] for c in (self.schedule.alpha(t), self.schedule.sigma(t)))
        means, variances = self.means.to(x_t), self.variances.to(x_t)
        total = a**2 * variances + s**2
        offset = x_t[:, None] - a * means
        log_density = -0.5 * (offset**2 / total + total.log() + math.log(2 * math.pi)).sum(-1)
        posterior = means + a * variances / total * offset
        return self._log_weights(cond, len(x_t), null).to(x_t) + log_density, posterior

    def _x0(self, x_t: Tensor, t: Tensor, cond: Cond | None, null: bool) -> Tensor:
        log_joint, posterior = self._components(x_t, t, cond, null)
        return (log_joint.softmax(-1)[..., None] * posterior).sum(1)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        """Exact posterior mean, (B, D), differentiable in x_t."""
        conditional = self._x0(x_t, t, cond, null=False)
        if not isinstance(guidance, Tensor) and guidance == 1.0:
            return conditional
        weight = expand(guidance, x_t) if isinstance(guidance, Tensor) else guidance
        return torch.lerp(self._x0(x_t, t, cond, null=True), conditional, weight)

    def log_prob(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """``log p_t(x_t | cond)``, (B,)."""
        return self._components(x_t, t, cond, null=False)[0].logsumexp(-1)

    def sample(self, count: int, rng: Rng, cond: Cond | None = None) -> Tensor:
        """Clean samples (count, D)."""
        weights = self._log_weights(cond, count, null=False).exp()
        chosen = torch.multinomial(weights, 1, generator=rng.generator)[:, 0]
        return self.means[chosen] + self.variances[chosen].sqrt() * rng.normal(count, self.means.shape[1])


class KnownJoint:
    """A known joint law of n tokens, as an autoregressive network: every conditional is a sum over a table.

    Args:
        joint: probabilities (V, ..., V) with one axis per token. It has no condition: ``Cond({})`` will do.
    """

    def __init__(self, joint: Tensor):
        self.joint = joint / joint.sum()
        self.groups = (1,) * joint.ndim

    @classmethod
    def random(cls, tokens: int, codes: int, rng: Rng, sharpness: float = 2.0) -> KnownJoint:
        """Random logits: the larger the sharpness, the more a token says about the others."""
        return cls((sharpness * rng.normal(*[codes] * tokens)).flatten().softmax(0).view(*[codes] * tokens))

    def marginal(self, tokens: int) -> Tensor:
        """Of the first tokens, (V, ..., V)."""
        later = tuple(range(tokens, self.joint.ndim))
        return self.joint.sum(later) if later else self.joint

    def __call__(self, tokens: Tensor, cond: Cond) -> Tensor:
        """Logits (B, n, V)."""
        return torch.stack([self._next(tokens[:, :i]) for i in range(self.joint.ndim)], 1)

    def _next(self, prefix: Tensor) -> Tensor:
        marginal = self.marginal(prefix.shape[1] + 1)
        rows = marginal[tuple(prefix.T)] if prefix.shape[1] else marginal.expand(len(prefix), -1)
        return rows.clamp(min=1e-30).log()

    def start(self, cond: Cond, prefix: Tensor | None = None) -> tuple[Tensor, list]:
        # Without a condition nothing says how many rows there are; one broadcasts.
        prefix = self.joint.new_empty(1, 0, dtype=torch.long) if prefix is None else prefix
        return self._next(prefix)[:, None], [prefix]

    def step(self, tokens: Tensor, group: int, cond: Cond, cache: list) -> Tensor:
        cache[0] = torch.cat([cache[0].expand(len(tokens), -1), tokens], 1)
        return self._next(cache[0])[:, None]

    def frequencies(self, tokens: Tensor) -> Tensor:
        """How often each cell occurs among tokens (N, n), as the joint is laid out."""
        sizes = self.joint.shape
        flat = torch.zeros(len(tokens), dtype=torch.long)
        for i, size in enumerate(sizes):
            flat = flat * size + tokens[:, i]
        return flat.bincount(minlength=self.joint.numel()).view(sizes) / len(tokens)

    def total_variation(self, tokens: Tensor) -> float:
        """Half the L1 distance between the frequencies of tokens (N, n) and the joint."""
        return 0.5 * (self.frequencies(tokens) - self.joint).abs().sum().item()
