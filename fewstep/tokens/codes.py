"""Autoregressive teachers as denoisers: the maths of tokens that are codes in R^C.

Given the tokens before it, the next one is a random code: a mixture of Diracs with the teacher's probabilities. Noised
on a flow it has an exact posterior mean, so an autoregressive teacher is a :class:`~denoiser.Denoiser` with a
time per token; ODE solvers and score distillation work on it as they are. The prefix enters through a *context*, which
is computed once and serves any number of noise levels (Distilled Decoding, arXiv 2412.17153 and 2510.21003, eq. 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..device import upload
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Guidance
from ..diffusion.kernels import arithmetic
from ..diffusion.schedules import Flow, Schedule, expand, repeated
from ..diffusion.solvers import ode


@dataclass(frozen=True)
class Law:
    """How tokens are drawn from logits: temperature, then the ``top_k`` likeliest (0: all), then the fewest with mass
    ``top_p``."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def log_prob(self, logits: Tensor) -> Tensor:
        """Logarithms of the probabilities (..., V) a token is drawn with, fp32; -inf for those cut off."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered = logits.sort(-1, descending=True).values
            mass = ordered.softmax(-1)
            kept = (mass.cumsum(-1) - mass < self.top_p).sum(-1, keepdim=True)
            logits = logits.masked_fill(logits < ordered.gather(-1, kept - 1), -torch.inf)
        return logits.log_softmax(-1)


def code_posterior(x_t: Tensor, t: Tensor, log_prob: Tensor, codes: Tensor, schedule: Schedule) -> Tensor:
    """``log p(v | x_t)`` up to a constant of each token (DD2, arXiv 2510.21003, eq. 1): (..., V), fp32.

    ``log p_v - |x_t - alpha c_v|^2 / (2 sigma^2)`` without the terms that all codes share, so one product suffices.

    Args:
        x_t: noisy tokens (..., C). t: of each, broadcasts from the left. log_prob: (..., V). codes: (V, C).
    """
    a, s = (expand(c, x_t) for c in (schedule.alpha(t), schedule.sigma(t)))
    distance = a * (x_t @ codes.T) - 0.5 * a.square() * codes.square().sum(-1)
    return log_prob + distance / s.square().clamp(min=1e-12)


def nearest_code(x: Tensor, codes: Tensor) -> Tensor:
    """Index (...) of the code closest to x (..., C), by one product."""
    return (x @ codes.T - 0.5 * codes.square().sum(-1)).argmax(-1)


def likeliest_code(logits: Tensor, codes: Tensor) -> Tensor:
    """Codes (..., C) of the likeliest of logits (..., V), with the gradient of the mean code of their probabilities."""
    mean = logits.softmax(-1) @ codes
    return codes[logits.argmax(-1)] + (mean - mean.detach())


class TokenNetwork(Protocol):
    """An autoregressive network. Group g of ``groups[g]`` tokens is decoded at once, given the groups before.

    ``ramp`` says how much of the guidance each group gets, 1 by default.
    """

    groups: tuple[int, ...]

    def __call__(self, tokens: Tensor, cond: Cond) -> Tensor:
        """Logits (B, n, V); those of a group depend on the groups before it only."""
        ...

    def start(self, cond: Cond, prefix: Tensor | None = None) -> tuple[Tensor, list]:
        """Logits of the first group after the prefix (B, m), and a cache."""
        ...

    def step(self, tokens: Tensor, group: int, cond: Cond, cache: list) -> Tensor:
        """Logits of group ``group + 1`` given the tokens of group ``group``."""
        ...


class CodebookDenoiser:
    """The posterior mean of codes under an autoregressive teacher, as an ordinary denoiser.

    ``context(tokens, cond, guidance=g)`` holds the probabilities of every token given those before it, and
    ``x0(x_t, t, context)`` is exact and differentiable in x_t (B, n, C); t is (B,), or (B, n, 1) with a time per token.

    Args:
        net: see :class:`TokenNetwork`. codes: (V, C) as the decoder sees them. law: how the teacher samples.
        null: one row of the null condition, for guidance. autocast, attention: of contexts, students and critics, see
            :func:`fewstep.diffusion.kernels.arithmetic`; tokens that are decoded are decided in the weights' own dtype.
    """

    prediction = "x0"

    def __init__(
        self,
        net: TokenNetwork,
        codes: Tensor,
        law: Law | None = None,
        null: Cond | None = None,
        autocast: torch.dtype | None = None,
        attention: str = "auto",
    ):
        self.net, self.codes, self.law, self.null = net, codes, law or Law(), null
        self.autocast, self.attention = autocast, attention
        self.schedule = Flow()
        self.ramp = getattr(net, "ramp", (1.0,) * len(net.groups))

    def with_net(self, net, embedded: float = 1.0):
        """Students and critics of an autoregressive teacher are networks of another kind: denoisers themselves, which
        are told no scale."""
        net.autocast, net.attention = self.autocast, self.attention
        return net

    def context(self, clean: Tensor, cond: Cond, *, guidance: float = 1.0) -> Cond:
        """Log-probabilities (B, n, V) of each token given those before it, under the law the teacher samples with.

        Args:
            clean: tokens (B, n) or embeddings (B, n, C). A teacher that reads indices only takes an embedding for its
                nearest code. guidance: acts here.
        """
        reads = clean.ndim == 2 or getattr(self.net, "reads_codes", False)
        tokens = clean if reads else nearest_code(clean, self.codes)
        with torch.no_grad(), arithmetic(tokens.device.type, self.autocast, self.attention):
            scales = [g for g, size in zip(self._scales(guidance), self.net.groups) for _ in range(size)]
            scale = upload(torch.tensor(scales), tokens.device)[:, None]
            if guidance == 1.0:
                logits = self.net(tokens, cond)
            else:
                both = self.net(torch.cat([tokens, tokens]), self._with_null(cond, len(tokens)))
                without, given = both.chunk(2)
                logits = torch.lerp(without, given, scale)
            return Cond({"log_prob": self.law.log_prob(logits)})

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        """``E[code | x_t]``, (B, n, C); ``cond`` is a context, which holds the guidance already."""
        posterior = code_posterior(x_t.float(), t, cond["log_prob"], self.codes, self.schedule)
        return posterior.softmax(-1) @ self.codes

    def tokens(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The likeliest token (B, n) behind x_t; one that was cut off is never chosen."""
        return code_posterior(x_t.float(), t, cond["log_prob"], self.codes, self.schedule).argmax(-1)

    def _scales(self, guidance: float) -> list[float]:
        return [1 + (guidance - 1) * part for part in self.ramp]

    def _with_null(self, cond: Cond, rows: int) -> Cond:
        if self.null is None:
            raise ValueError("guidance needs a null condition, and this teacher has none")
        null = self.null.to(next(iter(cond.tensors.values())).device).expand(rows)
        # The null condition stands in the slots of each text, not in those of its padding.
        kept = {name: cond[name] for name in ("mask",) if name in cond.tensors}
        return Cond.cat(Cond({**null.tensors, **kept}), cond)

    # ------------------------------------------------------------------------------------------------- generation
    @torch.no_grad()
    def decode(
        self,
        rows: int,
        cond: Cond,
        choose: Callable[[Tensor, slice], Tensor],
        *,
        guidance: float = 1.0,
        prefix: Tensor | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Tokens (rows, stop), group by group with a cache of keys and values.

        Args:
            choose: from log-probabilities (rows, m, V) and the group's place to its tokens (rows, m).
            prefix: tokens (rows, k) that are given, whole groups. stop: last token + 1, the end of a group; default n.
        """
        guided = guidance != 1.0
        both = self._with_null(cond, rows) if guided else cond
        double = (lambda tokens: torch.cat([tokens, tokens])) if guided else (lambda tokens: tokens)
        stop = sum(self.net.groups) if stop is None else stop
        tokens = prefix if prefix is not None else torch.empty(rows, 0, dtype=torch.long)
        begin = tokens.shape[1]
        first = _group_at(self.net.groups, begin)
        if begin >= stop:
            return tokens[:, :stop]
        logits, cache = self.net.start(both, double(tokens) if begin else None)
        for group in range(first, len(self.net.groups)):
            if guided:
                without, given = logits.chunk(2)
                logits = torch.lerp(without, given, self._scales(guidance)[group])
            where = slice(begin, begin + self.net.groups[group])
            chosen = choose(self.law.log_prob(logits), where)
            tokens, begin = torch.cat([tokens.to(chosen.device), chosen], 1), where.stop
            if begin >= stop:
                return tokens
            logits = self.net.step(double(chosen), group, both, cache)
        return tokens

    def flow(
        self,
        noise: Tensor,
        cond: Cond,
        *,
        guidance: float = 1.0,
        solver: str = "midpoint",
        steps: int = 10,
        end: float = 0.02,
    ) -> Tensor:
        """The tokens (B, n) that noise (B, n, C) flows to: DD1's map (arXiv 2412.17153, section 3).

        Each token's own noise is carried along the probability-flow ODE of its conditional law to time ``end`` and
        becomes the likeliest code there. Over random noise this samples the teacher; for given noise it is a function.
        """

        def choose(log_prob: Tensor, where: slice) -> Tensor:
            context = Cond({"log_prob": log_prob})
            x = ode(self, noise[:, where], context, steps, solver=solver, end=end)
            return self.tokens(x, repeated(end, x), context)

        return self.decode(len(noise), cond, choose, guidance=guidance)

    def sample(
        self, uniforms: Tensor, cond: Cond, *, guidance: float = 1.0, prefix: Tensor | None = None, stop=None
    ) -> Tensor:
        """Ordinary ancestral sampling, (B, n).

        Args:
            uniforms: (B, n) in [0, 1), what each token is drawn with. prefix, stop: see :meth:`decode`.
        """

        def choose(log_prob: Tensor, where: slice) -> Tensor:
            below = log_prob.exp().cumsum(-1)
            drawn = uniforms[:, where, None].to(below) * below[..., -1:]
            return (below <= drawn).sum(-1).clamp(max=below.shape[-1] - 1)

        return self.decode(len(uniforms), cond, choose, guidance=guidance, prefix=prefix, stop=stop)


def _group_at(groups: tuple[int, ...], begin: int) -> int:
    """Index of the group that begins at a token.

    Raises:
        ValueError: a token inside a group.
    """
    starts = [sum(groups[:g]) for g in range(len(groups) + 1)]
    if begin not in starts:
        raise ValueError(f"token {begin} is no beginning of a group; those are {starts}")
    return starts.index(begin)
