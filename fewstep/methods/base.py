"""What a method is: roles, phases and losses. It never sees devices, processes, LoRA, precision or files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..bounds import Bounded, numbers, shown
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser
from ..diffusion.rng import Rng
from ..diffusion.student import Sampler
from ..errors import RecipeError
from ..extensions import plugins

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Progress:
    """Where a run is; the whole state of the loop beside weights and optimisers.

    Attributes:
        iteration: loop iterations done. DMD2's "iterations" count critic updates, and so do ours.
        steps: iterations planned. per_iteration: samples of one iteration, over all processes.
    """

    iteration: int = 0
    steps: int = 1
    per_iteration: int = 1

    @property
    def images(self) -> int:
        """Samples generated so far; the unit of SiD's schedules."""
        return self.iteration * self.per_iteration


@dataclass
class Batch:
    """One micro-batch of one iteration.

    Attributes:
        cond: conditions to generate for, B rows.
        real, real_cond: latents (B, C, H, W) of real images and their own conditions, or None when data-free.
        shape: (B, C, H, W) of what the student makes.
        rng: randomness of this micro-batch. shared: randomness all ranks and micro-batches agree on.
        pairs: a teacher's own noise and the x0, or tokens, it made of it, or None. pair_cond: their conditions.
        index: rows of ``cond`` in the list of prompts, on the CPU.
        share, real_share: weight of a mean over the rows of ``cond``, over those of ``real``; not 1 in a :meth:`view`.
        host: ``cond`` and ``real_cond`` by name as they were before the device got them; see :meth:`on_host`.
        pixels: whether samples are pixels, whose mean is anything, and not latents, which are scaled to one near 0.
        carry: what one phase leaves for the next ones of the same iteration.
        log: numbers worth a curve that are no part of the loss.
    """

    cond: Cond
    shape: tuple[int, ...]
    rng: Rng
    shared: Rng
    real: Tensor | None = None
    real_cond: Cond | None = None
    pairs: tuple[Tensor, Tensor] | None = None
    pair_cond: Cond | None = None
    index: Tensor | None = None
    share: float = 1.0
    real_share: float = 1.0
    host: dict[str, Cond] = field(default_factory=dict)
    pixels: bool = False
    carry: dict[str, Any] = field(default_factory=dict)
    log: dict[str, Tensor] = field(default_factory=dict)

    def clean(self, synthetic: bool) -> tuple[Tensor | None, Cond | None]:
        """Latents to be noised and their conditions: real ones, or those that a teacher made (its pairs)."""
        made = self.pairs and self.pairs[1]
        return (made, self.pair_cond) if synthetic else (self.real, self.real_cond)

    def on_host(self, name: str) -> Cond:
        """Conditions that the host decides by, without asking the device for them."""
        return self.host.get(name) or getattr(self, name)

    def view(self, rows: Tensor | slice, real_rows: Tensor | slice, **changes: Any) -> Batch:
        """Some of its rows as a micro-batch with the same randomness and nothing carried over.

        Args:
            rows: of ``cond``. real_rows: of real images and pairs. changes: other fields.
        """
        cond = self.cond.rows(rows)
        some = {
            "cond": cond,
            "shape": (len(cond), *self.shape[1:]),
            "real": None if self.real is None else self.real[real_rows],
            "real_cond": None if self.real_cond is None else self.real_cond.rows(real_rows),
            "pairs": None if self.pairs is None else tuple(value[real_rows] for value in self.pairs),
            "pair_cond": None if self.pair_cond is None else self.pair_cond.rows(real_rows),
        }
        return replace(self, **{**some, "index": None, "host": {}, "carry": {}, "log": {}, **changes})

    def row(self, i: int, rng: Rng) -> Batch:
        """Sample i as a micro-batch of its own, with randomness of its own."""
        one = slice(i, i + 1)
        index = None if self.index is None else self.index[one]
        host = {name: cond.rows(one) for name, cond in self.host.items()}
        return self.view(one, one, rng=rng, index=index, host=host)

    def note_lag(self, x0: Tensor, real: Tensor, fake: Tensor) -> None:
        """``critic_lag``, where the critic should be the posterior mean of what the student makes.

        The mean of ``(real - fake)(fake - x0)`` over that of ``(real - fake)^2``: 0 where the critic is that mean now
        (score projection; SiD, arXiv 2404.04057), far from 0 where it runs behind. A difference of less than a
        hundredth of the samples' spread counts as that much: where student and teacher meet, the quotient is noise.

        Args:
            x0: student samples (B, ...). real, fake: x0 predictions of teacher and critic at a noisy version of x0.
        """
        x0, real, fake = x0.detach(), real.detach(), fake.detach()
        delta = real - fake
        size = torch.maximum(delta.square().mean(), 1e-4 * x0.var())
        self.log["critic_lag"] = (delta * (fake - x0)).mean() / size

    def note_latents(self, x0: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> None:
        """``latent_mean``, of pixels ``pixel_mean``, and ``latent_std``: they should stay near those of real samples.

        Args:
            x0: student samples (B, ...); or such samples at a level, where they are alpha x0 plus noise of scale sigma.
        """
        x0 = x0.detach()
        std = (x0.var() - sigma**2).clamp(min=0).sqrt() / alpha
        self.log |= {"pixel_mean" if self.pixels else "latent_mean": x0.mean() / alpha, "latent_std": std}


def always(_progress: Progress) -> bool:
    return True


def at_once(_progress: Progress) -> int:
    return 0


@dataclass(frozen=True)
class Phase:
    """Train these roles with this loss, every n-th iteration of a share of the run, while ``when`` holds.

    ``loss`` returns named terms, weighted already; the trainer adds them up. Phases run in the order listed.

    Attributes:
        share: (begin, end) as fractions of the run; learning rates warm up and decay within it. after: an iteration
            that it does not begin before, where that is no fraction.
        rate: times the learning rates of its roles. warm: whether these warm up; where a phase goes on with what an
            earlier one did they are warm.
        once: only in the first iteration of the share in which ``when`` holds, and again after one in which it did not.
        fresh: roles that start again from what they were built from, optimiser and all, when the share begins: before
            any phase of that iteration.
        follows: (role, decay) instead of a loss: the weights become ``decay`` times their own plus the rest of that
            role's; 0 copies them. A role that follows itself goes to its own moving average.
    """

    name: str
    train: tuple[str, ...]
    loss: Callable[[Batch, Progress], dict[str, Tensor]] | None
    every: int = 1
    once: bool = False
    when: Callable[[Progress], bool] = always
    share: tuple[float, float] = (0.0, 1.0)
    after: Callable[[Progress], int] = at_once
    rate: float = 1.0
    warm: bool = True
    fresh: tuple[str, ...] = ()
    follows: tuple[str, float] | None = None

    def span(self, progress: Progress) -> tuple[int, int]:
        """First iteration and the one after the last."""
        begin, end = (round(part * progress.steps) for part in self.share)
        return max(begin, self.after(progress)), end

    def begins(self, progress: Progress) -> bool:
        """Whether this is the first iteration of its share."""
        return progress.iteration == self.span(progress)[0]

    def due(self, progress: Progress) -> bool:
        begin, end = self.span(progress)
        done = progress.iteration
        if not (begin <= done < end and (done - begin) % self.every == 0 and self.when(progress)):
            return False
        before = replace(progress, iteration=done - 1)
        return not self.once or self.begins(progress) or not self.when(before)


class Method:
    """Base of all methods; inheritance stops here.

    A method gets the frozen teacher and one denoiser per name in ``networks``, each on a trainable copy (or LoRA
    shell) of the teacher's network. It sets ``self.student`` and may add modules of its own in ``heads``.

    What it is, for lists and tables: ``summary``, half a sentence; ``papers``, their arXiv numbers; ``steps`` of its
    students; ``exports``, what a run ends in and with
    which family of samplers.

    Attributes:
        networks: the trainable copies of the teacher that this method needs; where that depends on the options,
            :meth:`networks_for` says so. extras: names that :meth:`heads` may have.
        followers: those networks that only follow the student, and are built as it is.
        critic: the denoiser that learns what the student makes, where there is one.
        teacher_kind: "diffusion", or "autoregressive" for methods of token models.
        distance, reward: of latents, set before training where :meth:`wants` names them.
        Config: dataclass of its options, see :class:`Options`; the paper's values are the defaults. May be left out
            where there are none.
        sums: published code sums its losses over the entries of a sample where ours are means; Adam's eps, the one
            thing that is not the same for both, is then divided by their number.
        moved: options that it had once -> where their values belong now, for recipes of that time.
        needs: data it cannot run without, given its configuration: any of "prompts", "images", "pairs".
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    papers: ClassVar[tuple[str, ...]] = ()
    steps: ClassVar[str] = "1 or more"
    exports: ClassVar[str] = "LoRA or pipeline; LCM"
    networks: ClassVar[tuple[str, ...]] = ("student",)
    extras: ClassVar[tuple[str, ...]] = ("discriminator",)
    teacher_kind: ClassVar[str] = "diffusion"
    followers: ClassVar[tuple[str, ...]] = ()
    moved: ClassVar[Mapping[str, str]] = {}
    sums: ClassVar[bool] = False
    Config: ClassVar[type]
    student: Sampler
    critic: Denoiser | None = None
    distance: Callable[[Tensor, Tensor], Tensor] | None = None
    reward: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(
        self, config: Any, teacher: Denoiser, latent_shape: Sequence[int], **denoisers: Denoiser | None
    ):
        self.config, self.teacher, self.latent_shape = config, teacher, latent_shape
        check_null(config, teacher)
        self.build(**denoisers)

    build: Callable[..., None]
    """Takes the denoisers by name, sets ``student``, makes what else is needed; each method's own."""

    def heads(self) -> dict[str, nn.Module]:
        """Further trainable roles, beside ``networks``."""
        return {}

    def phases(self) -> list[Phase]:
        """What is trained, by which loss and when; in this order within an iteration."""
        raise NotImplementedError

    def prepare(self, conditions: Any) -> list[int]:
        """Called once before training, with the store of encoded prompts (``len``, ``rows(index)``).

        A run that is resumed calls it again, so it may depend on the conditions only.

        Returns:
            Rows whose prompts the verification of the export should sample too, none by default.
        """
        return []

    @classmethod
    def networks_for(cls, config: Any) -> tuple[str, ...]:
        return cls.networks

    @classmethod
    def network(cls, config: Any, teacher: Any, name: str) -> nn.Module:
        """What a trainable network starts from: the teacher's own, unless the student is built otherwise."""
        net: nn.Module = teacher.net
        return net

    @classmethod
    def needs(cls, config: Any) -> tuple[str, ...]:
        return ("prompts",)

    @classmethod
    def wants(cls, config: Any) -> tuple[str, ...]:
        """Tools beside the teacher, each set as an attribute before training: "distance", by the option
        ``regression``; "reward", by the option of that name."""
        return ()


Expected = dict[str, tuple[bool, str]]  # name of an option -> (whether it is fine, what was expected)


class Options(Bounded):
    """A group of options; a method's Config is one or several of them and what is its own.

    Annotations say what each may be (:mod:`fewstep.bounds`), and ``expected(self) -> Expected`` what they may be
    together. Of all of them, numbers are finite, and what is called a weight is not negative.

    Raises:
        RecipeError: naming the first option that is not as expected, its value and what was expected.
    """

    PLACE: ClassVar[str] = "method."

    def __post_init__(self) -> None:
        super().__post_init__()
        options: Any = self
        for option in fields(options):
            name, value = option.name, getattr(self, option.name)
            if name.endswith("_weight") and any(number < 0 for number in numbers(value)):
                raise RecipeError(f"method.{name}: {value}: expected 0 or more")
        for group in reversed(type(self).__mro__):
            if expected := vars(group).get("expected"):
                for name, (fine, what) in expected(self).items():
                    if not fine:
                        raise RecipeError(f"method.{name}: {shown(getattr(self, name))}: expected {what}")

    def smoke(self) -> Self:
        """These options with what lets four iterations on a tiny pipeline meet every kind of turn."""
        return self

    @classmethod
    def toy(cls) -> Self:
        """Options for a network of a few weights, whose blocks are ``layers.N``, on which tests hold every method to
        what all of them promise."""
        return cls()


def guidance_of(config: Any) -> float:
    """The teacher's scale that a method's options ask for; 1, none, where they have no such option."""
    return getattr(config, "guidance_scale", 1.0)


def check_guidance(option: str, guidance: float, denoiser: Any) -> None:
    """Refuses guidance, by the name of the method's option, where there is no null condition to guide with."""
    if guidance != 1 and getattr(denoiser, "null", None) is None:
        raise RecipeError(
            f"method.{option}: {guidance:g}: expected 1, because this teacher has no null condition to guide with; "
            "leave guidance_scale at 1"
        )


def check_null(config: Any, denoiser: Any) -> None:
    """The same of every scale that a method's options ask of a teacher which says that it has none."""
    if not hasattr(denoiser, "null"):
        return
    option, scales = "guidance_scale", [guidance_of(config)]
    if getattr(config, "guidance_range", None) is not None:
        option, scales = "guidance_range", config.guidance_range
    elif getattr(config, "guidance_embedding", False):
        option, scales = "guidance_scales", config.guidance_scales
    for scale in scales:
        check_guidance(option, scale, denoiser)


def few(taps: list[str]) -> list[str]:
    """Blocks that a tiny transformer, or network of EDM's, has in place of those of a large one."""
    if any("transformer_blocks." in tap for tap in taps):
        return [f"transformer_blocks.{i}" for i in (0, 1)]
    return [re.sub(r"(\dx\d_block)\d+$", r"\g<1>0", tap) for tap in taps]


METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    def add(cls: type[Method]) -> type[Method]:
        cls.name = name
        if "Config" not in vars(cls):  # a method without options has a Config of its own all the same
            cls.Config = dataclass(type("Config", (Options,), {"__module__": cls.__module__}))
        METHODS[name] = cls
        return cls

    return add


def get_method(name: str, known: Mapping[str, type[Method]] = METHODS) -> type[Method]:
    if name not in known:
        plugins()
    if name not in known:
        raise RecipeError(
            f"method.name: {name!r} is unknown; expected one of {', '.join(sorted(known))}, or one of your own: keep "
            "the folder code/ of its run beside recipe.yaml, or start from the script that registers it"
        )
    return known[name]
