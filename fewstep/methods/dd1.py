"""DD1: Distilled Decoding of autoregressive image models (Liu et al., ICLR 2025, arXiv 2412.17153).

Ancestral sampling in one step is possible only if something says which of the teacher's samples is meant. DD1 lets
noise say it: each token's own noise flows to a code under the teacher's conditional law
(:meth:`CodebookDenoiser.flow`), so a noise sequence determines a token sequence, and the student learns
that map from pairs. Further entry points, where the first tokens are known, make two steps and more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import upload
from ..errors import RecipeError
from ..tokens.codes import CodebookDenoiser
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
        """Neither paper nor code gives the loss weights; those are ours.

        Attributes:
            entries: tokens at which a step begins: the first is 0, one per step (published: {0, 80} of 256 for
                LlamaGen, {0, 55} of 680, i.e. scale 5, for VAR-d16, {0, 30} for d20 and d24).
            split: tokens that the logits decide; the continuous head makes the rest (published: 80 for LlamaGen-B, 130
                for L; 55 for VAR-d16, 30 for d20 and d24).
            guidance_scale: of the teacher, ``u + g (c - u)``; pairs must have been made with the same.
            ce_weight, embedding_weight, image_weight: of the logits' cross-entropy, of the continuous head's mean
                squared error, and of the distance of decoded images.
            regression: that distance: "features" of an offline extractor, or "lpips" (published), whose weights must be
                on disk. "l2" decodes nothing.
        """

        entries: list[int] = field(default_factory=lambda: [0])
        split: int = 80
        guidance_scale: float = 1.0
        ce_weight: float = 1.0
        embedding_weight: float = 1.0
        image_weight: float = 1.0
        regression: Literal["l2", "features", "lpips"] = "l2"

        def expected(self) -> Expected:
            rising = all(a < b for a, b in zip(self.entries, self.entries[1:]))
            return {
                "entries": (
                    bool(self.entries) and self.entries[0] == 0 and rising,
                    "0 and then rising token numbers",
                ),
                "split": (self.split >= 0, "0 or more tokens"),
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
        chosen = (batch.rng.uniform(len(q)) * len(c.entries)).long()
        entry = upload(torch.tensor(c.entries), q.device)[chosen]
        t = self.student.times_from(entry[:, None])
        logits, embedded = self.net(self.teacher.schedule.add_noise(q, noise, t), t, batch.pair_cond)
        unknown = t[..., 0].to(q.dtype)

        def mean(values: Tensor) -> Tensor:  # (B, n), over the tokens that are to be found
            return (values * unknown).sum() / unknown.sum()

        ce = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(unknown)
        losses = {"ce": c.ce_weight * mean(ce)}
        if c.embedding_weight:
            losses["embedding"] = c.embedding_weight * mean((embedded - q).square().mean(-1))
        if c.image_weight and c.regression != "l2":
            losses["image"] = c.image_weight * self.distance(torch.where(t == 0, q, embedded), q)
        batch.log["token_accuracy"] = mean((logits.argmax(-1) == tokens).to(q.dtype)).detach()
        return losses
