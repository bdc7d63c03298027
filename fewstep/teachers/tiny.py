"""Tiny random pipelines on disk: stand-ins of published classes for tests and ``--smoke``.

They go through the very code that loads the real ones; their images mean nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import FewstepError
from .load import check_versions

TOKENS = ("LlamaGenPipeline", "VARPipeline")
# Pixels for tiny networks, where the class of the pipeline has a size of its own.
RESOLUTION = {
    **{"FluxPipeline": 32, "QwenImagePipeline": 32, "QwenImageEditPlusPipeline": 128, "ZImagePipeline": 32},
    **{"ChromaPipeline": 32, "Lumina2Pipeline": 32},
    **{"Flux2Pipeline": 32, "Flux2KleinPipeline": 32, "Krea2Pipeline": 32},
    "QwenImage21Pipeline": 64,
}
SIZES = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def write_tiny_pipeline(pipeline_class: str, folder: Path, seed: int = 0, **options) -> Path:
    """A randomly initialised pipeline of a class fewstep knows, written by ``save_pretrained``.

    Args:
        options: override the configuration of the network (not of all classes); ``prediction_type`` goes to the
            scheduler.
    """
    import torch

    builders = {
        "StableDiffusionPipeline": _sd,
        "StableDiffusionXLPipeline": _sdxl,
        "StableDiffusion3Pipeline": _sd3,
        "SanaPipeline": _sana,
        "PixArtAlphaPipeline": _pixart,
        "PixArtSigmaPipeline": _pixart,
        "FluxPipeline": _flux,
        "QwenImagePipeline": _qwen_image,
        "QwenImageEditPlusPipeline": _qwen_image_edit,
        "ZImagePipeline": _z_image,
        "ChromaPipeline": _chroma,
        "Lumina2Pipeline": _lumina2,
        "Krea2Pipeline": _krea2,
        "HiDreamImagePipeline": _hidream,
        "QwenImage21Pipeline": _qwen_image21,
        "Flux2Pipeline": _flux2,
        "Flux2KleinPipeline": _flux2_klein,
        "DiTPipeline": _dit,
        "DDPMPipeline": _unet2d,
        "DDIMPipeline": _unet2d,
        "EDMPipeline": _edm,
    }
    if pipeline_class in TOKENS:
        return _write_tokens(pipeline_class, Path(folder), seed, options)
    if pipeline_class not in builders:
        raise FewstepError(f"no tiny stand-in for {pipeline_class}; known: {', '.join([*builders, *TOKENS])}")
    check_versions(f"the tiny stand-in in {folder}", pipeline_class)
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        files = folder / "tokenizer_files"
        tokenizer = (_qwen_tokenizer if builders[pipeline_class] in QWEN else _tokenizer)(files)
        pipe = builders[pipeline_class](tokenizer, pipeline_class, options)
    from .pipelines import hushed

    with hushed():
        pipe.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path):
    """Character level: 256 bytes with and without CLIP's end-of-word mark, no merges, no data files."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    return CLIPTokenizer.from_pretrained(folder)


# What the published tokenizers have as one token of Qwen-Image's instruction, which is cut off by their number.
WORDS = (
    *(
        "<|im_start|>",
        "system",
        "Describe",
        " the",
        " image",
        " by",
        " detailing",
        " color",
        " shape",
        " size",
    ),
    *(
        " texture",
        " quantity",
        " text",
        " spatial",
        " relationships",
        " of",
        " objects",
        " and",
        " background",
    ),
    *("<|im_end|>", "user", "assistant"),
)
# The same of its editing model's, and what stands for an image.
EDITING = (
    "Describe the key features of the input image color shape size texture objects background then explain how",
    "the user s text instruction should alter or modify the image Generate a new image that meets the user s",
    "requirements while maintaining consistency with the original input where appropriate",
)
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VISION_IDS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)


def _qwen_tokenizer(folder: Path):
    """Character level but for the words of an instruction."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {s: i for i, s in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    options = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 1100, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(WORDS), special_tokens=True)
    return tokenizer


def _language_model(tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.pad_token_id),
    }


def _qwen_image(tokenizer, _pipeline_class, options):
    import diffusers

    return diffusers.QwenImagePipeline(tokenizer=tokenizer, **_qwen_parts(tokenizer, options))


def _qwen_image_edit(tokenizer, _pipeline_class, options):
    """Its VAE has few latents, for the stock call encodes references at a megapixel, whatever it makes of them."""
    import diffusers
    import transformers

    from .processor import ImageTextProcessor

    prefix = " ".join(EDITING)
    tokenizer.add_tokens([*dict.fromkeys(re.findall(r" ?[a-z]+", prefix)), *VISION], special_tokens=True)
    # Without torchvision newer versions have this one only, under its own name.
    images = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    ids = dict(zip(VISION_IDS, tokenizer.convert_tokens_to_ids(VISION)))
    vae = {"base_dim": 2, "dim_mult": [1] * 5, "temperal_downsample": [False, False, False, True]}
    return diffusers.QwenImageEditPlusPipeline(
        tokenizer=tokenizer,
        processor=ImageTextProcessor(images(), tokenizer),
        **_qwen_parts(tokenizer, options, vae, ids),
    )


def _qwen_parts(tokenizer, options, vae: dict[str, Any] | None = None, ids: dict[str, int] | None = None):
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    texts = {**_language_model(tokenizer), "rope_scaling": rope}
    config = Qwen2_5_VLConfig(text_config=texts, vision_config=vision, **(ids or {}))
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    network = {
        "in_channels": 16,  # four latents of four channels
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        "vae": _film_vae(vae),
        "text_encoder": encoder,
        "transformer": diffusers.QwenImageTransformer2DModel(**{**network, **options}),
    }


def _z_image(tokenizer, _pipeline_class, options):
    import diffusers
    import torch
    from transformers import Qwen3Config, Qwen3Model

    network = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [1024, 64, 64],
    }
    transformer = diffusers.ZImageTransformer2DModel(**{**network, **options})
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**_language_model(tokenizer), head_dim=8)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _flux2_parts(guided: bool, options):
    """Scheduler, VAE and network of FLUX.2."""
    import diffusers

    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.3, 3.0)
    network = {
        "in_channels": 16,  # four latents of four channels
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,  # three layers
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (2, 2, 2, 2),
        "guidance_embeds": guided,
    }
    transformer = diffusers.Flux2Transformer2DModel(**{**network, **options})
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        getattr(transformer, name).linear.weight.data.mul_(8)  # or blocks would hardly count
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": vae,
        "transformer": transformer,
    }


def _stacked(tokenizer, layers: int) -> dict[str, Any]:
    """A language model of one head, whose layers give what differs."""
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    return {**_language_model(tokenizer), **sizes, "initializer_range": 0.3}


def _flux2_klein(tokenizer, _pipeline_class, options):
    """Its encoder has as many layers as are read, which differ."""
    import diffusers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    encoder = Qwen3ForCausalLM(Qwen3Config(**_stacked(tokenizer, 28)))
    parts = _flux2_parts(False, options)
    return diffusers.Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, **parts)


MESSAGES = (
    "{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM]{{ m['content'][0]['text'] }}[/SYSTEM]"
    "{% else %}[INST]{{ m['content'][0]['text'] }}[/INST]{% endif %}{% endfor %}"
)


def _flux2(tokenizer, _pipeline_class, options):
    """As :func:`_flux2_klein`, told the guidance scale; its processor reads texts alone."""
    import diffusers
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    from .processor import TextProcessor

    texts = {**_stacked(tokenizer, 31), "model_type": "mistral"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config=texts,
        vision_config={**vision, "head_dim": 8, "image_size": 32, "model_type": "pixtral"},
    )
    return diffusers.Flux2Pipeline(
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=TextProcessor(tokenizer, chat_template=MESSAGES),
        **_flux2_parts(True, options),
    )


def _krea2(tokenizer, _pipeline_class, options):
    import diffusers
    from transformers import Qwen3VLConfig, Qwen3VLModel

    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    texts = {**_stacked(tokenizer, 4), "rope_scaling": rope}
    network = {
        "in_channels": 16,  # four latents of four channels
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 16,
        "num_text_layers": 3,
        **dict.fromkeys(("text_num_attention_heads", "text_num_key_value_heads"), 2),
        "text_intermediate_size": 32,
        **dict.fromkeys(("num_layerwise_text_blocks", "num_refiner_text_blocks"), 1),
        "axes_dims_rope": (4, 2, 2),
    }
    return diffusers.Krea2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=6400
        ),
        vae=_film_vae(),
        text_encoder=Qwen3VLModel(
            Qwen3VLConfig(text_config=texts, vision_config={**vision, "deepstack_visual_indexes": [0]})
        ),
        tokenizer=tokenizer,
        transformer=diffusers.Krea2Transformer2DModel(**{**network, **options}),
        text_encoder_select_layers=(1, 2, 4),
    )


def _qwen_image21(tokenizer, _pipeline_class, options):
    from .tiny_qwen_image21 import qwen_image21

    return qwen_image21(tokenizer, _stacked(tokenizer, 2), options)


def _film_vae(sizes: dict[str, Any] | None = None):
    import diffusers

    small = {"base_dim": 8, "dim_mult": [1, 1, 1], "temperal_downsample": [False, True]}
    return diffusers.AutoencoderKLQwenImage(
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[-0.7571, 0.1075, 1.5508, 0.2503],
        latents_std=[2.8184, 1.2196, 0.5, 1.916],
        **(sizes or small),
    )


# Whose texts a tokenizer of Qwen's reads.
QWEN = (_qwen_image, _qwen_image_edit, _z_image, _flux2_klein, _flux2, _krea2, _qwen_image21)


def _text_config(tokenizer, width: int = 16, **options):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def _euler(options):
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=options.pop("prediction_type", "epsilon"),
        timestep_spacing="leading",
        steps_offset=1,
    )


def _vae(levels: int = 2, **options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        **{"scaling_factor": 0.18215, **options},
    )


def _unet(cross: int, **options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            **SIZES,
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 2),
            "cross_attention_dim": cross,
            **options,
        }
    )


def _sd(tokenizer, _pipeline_class, options):
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    scheduler = _euler(options)
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=_unet(16, **options),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(tokenizer, _pipeline_class, options):
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    scheduler = _euler(options)
    sdxl = {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
    }
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, projection_dim=16)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_unet(32, **sdxl, **options),
        scheduler=scheduler,
        add_watermarker=False,
    )


def tiny_tokens(pipeline_class: str, **options):
    """LlamaGen or VAR with the published number of tokens at 256 px and 1000 classes, and few weights.

    Args:
        options: of the transformer; LlamaGen with ``num_classes`` None reads texts.
    """
    from ..tokens.llamagen import GPT, LlamaGenVQ
    from ..tokens.pipeline import LlamaGenPipeline, VARPipeline
    from ..tokens.var import PATCHES, VAR, MultiScaleVQ

    convolutions = {"ch": 32, "ch_mult": (1,) * 5, "blocks": 1}
    if pipeline_class == "LlamaGenPipeline":
        sizes = {"vocab_size": 64, "dim": 32, "n_layer": 2, "n_head": 2, "block_size": 256, "multiple_of": 16}
        texts: dict[str, Any] = {}
        if "num_classes" in options and options["num_classes"] is None:
            sizes |= {"caption_dim": 16, "cls_token_num": 24, "masked": True}
            texts["tokenizer"], texts["text_encoder"] = tiny_t5()
        gpt = GPT(**{**sizes, **options})
        _randomise(gpt)
        return LlamaGenPipeline(gpt, LlamaGenVQ(64, 8, z_channels=32, **convolutions), **texts, top_k=50)
    var = VAR(64, 8, depth=2, width=32, heads=2, patch_nums=PATCHES, num_codes=64, **options)
    vq = MultiScaleVQ(64, 8, patch_nums=PATCHES, **convolutions)
    var.pyramid.take(vq.quantize)
    _randomise(var)
    return VARPipeline(var, vq, top_k=50, top_p=0.95)


def _randomise(net) -> None:
    """Logits that differ: fresh transformers predict nothing."""
    import torch

    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(
                    torch.randn_like(parameter) * (1.0 if "output" in name or "head" in name else 0.2)
                )


def _write_tokens(pipeline_class: str, folder: Path, seed: int, options: dict[str, Any]) -> Path:
    import torch

    from .pipelines import hushed

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = tiny_tokens(pipeline_class, **options)
    with hushed():
        pipe.save_pretrained(folder)
    return folder


def _sd3(tokenizer, _pipeline_class, options):
    """Without T5, as many run it: zeros stand in its place."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    encoders = [CLIPTextModelWithProjection(_text_config(tokenizer, projection_dim=16)) for _ in range(2)]
    network = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
    }
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**network, **options}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _sana(_tokenizer, _pipeline_class, _options):
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    vae = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_types": "ResBlock",
            "block_out_channels": (8, 8),
            "layers_per_block": (1, 1),
            "qkv_multiscales": ((), ()),
        }.items()
    }
    tokenizer, encoder = _gemma()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderDC(latent_channels=4, scaling_factor=0.41407, **vae),
        transformer=SanaTransformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            timestep_scale=0.001,  # as `fewstep prepare` leaves it, and SanaSprintPipeline needs it
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _gemma():
    """Character level: (tokenizer, encoder)."""
    import tokenizers
    import transformers
    from packaging.version import Version
    from transformers import Gemma2Config, Gemma2Model

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    symbols = [*special, *(chr(i) for i in range(32, 127)), "\u2581"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    if Version(transformers.__version__).major >= 5:
        tokenizer = transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=300)
    else:
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
        model.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
        tokenizer = transformers.GemmaTokenizerFast(tokenizer_object=model, model_max_length=300)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=special.index("<bos>"),
        eos_token_id=special.index("<eos>"),
        pad_token_id=special.index("<pad>"),
    )
    return tokenizer, Gemma2Model(config)


def tiny_t5(width: int = 16):
    """Character level, without the library for data files: (tokenizer, encoder)."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(i) for i in range(33, 127))]
    tokenizer = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def _flux(tokenizer, _pipeline_class, options):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    t5_tokenizer, t5 = tiny_t5()
    network = {
        "patch_size": 1,
        "in_channels": 16,  # four latents of four channels
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    }
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(**{**network, **options}),
    )


def _chroma(_tokenizer, _pipeline_class, options):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tokenizer, t5 = tiny_t5()
    network = {
        "in_channels": 16,  # four latents of four channels
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (2, 2, 4),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=t5,
        tokenizer=tokenizer,
        transformer=ChromaTransformer2DModel(**{**network, **options}),
    )


def _hidream(tokenizer, _pipeline_class, options):
    from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

    from .tiny_hidream import hidream, llama_tokenizer

    texts = {"max_position_embeddings": 128}
    clips = [
        CLIPTextModelWithProjection(_text_config(tokenizer, projection_dim=width, **texts))
        for width in (12, 20)
    ]
    llama = llama_tokenizer()
    language = LlamaForCausalLM(LlamaConfig(**{**_stacked(llama, 4), "hidden_size": 24}))
    # Without attention among its 16384 latents.
    vae = _vae(scaling_factor=0.3611, shift_factor=0.1159, mid_block_add_attention=False)
    return hidream(vae, (tokenizer, *clips), tiny_t5(), (llama, language), options)


def _lumina2(_tokenizer, _pipeline_class, options):
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer, encoder = _gemma()
    network = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (300, 64, 64),
        "cap_feat_dim": 16,
    }
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_vae(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=Lumina2Transformer2DModel(**{**network, **options}),
    )


def _dit(_tokenizer, _pipeline_class, options):
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    network = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 8,  # the second half is the learned variance
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 1000,  # the pipeline's null label comes after them
    }
    return DiTPipeline(
        transformer=DiTTransformer2DModel(**{**network, **options}),
        vae=_vae(),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )


def _unet2d(_tokenizer, pipeline_class, options):
    import diffusers

    network = {
        **SIZES,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }
    scheduler = {"DDPMPipeline": diffusers.DDPMScheduler, "DDIMPipeline": diffusers.DDIMScheduler}
    return getattr(diffusers, pipeline_class)(
        unet=diffusers.UNet2DModel(**{**network, **options}),
        scheduler=scheduler[pipeline_class](beta_schedule="linear"),
    )


def _edm(_tokenizer, _pipeline_class, options):
    from .edm.networks import EDM2Precond, EDMPrecond
    from .edm.pipeline import EDMPipeline
    from .edm.scheduler import EDMScheduler

    network: dict[str, Any] = {
        "sample_size": 16,
        "model_channels": 16,
        "channel_mult": (1, 2),
        "num_blocks": 1,
    }
    network |= {"attn_resolutions": (8,), **options}
    kind = network.pop("model_type", "ddpm++")
    if kind == "edm2":
        own = {"in_channels": 4, "num_class_embeds": 10, "channels_per_head": 16, "logvar_channels": 16}
        vae = _vae(
            scaling_factor=0.5, latents_mean=[5.81, 3.25, 0.12, -2.15], latents_std=[4.17, 4.62, 3.71, 3.28]
        )
        net = EDM2Precond(**{**own, **network})
    else:
        vae, net = None, EDMPrecond(model_type=kind, **network)
    _awake(net)
    return EDMPipeline(net, EDMScheduler(), vae)


def _awake(net: Any) -> None:
    """What begins at zero is filled, so that every weight moves the output."""
    import torch

    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def _pixart(_tokenizer, pipeline_class, _options):
    import diffusers

    tokenizer, encoder = tiny_t5()
    return getattr(diffusers, pipeline_class)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(scaling_factor=0.13025),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=8,  # the second half is the learned variance
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    )
