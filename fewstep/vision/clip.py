"""CLIP models on disk: images and captions into one space. Nothing is downloaded and nothing is unpickled."""

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fewstep.errors import FewstepError
from fewstep.vision.extractor import Extractor, file_sha256, full_precision
from fewstep.vision.preprocess import Chain, center_square, normalised, pil_resize, shortest_side_crop

# Radford et al., arXiv 2103.00020: the normalisation of the published models, where a folder has none of its own.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip(Extractor):
    """A CLIP model of transformers, also one fine-tuned to preferences; as an extractor it gives image features.

    Args:
        source: folder with config.json, safetensors and tokenizer, or a hub id that is in the cache already.
        device: where the network runs; features come back on the CPU.

    Raises:
        FewstepError: not on disk, or not loadable.
    """

    def __init__(self, source: str, device: str = "cpu"):
        from transformers import AutoTokenizer, CLIPModel

        folder = local_folder(source)
        self.model = load_network(CLIPModel, folder, device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # each tokenizer raises its own kinds
            raise FewstepError(f"{source}: the tokenizer cannot be loaded: {error}") from error
        self.name, self.device = f"clip:{Path(source).name}", device
        self.dim = self.model.config.projection_dim
        self.weights_sha256 = folder_sha256(folder)
        self._preprocess(self.model.config.vision_config.image_size, *_normalisation(folder))

    def _preprocess(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std
        self.size, self.resize = size, f"pil-bicubic-shortest-{size}, center-crop"
        self.prepare = partial(normalised, crop=partial(shortest_side_crop, size=size), mean=mean, std=std)

    @property
    def square(self) -> Extractor:
        """The same network as CMMD uses it (arXiv 2401.09603): the middle square first, then Pillow's resize."""
        other, size = copy.copy(self), self.size
        other.resize = f"center-square, pil-bicubic-{size}"
        crop = Chain((center_square, partial(pil_resize, size=size, method="bicubic")))
        other.prepare = partial(normalised, crop=crop, mean=self.mean, std=self.std)
        return other

    @property
    def scale(self) -> float:
        """What the model was trained to multiply cosines with."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def features(self, prepared: Tensor) -> Tensor:
        """Not normalised."""
        with full_precision():
            return pooled(self.model.get_image_features(pixel_values=prepared.to(self.device))).float().cpu()

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions, cut at the context length (77 tokens), to float32 (B, dim), not normalised."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        with full_precision():
            features = self.model.get_text_features(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
        return pooled(features).float().cpu()

    def cosines(self, prepared: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine (B,) of each prepared image and its caption."""
        return (normalize(self.features(prepared)) * normalize(self.texts(captions))).sum(1)


class OpenClip(Clip):
    """A model of open_clip, which must be installed: "ARCHITECTURE:FILE", such as "ViT-g-14:weights.safetensors"."""

    def __init__(self, source: str, device: str = "cpu"):
        architecture, _, file = source.partition(":")
        if not Path(file).is_file():
            raise FewstepError(
                f"open_clip:{source}: expected open_clip:ARCHITECTURE:FILE with weights on disk"
            )
        try:
            import open_clip

            self.model = open_clip.create_model(architecture, pretrained=file, device=device).eval()
            self.tokenizer = open_clip.get_tokenizer(architecture)
        except ImportError:
            raise FewstepError(
                "open_clip is not installed: pip install open_clip_torch, or use clip:PATH"
            ) from None
        except Exception as error:  # unknown architecture, other keys
            raise FewstepError(f"open_clip:{source} cannot be loaded: {error}") from error
        self.name, self.device = f"open_clip:{architecture}", device
        self.weights_sha256 = file_sha256(Path(file))
        visual = self.model.visual
        size = visual.image_size
        size = size if isinstance(size, int) else size[0]
        self._preprocess(size, visual.image_mean or MEAN, visual.image_std or STD)
        self.model.get_image_features = lambda pixel_values: self.model.encode_image(pixel_values)
        self.dim = self(torch.zeros(1, self.size, self.size, 3, dtype=torch.uint8)).shape[1]

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        with full_precision():
            return self.model.encode_text(self.tokenizer(list(captions)).to(self.device)).float().cpu()


def local_folder(source: str) -> Path:
    """A folder, or the snapshot of a hub id that was downloaded before; FewstepError if it is neither."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith(("/", ".", "~")):
        raise FewstepError(
            f"{source} does not exist: expected a folder of weights, or the id of a repository"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except Exception as error:  # no such id, not in the cache, not an id at all
        raise FewstepError(
            f"{source} is neither a folder nor in the cache of the hub ({type(error).__name__}): "
            f"download it first, e.g. `hf download {source}`, or give a path"
        ) from None


def load_network(cls: Any, folder: Path, device: str) -> Any:
    """A frozen network of transformers in float32, from safetensors only; FewstepError if it cannot be loaded."""
    from fewstep.teachers.pipelines import hushed

    try:
        with hushed():
            model, info = cls.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # absent, damaged, of another kind
        raise FewstepError(
            f"{folder} cannot be loaded as {cls.__name__} from safetensors: {error}"
        ) from error
    if info["missing_keys"]:
        raise FewstepError(
            f"{folder} lacks {len(info['missing_keys'])} weights of {cls.__name__}, such as "
            f"{sorted(info['missing_keys'])[0]}: they would be random; is this another kind of model?"
        )
    return model.float().eval().requires_grad_(False).to(device)


def folder_sha256(folder: Path) -> str:
    """Hash of the safetensors files in a folder."""
    hashes = [file_sha256(file) for file in sorted(folder.glob("*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def pooled(output: Any) -> Tensor:
    """The projected features: transformers 4 gives them as they are, transformers 5 inside an object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation as the folder's preprocessor_config.json has them."""
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config.get("image_mean", MEAN), config.get("image_std", STD)
