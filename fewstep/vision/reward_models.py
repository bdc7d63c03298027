"""ImageReward and LAION's aesthetic predictor from their published files, as functions with a gradient.

Both are a small regression on a frozen encoder: transformers has the encoders, so only the names of weights differ.
Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FewstepError
from .clip import MEAN, STD, Clip, pooled


def prepared(images: Tensor, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as CLIP wants them; Pillow's resize, which evaluation uses, has no gradient."""
    x = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    shift, scale = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
    return (x - shift) / scale


class Regression(nn.Module):
    """Features (B, n) -> (B,): the head of both, five linear layers with dropout between them and nothing else."""

    def __init__(self, features: int):
        super().__init__()
        widths = [features, 1024, 128, 64, 16, 1]
        layers: list[nn.Module] = []
        for i in range(5):
            layers.append(nn.Linear(widths[i], widths[i + 1]))
            if i < 3:  # which takes a number in the published names, and no part in a frozen model
                layers.append(nn.Identity())
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[:, 0]


class Aesthetic:
    """LAION's predictor of how much people like an image, 1 to 10, whatever its prompt.

    Args:
        clip: folder of CLIP ViT-L/14 (OpenAI's). file: ``sac+logos+ava1-l14-linearMSE.pth`` of
            christophschuhmann/improved-aesthetic-predictor, or the same as safetensors.
    """

    def __init__(self, clip: str, file: str, device: str = "cpu"):
        self.clip = Clip(clip, device)
        self.clip.model.requires_grad_(False)
        self.head = Regression(self.clip.dim)
        _fill(self.head, _state(Path(file)), file, device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        c = self.clip
        seen = pooled(c.model.get_image_features(pixel_values=prepared(images, c.size, c.mean, c.std)))
        return self.head(F.normalize(seen.float(), dim=1))


class ImageReward:
    """ImageReward-v1.0 (Xu et al. 2023, arXiv 2304.05977): BLIP's text encoder reads the prompt and sees the image.

    The score is a regression on the first token, normalised to mean 0 and deviation 1 over its authors' data.

    Args:
        folder: with ``ImageReward.pt`` (or the same as ``ImageReward.safetensors``) and ``med_config.json`` of the
            hub's THUDM/ImageReward, and ``vocab.txt`` of bert-base-uncased.
    """

    SIZE, TOKENS = 224, 35
    SHIFT, SCALE = 0.16717362830052426, 1.0333394966054072
    # The names of BLIP's authors and transformers', as in its own conversion of BLIP.
    NAMES = (
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.attn\.proj\.", ".self_attn.projection."),
        (r"\.attn\.", ".self_attn."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"^norm\.", "post_layernorm."),
    )

    def __init__(self, folder: str, device: str = "cpu"):
        from transformers import (
            BertTokenizer,
            BlipTextConfig,
            BlipTextModel,
            BlipVisionConfig,
            BlipVisionModel,
        )

        place = Path(folder)
        pickled, tensors = place / "ImageReward.pt", place / "ImageReward.safetensors"
        self.file, self.device = tensors if tensors.is_file() else pickled, device
        state = _state(self.file)
        for name in ("med_config.json", "vocab.txt"):
            if not (place / name).is_file():
                raise FewstepError(f"{place / name} does not exist; ImageReward needs it beside its weights")
        parts = {
            prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
        }
        seeing, reading, head = parts.values()
        try:
            width, _, _, patch = seeing["patch_embed.proj.weight"].shape
            vision = BlipVisionConfig(
                hidden_size=width,
                intermediate_size=len(seeing["blocks.0.mlp.fc1.bias"]),
                num_hidden_layers=1 + max(int(k.split(".")[1]) for k in seeing if k.startswith("blocks.")),
                num_attention_heads=max(1, width // 64),  # of every ViT of BLIP
                image_size=patch * math.isqrt(seeing["pos_embed"].shape[1] - 1),
                patch_size=patch,
                layer_norm_eps=1e-6,
                hidden_act="gelu",
            )
        except KeyError as error:
            raise FewstepError(f"{place}: no weights of ImageReward: {error} is absent") from None
        config = json.loads((place / "med_config.json").read_text(encoding="utf-8"))
        known = {
            k: v for k, v in config.items() if k in BlipTextConfig().to_dict() and k != "encoder_hidden_size"
        }
        # As a "decoder" it has the cross-attention; which way it masks is said by the call.
        text = BlipTextConfig(**known | {"encoder_hidden_size": width, "is_decoder": True})
        self.size = vision.image_size
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.head = Regression(text.hidden_size)
        _fill(self.vision, {_renamed(k, self.NAMES): v for k, v in seeing.items()}, folder, device)
        _fill(self.text, {k: v for k, v in reading.items() if "position_ids" not in k}, folder, device)
        _fill(self.head, head, folder, device)
        self.tokenizer = BertTokenizer.from_pretrained(place, local_files_only=True, do_lower_case=True)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score(prepared(images, self.size), prompts)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of images that are normalised and of the network's size already."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.TOKENS, return_tensors="pt"
        ).to(pixels.device)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return (self.head(read[:, 0].float()) - self.SHIFT) / self.SCALE


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _state(file: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # absent, damaged, pickled code
        summary = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FewstepError(f"{file} cannot be loaded: {summary}; expected its published state dict") from None


def _fill(module: nn.Module, state: Mapping[str, Any], source: str, device: str) -> None:
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise FewstepError(
            f"{source} does not fit {type(module).__name__}: {str(error).splitlines()[-1]}"
        ) from None
    module.float().eval().requires_grad_(False).to(device)
