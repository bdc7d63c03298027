"""DD1: Distilled Decoding of autoregressive image models (Liu et al., ICLR 2025, arXiv 2412.17153).

Ancestral sampling in one step is possible only if something says which of the teacher's samples is meant. DD1 lets
noise say it: each token's own noise flows to a code under the teacher's conditional law
(:meth:`CodebookDenoiser.flow`), so a noise sequence determines a token sequence, and the student learns
that map from pairs. Further entry points, where the first tokens are known, make two steps and more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds import Count0, Least0, Share
from ..device import upload
from ..diffusion.schedules import expand
from ..errors import RecipeError
from ..tokens.codes import CodebookDenoiser, likeliest_code
from ..tokens.entries import EntryStudent
from .base import Batch, Expected, Method, Options, Phase, Progress, register

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..tokens.students import ParallelStudent


@register("dd1")
class DD1(Method):
    """Regression on the teacher's map from noise to tokens: cross-entropy, and embeddings or images."""

    summary = "autoregressive teachers: regression on a noise-to-token map; one or few steps"
    papers = ("2412.17153",)
    steps = "1 or 2"
    exports = "pipeline of tokens"
    extras = ()
    teacher_kind = "autoregressive"
    student: EntryStudent

    @dataclass
    class Config(Options):
        """Neither paper nor code gives the loss weights; those are ours, as is what is marked *.

        Attributes:
            entries: tokens at which a step begins: the first is 0, one per step (published: {0, 80} of 256 for
                LlamaGen, {0, 55} of 680, i.e. scale 5, for VAR-d16, {0, 30} for d20 and d24).
            split: tokens that the logits decide; the continuous head makes the rest (published: 80 for LlamaGen-B, 130
                for L; 55 for VAR-d16, 30 for d20 and d24).
            guidance_scale: of the teacher, ``u + g (c - u)``; pairs must have been made with the same.
            entry_shares: of the samples, one for each entry, which add up to 1; null is equal shares.
            own_share: of the samples of later entries, those whose known tokens are what the student's own earlier
                steps make of the noise, mistakes included, as in sampling; 0 gives the pair's, as in the paper*.
            ce_weight, embedding_weight, image_weight: of the logits' cross-entropy, over all unknown tokens; of the
                continuous head's mean squared error, over those that it makes (none where ``split`` covers all); and of
                the distance of decoded images, of codes before ``split`` and of the head's embeddings after it.
            regression: that distance: "features" of an offline extractor, or "lpips" (published), whose weights must be
                on disk. "l2" decodes nothing.
        """

        entries: list[Count0] = field(default_factory=lambda: [0])
        split: Count0 = 80
        guidance_scale: Least0 = 1.0
        entry_shares: list[Share] | None = None
        own_share: Share = 0.0
        ce_weight: Least0 = 1.0
        embedding_weight: Least0 = 1.0
        image_weight: Least0 = 1.0
        regression: Literal["l2", "features", "lpips"] = "l2"

        def expected(self) -> Expected:
            shares = self.entry_shares or []
            rising = all(a < b for a, b in zip(self.entries, self.entries[1:]))
            return {
                "entries": (
                    bool(self.entries) and self.entries[0] == 0 and rising,
                    "0 and then rising token numbers",
                ),
                "entry_shares": (
                    self.entry_shares is None
                    or (len(shares) == len(self.entries) and math.isclose(sum(shares), 1, abs_tol=1e-6)),
                    f"one for each of {len(self.entries)} entries, which add up to 1",
                ),
            }

        def smoke(self) -> Self:
            return replace(self, regression="features" if self.regression == "lpips" else self.regression)

        @classmethod
        def toy(cls) -> Self:
            return cls(entries=[0, 2], split=2)

    config: Config
    teacher: CodebookDenoiser

    def build(self, student: ParallelStudent) -> None:
        config, teacher, self.net = self.config, self.teacher, student
        starts = [sum(teacher.net.groups[:g]) for g in range(len(teacher.net.groups))]
        for entry in config.entries:
            if entry not in starts:
                raise RecipeError(
                    f"method.entries: {entry}: expected the first token of a group this teacher decodes at once, one "
                    f"of {starts if len(starts) < 20 else f'0 to {starts[-1]}'}"
                )
        self.student = EntryStudent(student, config.entries, self.latent_shape[0])

    @classmethod
    def network(cls, config: DD1.Config, teacher, name: str) -> nn.Module:
        from ..tokens.students import ParallelStudent

        return ParallelStudent.of(teacher.net, teacher.denoiser.codes, config.split)

    @classmethod
    def needs(cls, config: DD1.Config) -> tuple[str, ...]:
        return ("prompts", "pairs")

    @classmethod
    def wants(cls, config: Config) -> tuple[str, ...]:
        return ("distance",)

    def phases(self) -> list[Phase]:
        return [Phase("student", ("student",), self.loss)]

    def loss(self, batch: Batch, _progress: Progress) -> dict[str, Tensor]:
        """One entry point per sample: tokens before it are known, the others come from their noise."""
        c, (noise, tokens) = self.config, batch.pairs
        q = self.teacher.codes[tokens]
        chosen = self._entries(batch, len(q))
        t = self.student.times_from(upload(torch.tensor(c.entries), q.device)[chosen][:, None])
        given = self._known(q, noise, chosen, batch)
        logits, embedded = self.net(self.teacher.schedule.add_noise(given, noise, t), t, batch.pair_cond)
        unknown = t[..., 0].to(q.dtype)

        def mean(values: Tensor, where: Tensor) -> Tensor:  # (B, n), over the tokens that are to be found
            return (values * where).sum() / where.sum()

        ce = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(unknown)
        losses = {"ce": c.ce_weight * mean(ce, unknown)}
        if c.embedding_weight and c.split < tokens.shape[1]:
            error = (embedded - q)[:, c.split :].square().mean(-1)
            losses["embedding"] = c.embedding_weight * mean(error, unknown[:, c.split :])
        if c.image_weight and c.regression != "l2":
            codes = likeliest_code(logits[:, : c.split], self.teacher.codes)
            made = torch.cat([codes, embedded[:, c.split :]], 1)  # as in sampling
            losses["image"] = c.image_weight * self.distance(torch.where(t == 0, given, made), q)
        batch.log["token_accuracy"] = mean((logits.argmax(-1) == tokens).to(q.dtype), unknown).detach()
        return losses

    def _entries(self, batch: Batch, rows: int) -> Tensor:
        """Which entry (B,) each sample trains."""
        c = self.config
        shares = torch.tensor(c.entry_shares or [1 / len(c.entries)] * len(c.entries), dtype=torch.float64)
        drawn = batch.rng.uniform(rows)
        return torch.bucketize(drawn, upload(shares.cumsum(0)[:-1].to(drawn.dtype), drawn.device), right=True)

    def _known(self, q: Tensor, noise: Tensor, chosen: Tensor, batch: Batch) -> Tensor:
        """Embeddings (B, n, C) of which a sample knows the first: the pair's, or what the steps before have made."""
        if not self.config.own_share:
            return q
        own = batch.rng.uniform(len(q)) < self.config.own_share
        for step in range(1, len(self.config.entries)):
            # Of all rows: which ones count is known on the device only, and all ranks call one network.
            made = self.student.inputs(noise, batch.pair_cond, batch.rng.normal_like, step)
            q = torch.where(expand(own & (chosen == step), q).bool(), made, q)
        return q
