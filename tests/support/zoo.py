"""One tiny random pipeline for every published model that fewstep has an adapter for."""

from dataclasses import dataclass, field
from pathlib import Path

from fewstep.teachers.references import Edit
from fewstep.teachers.tiny import RESOLUTION


@dataclass(frozen=True)
class Kind:
    """How its stand-in is made, and what it can be tested with.

    Attributes:
        pipeline_class, options: see ``write_tiny_pipeline``. resolution: where the pipeline's own is too large to test.
        taps: blocks with features for a discriminator. prompts: texts, or labels. guided: it has a guidance scale.
        adapts: its network takes LoRAs.
    """

    pipeline_class: str
    options: dict = field(default_factory=dict)
    resolution: int | None = None
    taps: tuple[str, ...] = ("transformer_blocks.0", "transformer_blocks.1")
    prompts: tuple[str, ...] = ("red apple", "a dog on a skateboard")
    guided: bool = True
    adapts: bool = True


REFERENCES = Path(__file__).parent / "references"
EDITS = (
    Edit("red apple", [REFERENCES / "wide.png", REFERENCES / "square.png"], "the first edit"),
    Edit("a dog on a skateboard", [REFERENCES / "other.png", REFERENCES / "red.png"], "the second edit"),
)
UNET, EDM, EDM2 = ("mid_block",), ("model.dec.8x8_in0",), ("unet.dec.8x8_in0",)
SD21 = {"prediction_type": "v_prediction", "use_linear_projection": True, "attention_head_dim": (1, 2)}
ONE_SIZE = ("HiDream", "DiT", "UNet2D", "UNet2D by class", "EDM", "EDM2")  # whose stock calls make no other
ZOO = {
    "SD 1.5": Kind("StableDiffusionPipeline", taps=UNET),
    "SD 2.1, v": Kind("StableDiffusionPipeline", SD21, taps=UNET),
    "SDXL": Kind("StableDiffusionXLPipeline", taps=UNET),
    "SD 3": Kind(
        "StableDiffusion3Pipeline", {"dual_attention_layers": (0,)}
    ),  # as 3.5 medium has, in a block
    "FLUX.1-dev": Kind("FluxPipeline", resolution=RESOLUTION["FluxPipeline"]),
    "FLUX.1-schnell": Kind("FluxPipeline", {"guidance_embeds": False}, RESOLUTION["FluxPipeline"]),
    "Qwen-Image": Kind("QwenImagePipeline", resolution=RESOLUTION["QwenImagePipeline"]),
    "Qwen-Image-Edit": Kind(
        "QwenImageEditPlusPipeline", resolution=RESOLUTION["QwenImageEditPlusPipeline"], prompts=EDITS
    ),
    "Z-Image": Kind(
        "ZImagePipeline", resolution=RESOLUTION["ZImagePipeline"], taps=("noise_refiner.0", "layers.1")
    ),
    "Chroma": Kind("ChromaPipeline", resolution=RESOLUTION["ChromaPipeline"]),
    "Lumina 2": Kind(
        "Lumina2Pipeline", resolution=RESOLUTION["Lumina2Pipeline"], taps=("noise_refiner.0", "layers.1")
    ),
    "FLUX.2-dev": Kind("Flux2Pipeline", resolution=RESOLUTION["Flux2Pipeline"]),
    "FLUX.2-klein": Kind(
        "Flux2KleinPipeline",
        resolution=RESOLUTION["Flux2KleinPipeline"],
        taps=("transformer_blocks.0", "single_transformer_blocks.0"),
    ),
    "Krea-2": Kind("Krea2Pipeline", resolution=RESOLUTION["Krea2Pipeline"]),
    "HiDream": Kind("HiDreamImagePipeline", taps=("double_stream_blocks.0", "single_stream_blocks.1")),
    "Qwen-Image-2.1": Kind("QwenImage21Pipeline", resolution=RESOLUTION["QwenImage21Pipeline"]),
    "SANA": Kind("SanaPipeline"),
    "PixArt-alpha": Kind("PixArtAlphaPipeline"),
    "PixArt-Sigma": Kind("PixArtSigmaPipeline"),
    "DiT": Kind("DiTPipeline", prompts=("207", "3")),
    "UNet2D": Kind("DDPMPipeline", taps=UNET, prompts=("", ""), guided=False),
    "UNet2D by class": Kind("DDIMPipeline", {"num_class_embeds": 10}, None, UNET, ("7", "3"), False),
    "EDM": Kind("EDMPipeline", {"num_class_embeds": 10, "null_label": True}, None, EDM, ("7", "3")),
    "EDM2": Kind("EDMPipeline", {"model_type": "edm2"}, None, EDM2, ("7", "3"), False, False),
}
