"""Autoregressive teachers: pipelines of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.cond import Cond
from ..errors import FewstepError
from ..shape import Shape, Size
from ..tokens.codes import CodebookDenoiser, nearest_code
from ..tokens.pipeline import AutoregressivePipeline, LlamaGenPipeline, VARPipeline, decode_codes
from .base import Teacher
from .fingerprint import of_network

PIPELINES = {cls.__name__: cls for cls in (LlamaGenPipeline, VARPipeline)}
SOLVERS = ("midpoint", "heun", "euler")


class Autoregressive(Teacher):
    """A GPT or VAR with its tokenizer. A sample is the embeddings of its tokens, (n, C); prompts are texts or class
    labels written as numbers."""

    pipeline_class = "pipeline of tokens"  # whichever of them a loaded one is
    network = "transformer"
    autoencoder = "vqvae"
    kind = "autoregressive"
    floor = False
    encoders: tuple[str, ...] = ()
    solver = ("midpoint", 10)
    denoiser: CodebookDenoiser  # type: ignore[assignment]  # of codes, where other teachers have a network's

    def __init__(
        self,
        pipe: AutoregressivePipeline,
        source: str,
        resolution: Size | None = None,
        autocast: torch.dtype | None = None,
        attention: str = "auto",
    ):
        self.pipe, self.source = pipe, source
        self.pipeline_class = type(pipe).__name__
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.net = pipe.transformer
        self.encoders = ("text_encoder",) if pipe.text_encoder is not None else ()
        self.denoiser = pipe.teacher(autocast, attention)
        self.shape = Shape.of(pipe.resolution)
        if resolution is not None:
            self.check_shape(Shape.of(resolution))

    def check_shape(self, shape: Shape, field: str = "teacher.resolution") -> None:
        if shape != self.shape:
            raise FewstepError(
                f"{field}: {shape.said}: this teacher's map of tokens is for {self.resolution} pixels"
            )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(n, C): tokens, and the entries of a code."""
        return (self.pipe.num_tokens, self.pipe.codes.shape[1])

    def encode(self, prompts: Sequence[str]) -> Cond:
        return self.pipe.encode_prompt(prompts)

    def known(self, denoiser: Any, latents: Tensor, cond: Cond, guidance: float) -> Cond:
        """What comes before each token too."""
        return denoiser.context(latents, cond, guidance=guidance)

    def blank(self, rows: int) -> Cond:
        return self.null().map(lambda row: row.new_zeros(rows, *row.shape[1:]))

    def null(self) -> Cond:
        return self.pipe.null()

    @property
    def pair_bytes(self) -> int:
        """Of its tokens: their noise is a function of their number and is not stored."""
        return (2 if len(self.pipe.codes) <= 2**15 else 4) * self.latent_shape[0]

    @property
    def law(self) -> dict[str, Any]:
        """Of tokens: what is kept of their logits, the guidance of each group where it grows, and the codes."""
        ramp = self.denoiser.ramp
        grows = {"guidance_ramp": [round(part, 6) for part in ramp]} if len(set(ramp)) > 1 else {}
        return {**asdict(self.denoiser.law), **grows, "codes": of_network(self.pipe.vqvae.quantize)}

    def paired(self, latents: Tensor) -> Tensor:
        """The tokens (B, n) of embeddings."""
        return nearest_code(latents, self.pipe.codes)

    def decode_pixels(self, latents: Tensor) -> Tensor:
        return decode_codes(self.pipe.vqvae, latents).clamp(-1, 1)

    @torch.no_grad()
    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 images (B, H, W, 3) -> embeddings (B, n, C) of their tokens."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        tokens = [self.pipe.tokenize(part) for part in pixels.split(self._at_once())]
        return self.pipe.codes[torch.cat(tokens)]

    def sample(self, noise: Tensor, cond: Cond, steps: int, guidance: float) -> Tensor:
        """What DD1's map makes of the noise; every group costs ``steps`` of the solver, none of them a network call."""
        tokens = self.denoiser.flow(noise, cond, guidance=guidance)
        return self.denoiser.codes[tokens]

    def pair_maker(
        self, solver: str, steps: int, guidance: float
    ) -> tuple[str, Callable[[Tensor, Cond], Tensor]]:
        if solver not in SOLVERS:
            raise FewstepError(f"--solver {solver}: an autoregressive teacher takes {', '.join(SOLVERS)}")
        kind = torch.int16 if len(self.denoiser.codes) <= 2**15 else torch.int32

        def make(noise: Tensor, cond: Cond) -> Tensor:
            return self.denoiser.flow(noise, cond, guidance=guidance, solver=solver, steps=steps).to(kind)

        return "tokens", make

    def to(self, device: torch.device | str) -> Autoregressive:
        self.pipe.to(device)
        self.denoiser = self.pipe.teacher(self.denoiser.autocast, self.denoiser.attention)
        return self

    @property
    def positions(self) -> int:
        return self.latent_shape[0]
