"""HPSv2.1 (Wu et al., arXiv 2306.09341) from the file that its authors publish. Nothing is unpickled but tensors."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.vision.clip import MEAN, STD, Clip, local_folder
from fewstep.vision.extractor import file_sha256
from fewstep.vision.preprocess import longest_side_pad, normalised

FILE = "HPS_v2.1_compressed.pt"  # of the hub's xswu/HPSv2
BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # what it was tuned from, with its tokenizer
HEAD = {"vision": 80, "text": 64}  # width of one attention head in ViT-H/14, which no shape tells
# open_clip's names and transformers', as in its own conversion.
NAMES = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.", ".self_attn."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("text_projection", "text_projection.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
)


def hps_preparation(size: int) -> Any:
    """How HPSv2 sees an image: the longer side fitted, black beside it, normalised as OpenAI's CLIP."""
    return partial(normalised, crop=partial(longest_side_pad, size=size), mean=MEAN, std=STD)


class Hps(Clip):
    """The CLIP of HPSv2.1.

    Args:
        source: folder of a CLIP in transformers' format; or the published file, or a folder with it. Its tokenizer
            is looked for beside it, then in the hub's cache of `BASE`.
        device: where the network runs.

    Raises:
        FewstepError: not there, another kind of file, or no tokenizer.
    """

    def __init__(self, source: str, device: str = "cpu"):
        path = Path(source)
        file = path / FILE if (path / FILE).is_file() else path
        if file.is_file():
            self._from_file(file, device)
        else:
            super().__init__(source, device)
        self.resize, self.prepare = f"torch-bicubic-longest-{self.size}, black", hps_preparation(self.size)

    def _from_file(self, file: Path, device: str) -> None:
        from transformers import CLIPModel

        state = _state(file)
        self.tokenizer = _tokenizer(file)
        self.model = CLIPModel(_config(state, self.tokenizer, file))
        try:
            self.model.load_state_dict(_renamed(state))
        except RuntimeError as error:
            raise FewstepError(f"{file} does not fit CLIP: {str(error).splitlines()[-1].strip()}") from None
        self.model.float().eval().requires_grad_(False).to(device)
        self.name, self.device = f"hpsv2.1:{file.name}", device
        self.dim = self.model.config.projection_dim
        self.size = self.model.config.vision_config.image_size
        self.weights_sha256 = file_sha256(file)


def _state(file: Path) -> Mapping[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        state = found["state_dict"]
        if {"visual.conv1.weight", "token_embedding.weight"} <= set(state):
            return state
        problem = "its names are not those of open_clip"
    except Exception as error:  # absent, damaged, pickled code, another layout
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise FewstepError(f"{file} is not {FILE} of the hub's xswu/HPSv2 ({problem}): download that file again")


def _tokenizer(file: Path) -> Any:
    from transformers import AutoTokenizer

    beside = any((file.parent / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    try:
        folder = file.parent if beside else local_folder(BASE)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each tokenizer raises its own kinds
        raise FewstepError(
            f"{file} has no tokenizer beside it: `hf download {BASE} tokenizer.json tokenizer_config.json "
            f"vocab.json merges.txt special_tokens_map.json --local-dir {file.parent or '.'}` ({error})"
        ) from None


def _config(state: Mapping[str, Tensor], tokenizer: Any, file: Path) -> Any:
    """The network that has these shapes."""
    from transformers import CLIPConfig

    def tower(kind: str, blocks: str, width: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": len(state[f"{blocks}0.mlp.c_fc.bias"]),
            "num_hidden_layers": sum(k.startswith(blocks) and k.endswith(".ln_1.weight") for k in state),
            "num_attention_heads": max(1, width // HEAD[kind]),
            "hidden_act": "gelu",
        }

    try:
        width, _, _, patch = state["visual.conv1.weight"].shape
        words, reading = state["token_embedding.weight"].shape
        places = len(state["visual.positional_embedding"]) - 1
        special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
        text = {"vocab_size": words, "max_position_embeddings": len(state["positional_embedding"]), **special}
        return CLIPConfig(
            text_config={**tower("text", "transformer.resblocks.", reading), **text},
            vision_config={
                **tower("vision", "visual.transformer.resblocks.", width),
                "image_size": patch * round(places**0.5),
                "patch_size": patch,
            },
            projection_dim=state["visual.proj"].shape[1],
        )
    except KeyError as error:
        raise FewstepError(f"{file}: no weights of HPSv2.1: {error} is absent") from None


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict as transformers' CLIP names it."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "attn_mask":  # a constant
            continue
        for old, new in NAMES:
            if old in name and (old[0] == "." or name.startswith(old)):
                name = name.replace(old, new)
        if ".in_proj_" in name:
            for part, chunk in zip("qkv", tensor.chunk(3)):
                found[name.replace(".in_proj_", f".{part}_proj.")] = chunk
        else:
            found[name] = tensor.T if name.endswith("_projection.weight") else tensor
    return found
