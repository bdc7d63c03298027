"""A teacher: a diffusers pipeline seen as a denoiser, a prompt encoder and an image decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..device import upload
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Guidance, NetDenoiser, plainly
from ..diffusion.solvers import ddim
from ..errors import FewstepError
from ..shape import Shape, Size
from .origin import Origin
from .pipelines import (
    SIDES,
    class_of,
    encoding,
    fix_shift,
    native_shape,
    pixels_per_latent,
    size_options,
    takes,
)
from .references import Edit
from .schedulers import FLOOR, PREDICTIONS, for_steps, is_flow, schedule_of, scheduler_sample


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


class Teacher:
    """Adapter of one pipeline class. Subclasses say how it encodes and how it calls its network.

    Attributes:
        pipeline_class: name in ``model_index.json``. network: component that is distilled. kind: "diffusion", or
            "autoregressive" for token models. solver: of pairs and their steps, by default. floor: whether there are
            solvers that sample it in few steps without training.
        pipe: the stock pipeline, frozen. denoiser: its network as a :class:`~fewstep.diffusion.denoiser.NetDenoiser`.
        shape: of its images, in pixels. packing: latents along the side of what a network takes as one token
            already packed (Flux). patch: the same, of what it packs itself. shifts_latents: whether the stock pipeline
            reads the VAE's ``shift_factor``. normalises: whether it reads ``latents_mean`` and ``latents_std`` of each
            channel, where the VAE has both, or its BatchNorm's. films: whether the VAE is one of films, to which an
            image is one frame. folds: of the VAE's latents along the side of one of the teacher's, their channels side
            by side (FLUX.2).
            needs: the oldest version of each library that has the class.
            edits: whether prompts are :class:`~fewstep.teachers.references.Edit`, with images that they change.
            singly: whether its stock call is given one prompt at a time: it takes no more, or reads a text otherwise
            beside longer ones. alpha: whether the VAE has a fourth channel, of what covers white.
            encoded_at: place in what the pipeline's ``encode_prompt`` gives of what prompts may be split by.
            comfyui: what ComfyUI's names for this network's adapters begin with, the layer's path behind it; None where
            it reads none. comfyui_whole: whether it reads the whole network as diffusers keeps it.
            image_first: whether blocks that give image and text apart give the image first.
    """

    pipeline_class: str
    network: ClassVar[str] = "unet"
    autoencoder: ClassVar[str | None] = "vae"
    packing: ClassVar[int] = 1
    patch: int = 1
    shifts_latents: ClassVar[bool] = False
    normalises: ClassVar[bool] = False
    films: ClassVar[bool] = False
    edits: ClassVar[bool] = False
    singly: ClassVar[bool] = False
    alpha: ClassVar[bool] = False
    folds: ClassVar[int] = 1
    needs: ClassVar[dict[str, str]] = {}
    comfyui: ClassVar[str | None] = None
    comfyui_whole: ClassVar[bool] = True
    image_first: ClassVar[bool] = False
    encoded_at: ClassVar[dict[str, int]] = {"pooled": 2, "embeds": 0}
    kind: ClassVar[str] = "diffusion"
    solver: ClassVar[tuple[str, int]] = ("ddim", 50)
    floor: ClassVar[bool] = True
    encoders: tuple[str, ...] = ("text_encoder",)

    def __init__(
        self,
        pipe: Any,
        source: str,
        resolution: Size | None = None,
        autocast: torch.dtype | None = None,
        attention: str = "auto",
    ):
        self.pipe, self.source = pipe, source
        # Stable Diffusion 3 runs without its third encoder.
        self.encoders = tuple(n for n in self.encoders if getattr(pipe, n, None) is not None)
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.net: Any = getattr(pipe, self.network)  # with its `config`, `dtype` and the like
        _without_dropout(self.net)
        self.prepare(self.net)
        self.shape = native_shape(pipe) if resolution is None else Shape.of(resolution)
        self.check_shape(self.shape)
        self.published = pipe.scheduler  # as it was loaded, whose shift may depend on the size
        fix_shift(pipe, self.shape)
        kind = pipe.scheduler.config.get("prediction_type", "epsilon")
        kind = "flow_prediction" if is_flow(pipe.scheduler) else kind
        if kind not in PREDICTIONS:
            raise FewstepError(
                f"{source}: scheduler prediction_type {kind!r}: expected one of {sorted(PREDICTIONS)}"
            )
        schedule = schedule_of(pipe.scheduler)
        self.denoiser = NetDenoiser(
            self.net,
            schedule,
            PREDICTIONS[kind],
            type(self).call,
            self.null(),
            autocast,
            attention,
            self.example(),
            bool(self.net.config.get("guidance_embeds")),
            type(self).guide,
            partial(_image_of, type(self), (self.packing * self.patch) ** 2),
            self.image_first,
        )

    # ------------------------------------------------------------------------------ what differs between pipelines
    def encoding(self) -> dict[str, Any]:
        """What the pipeline's ``encode_prompt`` is told beside a prompt and a device, as JSON."""
        return encoding(self.pipe)

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditions of prompts, exactly as the stock pipeline computes them; len(prompts) rows."""
        raise NotImplementedError

    def check_shape(self, shape: Shape, field: str = "teacher.resolution") -> None:
        """Refuses what the network, its VAE or the stock call does not make.

        Raises:
            FewstepError: naming the recipe's field.
        """
        unit, native = self.unit, native_shape(self.pipe)
        if shape.height % unit or shape.width % unit:
            raise FewstepError(f"{field}: {shape.said}: expected a multiple of {unit} for this pipeline")
        if shape != native and not size_options(self.pipe):
            raise FewstepError(
                f"{field}: {shape.said}: a {type(self.pipe).__name__} makes images of {native.said} pixels only; leave "
                "it null"
            )

    def at(self, shape: Shape) -> Teacher:
        """The same weights for images of another shape: latents, conditions of size, and samples of its own.

        A stock call shifts its times by the size of the image, so whatever the teacher itself samples (a grid's row,
        any solver) has the shift of this shape. A student has one list of times, that of ``teacher.resolution``: its
        export's scheduler holds one, whatever the size of a call, and so it is trained at these in all shapes.
        """
        if shape == self.shape:
            return self
        view = copy(self)
        view.shape, view.pipe = shape, copy(self.pipe)
        view.pipe.scheduler = self.published
        fix_shift(view.pipe, shape)
        view.denoiser = copy(self.denoiser)
        view.denoiser.schedule = schedule_of(view.pipe.scheduler)
        return view

    def sizes(self, rows: int) -> dict[str, Tensor]:
        """What the network is told of the size of its image, beside latents of that size: conditions by name, of
        :data:`~fewstep.diffusion.cond.SIZES`. They are not of the prompt, so that one cache serves all shapes."""
        return {}

    def sized(self, cond: Cond) -> Cond:
        """Conditions with what they are told of this shape."""
        told = self.sizes(len(cond))
        device = next((value.device for value in cond.tensors.values()), None)
        return (
            Cond({**cond.tensors, **{name: value.to(device) for name, value in told.items()}})
            if told
            else cond
        )

    @staticmethod
    def prepare(net: Any) -> None:
        """Gives a stock network what it lacks for training, in place; those of another size too."""

    def blank(self, rows: int) -> Cond:
        """Zeros of the shape of encoded prompts, from configurations alone; for planning.

        Raises:
            FewstepError: an adapter that does not say.
        """
        raise FewstepError(
            f"{type(self.pipe).__name__}: its adapter has no `blank`, so nothing is known before prompts are encoded; "
            "measure it instead: fewstep bench RECIPE"
        )

    @staticmethod
    def reference_shapes(edit: Edit) -> Any:
        """What has to be the same of the references of all rows, where the teacher edits images."""
        raise NotImplementedError

    def known(self, denoiser: Any, latents: Tensor, cond: Cond, guidance: float) -> Cond:
        """What a denoiser goes by, of given samples: their condition, and whatever else it reads of them."""
        return cond

    def null(self) -> Cond | None:
        """One row of the unconditional branch, by the stock pipeline's own rule: mostly the empty prompt.

        None for a network that was trained without one.
        """
        return self.encode([""])

    def example(self) -> Cond | None:
        """One row of any condition, where there is no null one."""
        return None

    @staticmethod
    def call(net: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The network's prediction; ``time`` is in the network's own unit."""
        raise NotImplementedError

    @staticmethod
    def guide(unconditional: Tensor, conditional: Tensor, guidance: Guidance) -> Tensor:
        """The prediction with guidance ``u + g (c - u)``, and what the stock pipeline makes of it."""
        return plainly(unconditional, conditional, guidance)

    @staticmethod
    def image_of(count: int, features: Tensor, cond: Cond) -> Tensor:
        """The image's ``count`` tokens of what a block gives: all, unless texts or references stand beside them."""
        return features

    @staticmethod
    def pack(latents: Tensor) -> Tensor:
        """(B, C, h, w) -> what the stock pipeline holds while it samples: the same, or its packed tokens."""
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """The way back; of what the stock call gives as latents too."""
        return latents

    def given(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> what the stock call takes as ``latents``: mostly what it holds."""
        return self.pack(latents)

    # -------------------------------------------------------------------------------------------------- latents
    @torch.no_grad()
    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 images (B, H, W, 3) -> scaled latents (B, C, h, w): a draw of the VAE's posterior, if it has one."""
        vae = self.pipe.vae
        pixels = images.to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
        pixels = nn.functional.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0) if self.alpha else pixels
        pixels = pixels[:, :, None] if self.films else pixels
        encoded = [vae.encode(p) for p in pixels.split(self._at_once())]
        parts = [
            e.latent_dist.sample(generator=generator) if hasattr(e, "latent_dist") else e.latent
            for e in encoded
        ]
        shift, factor = self.latent_scale()
        z = torch.cat(parts)
        scaled: Tensor = (self.fold(z[:, :, 0] if self.films else z) - shift) * factor
        return scaled

    def fold(self, z: Tensor) -> Tensor:
        """(B, C, h, w) of the VAE -> (B, C f f, h / f, w / f)."""
        return nn.functional.pixel_unshuffle(z, self.folds) if self.folds > 1 else z

    def decode(self, latents: Tensor) -> np.ndarray:
        """Scaled latents (B, C, h, w) -> uint8 images (B, H, W, 3)."""
        return to_bytes(self.pixels(latents))

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """The same as numbers (B, 3, H, W) in [-1, 1], fp32; the VAE comes to the device meanwhile."""
        with self._vae_at_hand():
            return torch.cat([self.decode_pixels(z.to(self.device)) for z in latents.split(self._at_once())])

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """The same where the VAE is, differentiable."""
        shift, factor = self.latent_scale()
        return self.vae_decode(latents.to(self.pipe.vae.dtype) / factor + shift).float().clamp(-1, 1)

    def vae_decode(self, z: Tensor) -> Tensor:
        """The VAE's own z, as :meth:`fold` leaves it (B, C, h, w) -> what it makes of it, (B, 3, H, W)."""
        z = nn.functional.pixel_shuffle(z, self.folds) if self.folds > 1 else z
        decoded: Tensor = self.pipe.vae.decode(z[:, :, None] if self.films else z, return_dict=False)[0]
        decoded = decoded[:, :, 0] if self.films else decoded
        return 1 - (1 - decoded[:, :3]) * (decoded[:, 3:] + 1) / 2 if self.alpha else decoded

    def latent_scale(self) -> tuple[Any, Any]:
        """(shift, factor), numbers or (C, 1, 1): latents are ``(z - shift) * factor`` of the VAE's own z.

        By the rule of the stock pipeline, which may read less than the VAE's configuration holds, or statistics among
        its weights.
        """
        vae = self.pipe.vae
        c, scale = vae.config, vae.config.get("scaling_factor", 1.0)
        if self.normalises and hasattr(vae, "bn"):
            deviation = (vae.bn.running_var + c.batch_norm_eps).sqrt()
            return vae.bn.running_mean[:, None, None], scale / deviation[:, None, None]
        mean, std = c.get("latents_mean"), c.get("latents_std")
        if not self.normalises or mean is None or std is None:
            return (c.get("shift_factor") or 0.0) if self.shifts_latents else 0.0, scale
        mean, std = (upload(torch.tensor(v, dtype=vae.dtype), vae.device)[:, None, None] for v in (mean, std))
        return mean, scale / std

    def _at_once(self) -> int:
        """Images that the VAE takes at a time: one of 1024 px needs some 4 GB in fp32."""
        return max(1, 1024**2 // self.shape.area)

    # -------------------------------------------------------------------------------------------------- samples
    def sample(self, noise: Tensor, cond: Cond, steps: int, guidance: float) -> Tensor:
        """The teacher's own latents of some noise, by a deterministic solver."""
        return ddim(self.denoiser, noise, cond, steps, guidance=guidance)

    def pair_maker(
        self, solver: str, steps: int, guidance: float
    ) -> tuple[str, Callable[[Tensor, Cond], Tensor]]:
        """What a pair holds beside its noise, "x0" or "tokens", and the function from noise and conditions to it."""
        if solver == "ddim":  # ours: diffusers' steps to the wrong time where steps do not divide 1000
            return "x0", lambda noise, cond: self.sample(noise, cond, steps, guidance)
        if solver not in FLOOR:
            raise FewstepError(f"--solver {solver}: a diffusion teacher takes {', '.join(FLOOR)}")
        scheduler = FLOOR[solver](for_steps(self.pipe.scheduler, steps))
        return "x0", partial(scheduler_sample, self.denoiser, scheduler, num_steps=steps, guidance=guidance)

    # --------------------------------------------------------------------------------------------------- memory
    def to(self, device: torch.device | str) -> Teacher:
        self.pipe.to(device)
        if self.denoiser.null is not None:
            self.denoiser.null = self.denoiser.null.to(device)
        self.denoiser.example = self.denoiser.example.to(device)
        return self

    @cached_property
    def origin(self) -> Origin:
        """What its weights are made of; one that was loaded knows more than its source."""
        return Origin(self.source)

    @property
    def place(self) -> str:
        """Its source for those who read it elsewhere: of a folder or file the whole path."""
        return Origin(self.source).placed().path

    @property
    def resolution(self) -> int | list[int]:
        """Its shape as a recipe and a record say it."""
        return self.shape.said

    @property
    def unit(self) -> int:
        """Pixels of whose multiples the sides of its images are."""
        side = pixels_per_latent(self.pipe) * self.packing * self.patch * self.folds
        return math.lcm(side, SIDES.get(class_of(self.pipe), 1))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one sample."""
        channels = self.net.config.in_channels // self.packing**2
        return (channels, *self.shape.over(pixels_per_latent(self.pipe)).over(self.folds))

    @property
    def positions(self) -> int:
        """Places of a sample: the most tokens that a network's attention may see of it."""
        return math.prod(self.latent_shape[1:])

    @property
    def draws_latents(self) -> bool:
        """Whether the stock pipeline takes noise, and gives latents; others draw it, and give images only."""
        return takes(self.pipe, "latents")

    @property
    def stock_shape(self) -> tuple[int, ...]:
        """Shape of one sample as the stock pipeline holds it; see :meth:`pack`."""
        return tuple(self.pack(torch.empty(1, *self.latent_shape, device="meta")).shape[1:])

    @property
    def pair_bytes(self) -> int:
        """What a pair of noise and sample takes on disk."""
        return 2 * 4 * math.prod(self.latent_shape)

    @property
    def law(self) -> dict[str, Any]:
        """How samples are drawn, as far as the pipeline says: what its pairs depend on beside guidance and solver."""
        return {}

    def paired(self, latents: Tensor) -> Tensor:
        """What a pair holds of samples (B, ...): the latents as they are."""
        return latents

    @property
    def device(self) -> torch.device:
        home: torch.device = next(self.net.parameters()).device
        return home

    def drop_encoders(self, vae: bool = False, texts: bool = True) -> None:
        """Prompts are cached: the text encoders leave the device, and the VAE but for the time of :meth:`decode`.

        Args:
            vae: it leaves too. texts: false where prompts are encoded beside training: the text encoders stay.
        """
        for name in (
            *(self.encoders if texts else ()),
            *([self.autoencoder] if vae and self.autoencoder else []),
        ):
            if getattr(self.pipe, name, None) is not None:
                getattr(self.pipe, name).to("cpu")

    @contextmanager
    def _vae_at_hand(self) -> Iterator[None]:
        vae = getattr(self.pipe, self.autoencoder or "", None)
        if vae is None:
            yield
            return
        home = next(vae.parameters()).device
        vae.to(self.device)
        try:
            yield
        finally:
            vae.to(home)

    @property
    def lora_prefix(self) -> str:
        return self.network


def _image_of(cls: type[Teacher], latents: int, features: Tensor, cond: Cond, x_t: Tensor) -> Tensor:
    """As :meth:`Teacher.image_of`, of as many tokens as x_t has, each of so many ``latents``."""
    return cls.image_of(math.prod(x_t.shape[2:]) // latents, features, cond)


def _without_dropout(net: nn.Module) -> None:
    """Neither dropout nor dropped labels: diffusers recomputes activations in train mode only."""
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0  # type: ignore[assignment]  # diffusers' attribute
