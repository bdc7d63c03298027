"""A pipeline in diffusers' style for autoregressive image models and for their few-step students.

The transformer decides what a call does: a teacher decodes group by group with a cache, a student of
:mod:`fewstep.tokens.students` makes all tokens in one or a few passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ..diffusion.cond import Cond
from ..diffusion.student import Student
from ..errors import FewstepError
from .codes import CodebookDenoiser, Law, nearest_code
from .entries import EntryStudent
from .students import CausalStudent, Generator, TokenStudent

# What pipelines that were saved before have in their model_index.json -> where it is now.
MOVED = {
    "fewstep.teachers.llamagen": "fewstep.tokens.llamagen",
    "fewstep.teachers.var": "fewstep.tokens.var",
    "fewstep.token_students": "fewstep.tokens.students",
}


class AutoregressivePipeline(DiffusionPipeline):
    """Text or class labels to images through tokens.

    Args:
        transformer: a teacher (``GPT``, ``VAR``) or a student (``ParallelStudent``, ``CausalStudent``).
        vqvae: tokenizer; codes and decoder are used.
        text_encoder, tokenizer: CLIP's or T5's, for text conditions; None for class labels.
        temperature, top_k, top_p: how a teacher draws tokens.
        entries: first unknown token of each step of a DD1 student.
    """

    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012  (diffusers reads this list)

    def __init__(
        self,
        transformer,
        vqvae,
        text_encoder=None,
        tokenizer=None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        entries: Sequence[int] = (0,),
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, vqvae=vqvae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(temperature=temperature, top_k=top_k, top_p=top_p, entries=list(entries))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers reads it, with the modules of older folders by their present names."""
        found = super().load_config(*args, **kwargs)
        for value in (found[0] if isinstance(found, tuple) else found).values():
            if isinstance(value, list) and value and value[0] in MOVED:
                value[0] = MOVED[value[0]]
        return found

    # ---------------------------------------------------------------------------------------------- conditions
    @property
    def backbone(self):
        """The transformer itself, also inside a student."""
        return self.transformer.trunk if isinstance(self.transformer, TokenStudent) else self.transformer

    @property
    def counted(self):
        """What every evaluation of the transformer goes through once; a teacher's steps are no calls of it."""
        return (self.backbone.layers if hasattr(self.backbone, "layers") else self.backbone.blocks)[0]

    @torch.no_grad()
    def encode_prompt(self, prompt: Sequence[str | int]) -> Cond:
        """Conditions of texts, or of class labels given as numbers.

        LlamaGen's texts are put into small letters; its authors also take links, markup and brackets out of them.

        Raises:
            FewstepError: a label that is no class of this model.
        """
        config = self.backbone.config
        if config.num_classes is not None:
            return Cond({"label": self._labels(prompt, config.num_classes).to(self.device)})
        texts = [str(text).lower().strip() for text in prompt] if config.masked else list(prompt)
        read = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=config.cls_token_num,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        null = torch.zeros(len(texts), device=self.text_encoder.device)
        if config.masked:
            hidden = self.text_encoder(read.input_ids, attention_mask=read.attention_mask).last_hidden_state
            return Cond({**padded_left(hidden.float(), read.attention_mask), "null": null})
        hidden = self.text_encoder(read.input_ids, output_hidden_states=True).hidden_states[-2]
        return Cond({"embeds": hidden.float(), "null": null})

    def _labels(self, prompt: Sequence[str | int], classes: int) -> Tensor:
        for label in prompt:
            if not str(label).strip().isdecimal() or int(label) >= classes:
                raise FewstepError(
                    f"class label {label!r}: expected a number from 0 to {classes - 1}; this model is conditioned on "
                    "class labels"
                )
        return torch.tensor([int(label) for label in prompt])

    def null(self) -> Cond:
        """One row of the null condition."""
        config = self.backbone.config
        if config.num_classes is not None:
            return Cond({"label": torch.tensor([config.num_classes], device=self.device)})
        embeds = torch.zeros(1, config.cls_token_num, config.caption_dim, device=self.device)
        mask = {"mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device)}
        return Cond(
            {"embeds": embeds, **(mask if config.masked else {}), "null": torch.ones(1, device=self.device)}
        )

    # -------------------------------------------------------------------------------------------------- tokens
    @property
    def codes(self) -> Tensor:
        """(V, C), as the decoder sees them."""
        return codes_of(self.vqvae)

    def teacher(self, autocast: torch.dtype | None = None, attention: str = "auto") -> CodebookDenoiser:
        """The transformer as a denoiser of codes, of which see the arguments."""
        c = self.config
        law = Law(c.temperature, c.top_k, c.top_p)
        return CodebookDenoiser(self.transformer, self.codes, law, self.null(), autocast, attention)

    def student(self) -> Student:
        if isinstance(self.transformer, CausalStudent):
            return Student(Generator(self.transformer), [1.0])
        return EntryStudent(self.transformer, self.config.entries, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        return sum(self.backbone.groups)

    @property
    def resolution(self) -> int:
        """Pixels of a side."""
        c = self.vqvae.config
        levels = len(c.get("ch_mult") or c.block_out_channels)
        return math.isqrt(
            self.backbone.groups[-1] if len(set(self.backbone.groups)) > 1 else self.num_tokens
        ) << (levels - 1)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, n)."""
        if hasattr(self.vqvae, "encode_tokens"):
            return self.vqvae.encode_tokens(images)
        z = self.vqvae.encode(images.to(self.vqvae.dtype)).latents.float()
        return nearest_code(z.permute(0, 2, 3, 1), self.codes).flatten(1)

    # --------------------------------------------------------------------------------------------------- a call
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        teacher: AutoregressivePipeline | None = None,
        resample: tuple[int, int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
    ):
        """Images of prompts.

        Args:
            guidance_scale: of a teacher, ``u + g (c - u)``; a student has none.
            num_inference_steps: of a student, its own number by default; a teacher always decodes all groups.
            generator: one, or one per image. latents: unit noise (B, n, C) of a student. A teacher given latents flows
                from them (DD1's map) instead of sampling.
            teacher, resample: of a student: the teacher's pipeline draws the tokens from ``resample[0]`` up to
                ``resample[1]`` anew, at ``guidance_scale``. A DD1 student then makes those after them again (DD1's
                "pre-trained-n-m"); a DD2 student is meant to have its last groups drawn (DD2's algorithm 4).
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W), or "latent" (B, n, C).
            height, width: accepted for the sake of other pipelines' callers; the map of tokens has one size.
        """
        prompt = [prompt] if isinstance(prompt, (str, int)) else list(prompt)
        cond, rows = self.encode_prompt(prompt), len(prompt)
        if isinstance(self.transformer, TokenStudent):
            noise = self._noise(rows, generator, latents)
            q = self._student_latents(noise, cond, num_inference_steps)
            if resample is not None:
                q = self._resampled(q, noise, cond, teacher, resample, guidance_scale, generator)
        elif resample is not None:
            raise FewstepError("resample: is for students; this pipeline is a teacher")
        elif latents is not None:
            noise = self._noise(rows, None, latents)
            q = self.codes[self.teacher().flow(noise, cond, guidance=guidance_scale)]
        else:
            groups = len(self.transformer.groups)
            if num_inference_steps not in (None, groups):
                raise FewstepError(
                    f"num_inference_steps: {num_inference_steps}: this teacher decodes {groups} groups of tokens, no "
                    "fewer"
                )
            uniforms = self._uniforms(rows, generator)
            q = self.codes[self.teacher().sample(uniforms, cond, guidance=guidance_scale)]
        if output_type == "latent":
            return _output(q, return_dict)
        images: Any = (decode_codes(self.vqvae, q) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]
        return _output(images, return_dict)

    def _noise(self, rows: int, generator, latents: Tensor | None) -> Tensor:
        shape = (rows, self.num_tokens, self.codes.shape[1])
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise FewstepError(
                f"latents: shape {tuple(latents.shape)}: expected {shape} (batch, tokens, code size)"
            )
        return latents.to(self.device, torch.float32)

    def _student_latents(self, noise: Tensor, cond: Cond, steps: int | None) -> Tensor:
        student = self.student()
        if steps is not None and not 1 <= steps <= student.num_steps:
            raise FewstepError(
                f"num_inference_steps: {steps}: this student was distilled for {student.num_steps}"
            )
        return student.rollout(noise, cond, torch.randn_like, (steps or student.num_steps) - 1)

    def _uniforms(self, rows: int, generator) -> Tensor:
        if isinstance(generator, list):
            return torch.cat([self._uniforms(1, g) for g in generator])
        device = generator.device if generator is not None else self.device
        return torch.rand(rows, self.num_tokens, generator=generator, device=device, dtype=torch.float64)

    def _resampled(self, q, noise, cond, teacher, span, guidance, generator) -> Tensor:
        if teacher is None:
            raise FewstepError("resample: needs the teacher's pipeline as teacher=")
        first, last = span
        if not 0 <= first < last <= self.num_tokens:
            raise FewstepError(f"resample: {tuple(span)}: expected 0 <= first < last <= {self.num_tokens}")
        drawn = teacher.teacher().sample(
            self._uniforms(len(q), generator).to(q.device),
            cond,
            guidance=guidance,
            prefix=nearest_code(q[:, :first], self.codes),
            stop=last,
        )
        head = self.codes[drawn]
        if last == self.num_tokens or isinstance(self.transformer, CausalStudent):
            return torch.cat([head, q[:, last:]], 1)
        again = EntryStudent(self.transformer, [0, last], self.num_tokens)
        return again.x0(torch.cat([head, noise[:, last:]], 1), 1, cond)


class LlamaGenPipeline(AutoregressivePipeline):
    """Of a :class:`~fewstep.tokens.llamagen.GPT` or its students."""


class VARPipeline(AutoregressivePipeline):
    """Of a :class:`~fewstep.tokens.var.VAR` or its students."""


def _output(images, return_dict: bool):
    return ImagePipelineOutput(images=images) if return_dict else (images,)


def padded_left(embeds: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Features (B, L, D) of texts, padding last -> ``embeds`` and ``mask`` as LlamaGen's text models read them: padding
    first, and zero."""
    order = mask.argsort(dim=1, stable=True)  # padding, then the text as it was
    mask = mask.gather(1, order)
    return {"embeds": embeds.gather(1, order[..., None].expand_as(embeds)) * mask[..., None], "mask": mask}


def codes_of(vqvae) -> Tensor:
    """Code embeddings (V, C) of a tokenizer, fp32, normalised where its decoder expects that."""
    codes = vqvae.quantize.embedding.weight.detach().float()
    return torch.nn.functional.normalize(codes, dim=-1) if getattr(vqvae.config, "l2_norm", False) else codes


def decode_codes(vqvae, latents: Tensor) -> Tensor:
    """Embeddings (B, n, C) -> images (B, 3, H, W) in about [-1, 1]. Embeddings need not be codes."""
    if hasattr(vqvae, "decode_tokens"):  # next-scale tokenizers have a pyramid to sum up
        return vqvae.decode_tokens(latents)
    side = round(latents.shape[1] ** 0.5)
    grid = latents.transpose(1, 2).unflatten(-1, (side, side)).to(vqvae.dtype)
    return vqvae.decoder(vqvae.post_quant_conv(grid)).float()
