"""Models of tokens: LlamaGen and VAR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .texts import tiny_t5


def tiny_tokens(pipeline_class: str, **options):
    """LlamaGen or VAR with the published number of tokens at 256 px and 1000 classes, and few weights.

    Args:
        options: of the transformer; LlamaGen with ``num_classes`` None reads texts.
    """
    from ...tokens.llamagen import GPT, LlamaGenVQ
    from ...tokens.pipeline import LlamaGenPipeline, VARPipeline
    from ...tokens.var import PATCHES, VAR, MultiScaleVQ

    convolutions = {"ch": 32, "ch_mult": (1,) * 5, "blocks": 1}
    if pipeline_class == "LlamaGenPipeline":
        sizes = {"vocab_size": 64, "dim": 32, "n_layer": 2, "n_head": 2, "block_size": 256, "multiple_of": 16}
        texts: dict[str, Any] = {}
        if "num_classes" in options and options["num_classes"] is None:
            sizes |= {"caption_dim": 16, "cls_token_num": 24, "masked": True}
            texts["tokenizer"], texts["text_encoder"] = tiny_t5()
        gpt = GPT(**{**sizes, **options})
        randomise(gpt)
        return LlamaGenPipeline(gpt, LlamaGenVQ(64, 8, z_channels=32, **convolutions), **texts, top_k=50)
    var = VAR(64, 8, depth=2, width=32, heads=2, patch_nums=PATCHES, num_codes=64, **options)
    vq = MultiScaleVQ(64, 8, patch_nums=PATCHES, **convolutions)
    var.pyramid.take(vq.quantize)
    randomise(var)
    return VARPipeline(var, vq, top_k=50, top_p=0.95)


def randomise(net) -> None:
    """Logits that differ: fresh transformers predict nothing."""
    import torch

    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(
                    torch.randn_like(parameter) * (1.0 if "output" in name or "head" in name else 0.2)
                )


def write_tokens(pipeline_class: str, folder: Path, seed: int, options: dict[str, Any]) -> Path:
    import torch

    from ..pipelines import hushed

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = tiny_tokens(pipeline_class, **options)
    with hushed():
        pipe.save_pretrained(folder)
    return folder
