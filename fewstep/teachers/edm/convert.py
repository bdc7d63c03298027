"""Published files of EDM and EDM2 turned into pipelines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import FewstepError, in_line
from ...tokens.state import load_weights, read_weights
from .networks import EDM2Precond, EDMPrecond
from .pipeline import EDMPipeline
from .scheduler import EDMScheduler

# Run beside a checkout of the authors' repository, whose code the pickles are made of.
UNPICKLE = (
    "import pickle; from safetensors.torch import save_file; net = pickle.load(open({path!r}, 'rb'))['ema']; "
    "save_file({{k: v.detach().float().clone() for k, v in net.state_dict().items()}}, {to!r})"
)
# Mean and standard deviation of the channels of Stable Diffusion's latents on ImageNet, which EDM2 was trained with.
LATENTS = {
    "latents_mean": [5.81, 3.25, 0.12, -2.15],
    "latents_std": [4.17, 4.62, 3.71, 3.28],
    "scaling_factor": 0.5,
}


def edm(file: str | Path, *, sigma_data: float = 0.5) -> EDMPipeline:
    """A network of EDM, e.g. ``edm-cifar10-32x32-cond-vp`` or ``edm-imagenet-64x64-cond-adm``, as a pipeline in pixels.

    Args:
        sigma_data: of its preconditioning, which the files do not say.

    Raises:
        FewstepError: a pickle, or the weights of another model.
    """
    state, source = _read(file), str(file)
    sides, channels = _encoder(state, "model.enc", source)
    adm = "model.out_conv.weight" in state
    width = (
        state["model.map_layer0.weight"].shape[1] if adm else _entry(state, "model.enc", sides[0]).shape[0]
    )
    net = EDMPrecond(
        sample_size=sides[0],
        in_channels=_entry(state, "model.enc", sides[0]).shape[1],
        num_class_embeds=_inputs(state, "model.map_label.weight"),
        sigma_data=sigma_data,
        model_type="adm" if adm else "ncsn++" if "model.map_noise.freqs" in state else "ddpm++",
        augment_dim=_inputs(state, "model.map_augment.weight") or 0,
        model_channels=width,
        channel_mult=[c // width for c in channels],
        num_blocks=_blocks(state, "model.enc", sides[0]),
        attn_resolutions=[s for s in sides if f"model.enc.{s}x{s}_block0.qkv.weight" in state],
        channel_mult_emb=state["model.map_layer0.weight"].shape[0] // width,
    )
    load_weights(net, state, source)
    return EDMPipeline(net.eval(), EDMScheduler())


def edm2(
    file: str | Path, *, vae: str | Path | None = None, sigma_data: float = 0.5, channels_per_head: int = 64
) -> EDMPipeline:
    """A network of EDM2, e.g. ``edm2-img512-s-2147483-0.130``, in pixels or in latents.

    Args:
        vae: folder or hub id of Stable Diffusion's autoencoder (``stabilityai/sd-vae-ft-mse``), for latents of four
            channels. sigma_data, channels_per_head: which the files do not say; these are of all published ones.

    Raises:
        FewstepError: a pickle, the weights of another model, or a VAE where there are no latents, and the reverse.
    """
    state, source = _read(file), str(file)
    sides, channels = _encoder(state, "unet.enc", source)
    entry = _entry(state, "unet.enc", sides[0])
    width, images = entry.shape[0], entry.shape[1] - 1
    told, noisy = state["unet.emb_noise.weight"].shape
    net = EDM2Precond(
        sample_size=sides[0],
        in_channels=images,
        num_class_embeds=_inputs(state, "unet.emb_label.weight"),
        sigma_data=sigma_data,
        logvar_channels=state["logvar_fourier.freqs"].shape[0] if "logvar_fourier.freqs" in state else 128,
        model_channels=width,
        channel_mult=[c // width for c in channels],
        channel_mult_noise=None if noisy == channels[0] else noisy // width,
        channel_mult_emb=None if told == max(channels) else told // width,
        num_blocks=_blocks(state, "unet.enc", sides[0]),
        attn_resolutions=[s for s in sides if f"unet.enc.{s}x{s}_block0.attn_qkv.weight" in state],
        channels_per_head=channels_per_head,
    )
    load_weights(net, state, source)
    return EDMPipeline(net.eval(), EDMScheduler(), _autoencoder(vae, images, source))


def _autoencoder(vae: str | Path | None, channels: int, source: str) -> Any:
    if (channels == 4) != (vae is not None):
        raise FewstepError(
            f"{source}: is of latents: give --vae, the folder of Stable Diffusion's autoencoder "
            "(stabilityai/sd-vae-ft-mse)"
            if vae is None
            else f"--vae {vae}: {source} is of {channels} channels, which are no latents; leave it out"
        )
    if vae is None:
        return None
    from diffusers import AutoencoderKL

    try:
        made = AutoencoderKL.from_pretrained(vae, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise FewstepError(f"--vae {vae}: holds no autoencoder: {in_line(error)}") from error
    made.register_to_config(**LATENTS)
    return made.eval()


def _read(file: str | Path) -> dict[str, Tensor]:
    path = Path(file)
    if path.suffix == ".pkl":
        script = UNPICKLE.format(path=str(path), to=str(path.with_suffix(".safetensors")))
        raise FewstepError(
            f"{path}: is a pickle of code, which can run anything as it is read; expected its tensors as .safetensors. "
            f'Where you trust it, in the authors\' own environment: python -c "{script}"'
        )
    return as_stored(read_weights(path))


def as_stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights in the shapes of fewstep's networks: EDM2's gains are (1,)."""
    return {name: value.reshape(value.shape or (1,)) for name, value in state.items()}


def _encoder(state: dict[str, Tensor], prefix: str, source: str) -> tuple[list[int], list[int]]:
    """Sides of the encoder's levels, and the channels of each.

    Raises:
        FewstepError: weights without such names.
    """
    found = (
        re.match(rf"{re.escape(prefix)}\.(\d+)x\1_block0\.conv(?:_res)?1\.weight$", name) for name in state
    )
    sides = sorted((int(one[1]) for one in found if one), reverse=True)
    if not sides or f"{prefix}.{sides[0]}x{sides[0]}_conv.weight" not in state:
        raise FewstepError(f"{source}: has no {prefix}.NxN_block0; these are the weights of another model")
    names = ("conv1", "conv_res1")
    keys = [next(k for n in names if (k := f"{prefix}.{s}x{s}_block0.{n}.weight") in state) for s in sides]
    return sides, [state[key].shape[0] for key in keys]


def _entry(state: dict[str, Tensor], prefix: str, side: int) -> Tensor:
    return state[f"{prefix}.{side}x{side}_conv.weight"]


def _inputs(state: dict[str, Tensor], name: str) -> int | None:
    return state[name].shape[1] if name in state else None


def _blocks(state: dict[str, Tensor], prefix: str, side: int) -> int:
    return len(
        {m[1] for k in state if (m := re.match(rf"{re.escape(prefix)}\.{side}x{side}_block(\d+)\.", k))}
    )


CHECKPOINTS = {"edm": edm, "edm2": edm2}
