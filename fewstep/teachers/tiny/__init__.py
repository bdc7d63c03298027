"""Tiny random pipelines on disk: stand-ins of published classes for tests and ``--smoke``.

They go through the very code that loads the real ones; their images mean nothing.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import FewstepError
from ..load import check_versions
from ..pipelines import hushed
from .dit import dit, lumina2, pixart, sana, sd3
from .flux import chroma, flux, flux2, flux2_klein
from .hidream import hidream
from .qwen import krea2, qwen_image, qwen_image_edit, z_image
from .qwen_image21 import qwen_image21
from .texts import clip_tokenizer, qwen_tokenizer
from .tokens import write_tokens
from .unets import edm, sd, sdxl, unet2d

TOKENS = ("LlamaGenPipeline", "VARPipeline")


# Pixels for tiny networks, where the class of the pipeline has a size of its own.
RESOLUTION = {
    **{"FluxPipeline": 32, "QwenImagePipeline": 32, "QwenImageEditPlusPipeline": 128, "ZImagePipeline": 32},
    **{"ChromaPipeline": 32, "Lumina2Pipeline": 32},
    **{"Flux2Pipeline": 32, "Flux2KleinPipeline": 32, "Krea2Pipeline": 32},
    "QwenImage21Pipeline": 64,
}


def write_tiny_pipeline(pipeline_class: str, folder: Path, seed: int = 0, **options) -> Path:
    """A randomly initialised pipeline of a class fewstep knows, written by ``save_pretrained``.

    Args:
        options: override the configuration of the network (not of all classes); ``prediction_type`` goes to the
            scheduler.
    """
    import torch

    builders = {
        "StableDiffusionPipeline": sd,
        "StableDiffusionXLPipeline": sdxl,
        "StableDiffusion3Pipeline": sd3,
        "SanaPipeline": sana,
        "PixArtAlphaPipeline": pixart,
        "PixArtSigmaPipeline": pixart,
        "FluxPipeline": flux,
        "QwenImagePipeline": qwen_image,
        "QwenImageEditPlusPipeline": qwen_image_edit,
        "ZImagePipeline": z_image,
        "ChromaPipeline": chroma,
        "Lumina2Pipeline": lumina2,
        "Krea2Pipeline": krea2,
        "HiDreamImagePipeline": hidream,
        "QwenImage21Pipeline": qwen_image21,
        "Flux2Pipeline": flux2,
        "Flux2KleinPipeline": flux2_klein,
        "DiTPipeline": dit,
        "DDPMPipeline": unet2d,
        "DDIMPipeline": unet2d,
        "EDMPipeline": edm,
    }
    if pipeline_class in TOKENS:
        return write_tokens(pipeline_class, Path(folder), seed, options)
    if pipeline_class not in builders:
        raise FewstepError(f"no tiny stand-in for {pipeline_class}; known: {', '.join([*builders, *TOKENS])}")
    check_versions(f"the tiny stand-in in {folder}", pipeline_class)
    folder = Path(folder)
    with hushed(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        files = folder / "tokenizer_files"
        tokenizer = (qwen_tokenizer if builders[pipeline_class] in QWEN else clip_tokenizer)(files)
        pipe = builders[pipeline_class](tokenizer, pipeline_class, options)
        pipe.save_pretrained(folder)
    return folder


# Whose texts a tokenizer of Qwen's reads.
QWEN = (qwen_image, qwen_image_edit, z_image, flux2_klein, flux2, krea2, qwen_image21)
