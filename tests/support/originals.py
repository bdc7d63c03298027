"""Tiny pipelines as one file in the layout of their first authors: diffusers' conversion backwards."""

import re

import torch

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
UNET |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.attentions.0": "mid.attn_1"}
VAE |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE |= {"downsamplers.0.conv": "downsample.conv", "upsamplers.0.conv": "upsample.conv"}


def _renamed(name, names):
    for ours, theirs in names.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(ours)}(?=\.)", theirs, name)
    return name


def _unet_key(name, layers, attends):
    """Of blocks with so many layers; attends: whether the up blocks have attention."""
    found = re.match(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.*)", name
    )
    if not found:
        return _renamed(name, UNET)
    side, block, kind, k, rest = found.groups()
    block, k = int(block or 0), int(k)
    rest = _renamed(rest, RESNET) if kind == "resnets" else rest
    if side == "mid":
        return f"middle_block.{2 * k if kind == 'resnets' else 2 * k + 1}.{rest}"
    part = int(kind == "attentions")
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{1 + block * (layers + 1) + k}.{part}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{1 + attends[block]}.{rest}"
    return f"output_blocks.{block * (layers + 1) + k}.{part}.{rest}"


def _vae_key(name, levels):
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    name = name.replace(".resnets", ".block") if ".up." in name else name
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    return _renamed(name, VAE)


def sd_checkpoint(pipe, encoder=True):
    """Stable Diffusion 1.5's layout, or SDXL's without text encoders."""
    unet, vae = pipe.unet, pipe.vae
    layers, attends = unet.config.layers_per_block, ["Cross" in kind for kind in unet.config.up_block_types]
    made = {
        "model.diffusion_model." + _unet_key(name, layers, attends): value
        for name, value in unet.state_dict().items()
    }
    for name, value in vae.state_dict().items():
        key = _vae_key(name, len(vae.config.block_out_channels))
        made["first_stage_model." + key] = value
    if encoder:
        for name, value in pipe.text_encoder.state_dict().items():
            made["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = value
    return {name: value.clone() for name, value in made.items()}


SD3 = {"time_text_embed.timestep_embedder": "t_embedder", "time_text_embed.text_embedder": "y_embedder"}
SD3 |= {"linear_1": "mlp.0", "linear_2": "mlp.2", "pos_embed.proj": "x_embedder.proj"}
SD3_ATTENTION = {
    "x": ("to_q", "to_k", "to_v"),
    "context": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
SD3_BLOCK |= {"attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj"}
SD3_BLOCK |= {"attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k"}
SD3_BLOCK |= {"attn2.to_out.0": "x_block.attn2.proj"}
SD3_BLOCK |= {"attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k"}
SD3_BLOCK |= {"attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k"}
SD3_BLOCK |= {"ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2"}
SD3_BLOCK |= {"ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2"}


def sd3_checkpoint(pipe):
    """The network of Stable Diffusion 3."""
    state, made = dict(pipe.transformer.state_dict()), {}

    def swapped(value):
        return torch.cat(value.chunk(2)[::-1])

    last = pipe.transformer.config.num_layers - 1
    for i in range(last + 1):
        for side, names in {
            "x": ("to_q", "to_k", "to_v"),
            "context": ("add_q_proj", "add_k_proj", "add_v_proj"),
        }.items():
            for kind in ("weight", "bias"):
                for attn in (
                    "attn",
                    "attn2",
                ):  # a second one of the image alone, in some blocks of 3.5 medium
                    at = f"transformer_blocks.{i}.{attn}."
                    if f"{at}{names[0]}.{kind}" in state:
                        parts = [state.pop(f"{at}{name}.{kind}") for name in names]
                        made[f"joint_blocks.{i}.{side}_block.{attn}.qkv.{kind}"] = torch.cat(parts)
    for name, value in state.items():
        if found := re.match(r"transformer_blocks\.(\d+)\.(.*)", name):
            if int(found[1]) == last and "norm1_context" in name:
                value = swapped(value)
            made[f"joint_blocks.{found[1]}.{_renamed(found[2], SD3_BLOCK)}"] = value
        elif name.startswith("norm_out.linear"):
            made[name.replace("norm_out.linear", "final_layer.adaLN_modulation.1")] = swapped(value)
        elif name.startswith("proj_out"):
            made[name.replace("proj_out", "final_layer.linear")] = value
        elif name == "pos_embed.pos_embed":
            made["pos_embed"] = value
        else:
            made[_renamed(name, SD3)] = value
    return {"model.diffusion_model." + name: value.clone() for name, value in made.items()}
