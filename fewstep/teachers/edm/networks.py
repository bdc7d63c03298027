"""EDM's and EDM2's denoisers as diffusers models: a preconditioned network, ``D(x, sigma, label)``.

``D = c_skip x + c_out F(c_in x, time, label)``, time ``ln(sigma) / 4``, with the coefficients of EDM (arXiv 2206.00364,
table 1). The state dict has the published names: ``model.`` of EDM's files, ``unet.`` and ``logvar_`` of EDM2's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from .edm2 import Block2, MagnitudeUNet, MPFourier, Weighted, normalise_weights
from .layers import Block
from .unets import DhariwalUNet, SongUNet

ARCHITECTURES = ("ddpm++", "ncsn++", "adm")


class Preconditioned(ModelMixin, ConfigMixin):
    """What both have in common: the call around the network."""

    config: Any
    _supports_gradient_checkpointing = True

    def raw(self, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        """``F``, shape of x; time of :meth:`time_of` (B,), label one-hot (B, classes) or None."""
        raise NotImplementedError

    def time_of(self, sigma: Tensor) -> Tensor:
        """What the network is told of sigma, (B,)."""
        return sigma.log() / 4

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The posterior mean of the clean sample, fp32.

        Args:
            sample: ``x0 + sigma eps`` (B, C, H, W). timestep: sigma (B,) or ().
            class_labels: (B,) numbers of classes; ``num_class_embeds`` itself is the label of none, as is None.
        """
        sigma = timestep.to(torch.float32).expand(len(sample)).reshape(-1, 1, 1, 1)
        data = self.config.sigma_data
        size = (sigma**2 + data**2).sqrt()
        x = sample.to(torch.float32)
        time = self.time_of(sigma.flatten())
        prediction = self.raw(
            (x / size).to(self.dtype), time.to(self.dtype), self.one_hot(class_labels, len(x))
        )
        return ((data / size) ** 2 * x + sigma * data / size * prediction.to(torch.float32),)

    def one_hot(self, class_labels: Tensor | None, rows: int) -> Tensor | None:
        """(B,) -> (B, classes), of which the row of the label of none is zero."""
        classes = self.config.num_class_embeds
        if not classes:
            return None
        if class_labels is None:
            return torch.zeros(rows, classes, dtype=self.dtype, device=self.device)
        return F.one_hot(class_labels, classes + 1)[:, :classes].to(self.dtype)


class EDMPrecond(Preconditioned):
    """EDM's networks (arXiv 2206.00364, table 7); defaults are CIFAR-10's DDPM++.

    Args:
        sample_size, in_channels: of images. num_class_embeds: labels, None for a network without.
        sigma_data: standard deviation of the data. model_type: "ddpm++", "ncsn++" or "adm".
        augment_dim: inputs that told the network of augmentation in training; they are zero in use.
        model_channels, channel_mult, num_blocks: of the first level, their multiples on each, residual blocks of each.
        attn_resolutions: sides of maps whose blocks attend. dropout: of training.
        channel_mult_emb: channels of the embedding, as a multiple of ``model_channels``.
        null_label: whether it was trained with labels dropped, so that guidance has a branch without.
    """

    _no_split_modules = [Block.__name__]  # noqa: RUF012  (diffusers reads this list)
    lora_targets: ClassVar[list[str]] = [
        "qkv",
        "proj",
        "affine",
        "conv1",
    ]  # whatever keeps the side of its map

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        num_class_embeds: int | None = None,
        sigma_data: float = 0.5,
        model_type: str = "ddpm++",
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        channel_mult_emb: int = 4,
        null_label: bool = False,
    ):
        super().__init__()
        if model_type not in ARCHITECTURES:
            raise ValueError(f"model_type {model_type!r}: expected one of {ARCHITECTURES}")
        given = (
            sample_size,
            in_channels,
            num_class_embeds or 0,
            augment_dim,
            model_channels,
            tuple(channel_mult),
        )
        rest = (num_blocks, tuple(attn_resolutions), dropout, channel_mult_emb)
        self.model: nn.Module = (
            DhariwalUNet(*given, *rest)
            if model_type == "adm"
            else SongUNet(*given, *rest, fourier=model_type == "ncsn++")
        )

    def raw(self, x: Tensor, time: Tensor, label: Tensor | None, augment: Tensor | None = None) -> Tensor:
        return self.model(x, time, label, augment)


class EDM2Precond(Preconditioned):
    """EDM2's network (arXiv 2312.02696); defaults are the size S of ImageNet 512, in latents.

    Args:
        logvar_channels: features of time for the uncertainty of EDM2's training loss.
        channel_mult_noise, channel_mult_emb, label_balance, concat_balance, dropout, res_balance, attn_balance,
            clip_act, channels_per_head: see :class:`~fewstep.teachers.edm.edm2.MagnitudeUNet`.
        turns: None as published. Of a network that ``fewstep prepare`` has been over: it is told TrigFlow's angle
            ``atan(sigma / sigma_data)`` by slow features, see :class:`~fewstep.teachers.edm.edm2.MPFourier`.
        pixel_norm: False as published; sCM's normalisation of modulations, of a network that was prepared with it.
        Others as of :class:`EDMPrecond`.
    """

    _no_split_modules = [Block2.__name__]  # noqa: RUF012
    # None: its layers normalise their weights, which an adapter beside them would not be part of.
    lora_targets: ClassVar[list[str]] = []
    normalise_weights = normalise_weights

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        num_class_embeds: int | None = 1000,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        channels_per_head: int = 64,
        null_label: bool = False,
        turns: float | None = None,
        pixel_norm: bool = False,
    ):
        super().__init__()
        self.unet = MagnitudeUNet(
            *(
                sample_size,
                in_channels,
                num_class_embeds or 0,
                model_channels,
                tuple(channel_mult),
                num_blocks,
            ),
            *(
                tuple(attn_resolutions),
                channel_mult_noise,
                channel_mult_emb,
                label_balance,
                concat_balance,
                dropout,
            ),
            *(res_balance, attn_balance, clip_act, channels_per_head, turns, pixel_norm),
        )
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = Weighted(logvar_channels, 1)

    def raw(self, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        return self.unet(x, time, label)

    def time_of(self, sigma: Tensor) -> Tensor:
        turns = self.config.turns
        return super().time_of(sigma) if turns is None else torch.atan(sigma / self.config.sigma_data)

    def logvar(self, sigma: Tensor) -> Tensor:
        """Logarithm of the uncertainty of the training loss (eq. 21), (B,) -> (B, 1)."""
        return self.logvar_linear(self.logvar_fourier(sigma.log() / 4))
