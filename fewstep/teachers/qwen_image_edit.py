"""Qwen-Image-Edit: Qwen-Image, whose language model sees the images to be edited and whose network their latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad as padded

from ..diffusion.cond import Cond
from ..errors import FewstepError
from .flux import pack
from .pipelines import GUIDING
from .qwen_image import QwenImage
from .ragged import LONGEST
from .references import Edit, check_references


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit-2509 and its successors: one to three references stand beside the noise as tokens of their own.

    The blank negative prompt is read with the same images, so every row brings its own unconditional text.
    """

    pipeline_class = "QwenImageEditPlusPipeline"
    needs: ClassVar[dict[str, str]] = {"diffusers": "0.36", "transformers": "4.49"}
    edits = singly = True

    @staticmethod
    def reference_shapes(edit: Edit) -> list[tuple[int, int]]:
        return [size for sizes in edit.sizes for size in _sizes(sizes)]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        check_references(self, prompts)
        return Cond.cat(*(self._row(prompt) for prompt in prompts))

    def _row(self, edit: Any) -> Cond:
        images, home = edit.images(), self.pipe.text_encoder.device
        seen = [self.pipe.image_processor.resize(i, *_sizes(i.size)[0][::-1]) for i in images]
        blank, text = (
            self.pipe.encode_prompt([words], image=seen, device=home)[0].float()
            for words in (GUIDING[self.pipeline_class].negative, str(edit))
        )
        length, end = blank.shape[1] + LONGEST, text.shape[1]
        if end > length:
            raise FewstepError(f"{edit.place}: {str(edit)[:40]!r} has more than {LONGEST} tokens; shorten it")
        latents = [self._latents(image) for image in images]
        shapes = [[z.shape[2] // 2, z.shape[3] // 2] for z in latents]
        return _cond(
            padded(text, (0, 0, 0, length - end)),
            end,
            blank,
            torch.cat([pack(z) for z in latents], 1),
            shapes,
        )

    def _latents(self, image: Image.Image) -> Tensor:
        """(1, C, h, w), normalised: the middle of the VAE's posterior at the area that the stock pipeline gives it."""
        vae, (width, height) = self.pipe.vae, _sizes(image.size)[1]
        pixels = self.pipe.image_processor.preprocess(image, height, width)[:, :, None]
        shift, factor = self.latent_scale()
        scaled: Tensor = (
            vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()[:, :, 0] - shift
        ) * factor
        return scaled.float()

    def null(self) -> Cond:
        return Cond({})  # all of it comes with the row

    def example(self) -> Cond:
        return self.blank(1)

    def blank(self, rows: int) -> Cond:
        """With one square reference."""
        (_, (side, _)), width = _sizes((1, 1)), self.net.config[self.width]
        tokens = side // self.pipe.vae_scale_factor // 2
        texts = torch.zeros(rows, BLANK + LONGEST, width)
        reference = torch.zeros(rows, tokens**2, self.net.config.in_channels)
        return _cond(texts, BLANK + LONGEST, texts[:, :BLANK], reference, [[tokens, tokens]])

    @staticmethod
    def image_of(count: int, features: Tensor, cond: Cond) -> Tensor:
        return features[:, :count]  # the references' follow


BLANK = 208  # tokens of a blank text with one square reference, most of them the image's


def _cond(text: Tensor, end: int, blank: Tensor, reference: Tensor, shapes: list[list[int]]) -> Cond:
    """Rows of one shape, padded texts (B, L, D) with their first ``end`` tokens, blank ones (B, m, D)."""
    rows, length = text.shape[:2]

    def ends(end: int) -> tuple[Tensor, Tensor]:
        mask = (torch.arange(length) < end).long().to(text.device)
        return mask.expand(rows, length).contiguous(), torch.full((rows,), end)

    (mask, lengths), (null_mask, null_lengths) = ends(end), ends(blank.shape[1])
    return Cond(
        {
            "embeds": text,
            "mask": mask,
            "lengths": lengths,
            "null_embeds": blank,
            "null_mask": null_mask,
            "null_lengths": null_lengths,
            "reference": reference,
            "shapes": torch.tensor(shapes).expand(rows, -1, -1).contiguous(),
        }
    )


def _sizes(size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) at which the language model sees an image of some size, and at which the VAE does."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

    ratio = size[0] / size[1]
    seen, kept = (
        stock.calculate_dimensions(area, ratio) for area in (stock.CONDITION_IMAGE_SIZE, stock.VAE_IMAGE_SIZE)
    )
    return seen, kept
