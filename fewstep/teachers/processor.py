"""What a language model reads of texts and images, for stand-ins: the published one also takes films, for which its
library wants torchvision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import BatchFeature, ProcessorMixin

IMAGE = "<|image_pad|>"


class ImageTextProcessor(ProcessorMixin):
    """Qwen2VLProcessor without films."""

    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None):
        super().__init__(image_processor, tokenizer)

    def __call__(
        self, text: Sequence[str], images: Any = None, padding: bool = True, return_tensors: str = "pt"
    ) -> BatchFeature:
        """An image's mark becomes as many as the language model sees parts of it."""
        seen = self.image_processor(images=images, return_tensors=return_tensors)
        parts = iter((seen["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
        text = [re.sub(re.escape(IMAGE), lambda _: IMAGE * next(parts), one) for one in text]
        return BatchFeature({**self.tokenizer(text, padding=padding, return_tensors=return_tensors), **seen})


class TextProcessor(ProcessorMixin):
    """Qwen3VLProcessor and PixtralProcessor for texts alone."""

    attributes: ClassVar[list[str]] = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None):
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text: str | Sequence[str], **options: Any) -> BatchFeature:
        options = {
            name: value for name, value in options.items() if name not in ("images", "videos", "audio")
        }
        return BatchFeature(self.tokenizer([text] if isinstance(text, str) else list(text), **options))


class Wordless:
    """In place of a processor where no text is read: a stock pipeline asks its own how long its template is."""

    @property
    def tokenizer(self) -> Wordless:
        return self

    def apply_chat_template(self, *_args: Any, **_options: Any) -> list[list[int]]:
        return [[]]

    def encode(self, _text: str) -> list[int]:
        return [0]
