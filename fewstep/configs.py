"""Options of a run as plain dataclasses; :mod:`fewstep.recipe` puts them together and re-exports them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from .bounds import Bound, Bounded, Count, Count0, Decay, Least0, Number, Positive, Seed, Share, Steps
from .device import check_name
from .errors import RecipeError
from .shape import Shape


@dataclass
class TeacherLora(Bounded):
    """A LoRA that is merged into the teacher before anything else is done with it.

    Attributes:
        path: ``.safetensors`` file, folder that holds one, or ``owner/name/file.safetensors`` of the hub.
        weight: its strength, beside the alpha that the file itself says.
    """

    PLACE: ClassVar[str] = "teacher.loras: {path}: "

    path: str
    weight: Annotated[float, Bound("a number that is not 0", bool)] = 1.0


@dataclass
class TeacherConfig(Bounded):
    """Which pipeline is distilled.

    Attributes:
        path: folder of ``save_pretrained``, hub id, ``.safetensors`` file of a whole model, or ``builtin:emoji-xl``.
        pipeline_class: what the recipe was written for; another class is refused.
        variant: of a folder's weights: ``fp16`` for files like ``model.fp16.safetensors``; null for those without.
        config: of a ``.safetensors`` file: folder or hub id of a pipeline of its class, with tokenizers, whose parts
            stand in for those that the file lacks; null is that of the model's first publisher, of the hub's cache.
        loras: merged into the teacher one after another, ``[{path: style.safetensors, weight: 0.8}]``.
        dtype: of the frozen weights.
        quantization: of the frozen linear layers in the network's blocks, which teacher, student and critic share where
            roles are LoRAs: int8, fp8 (a byte a weight) or nf4 (half a byte, and a scale for each 64; extra ``4bit``),
            with the numbers of diffusers' TorchAoConfig and BitsAndBytesConfig. null keeps ``dtype``.
        offload: the weights of the network's blocks stay in the host's memory, and come to the device for each product.
            Trains the same as without.
        autocast: of the networks' arithmetic, or null: bfloat16, or float16 for cards that have no other, with losses
            scaled as by ``torch.amp.GradScaler``. auto is bfloat16 where the device has units for it, float16 on a GPU
            that has none, else null.
        attention: kernel: sdpa (torch chooses), math, flash, efficient or cudnn of torch's own attention, xformers, or
            a name of diffusers' dispatcher where the network goes through it; auto is math for small maps in bf16 on a
            CPU, else sdpa. A run's own recipe holds what either auto became, see :mod:`fewstep.diffusion.kernels`.
        resolution: pixels of a square's side, or ``[height, width]`` as diffusers has them; null is the pipeline's own.
        gradient_checkpointing: recompute activations in the backward pass; a role may choose for itself.
        compile: torch.compile the blocks that the networks repeat. channels_last: memory format, for UNets.
    """

    PLACE: ClassVar[str] = "teacher."

    path: str
    pipeline_class: str | None = None
    variant: str | None = None
    config: str | None = None
    loras: list[TeacherLora] = field(default_factory=list)
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["int8", "fp8", "nf4"] | None = None
    offload: bool = False
    autocast: Literal["auto", "bfloat16", "float16"] | None = None
    attention: str = "auto"
    resolution: Count | tuple[Count, Count] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False

    def options(self) -> dict[str, Any]:
        """What :func:`~fewstep.teachers.load_teacher` takes beside the path."""
        names = ("dtype", "quantization", "offload", "resolution", "autocast", "attention")
        return {**{name: getattr(self, name) for name in names}, **self.weights()}

    def weights(self) -> dict[str, Any]:
        """What decides its weights beside the path, as far as it is said."""
        said = {"variant": self.variant, "config": self.config, "loras": [asdict(one) for one in self.loras]}
        return {name: value for name, value in said.items() if value}


@dataclass
class ShapeConfig(Bounded):
    """One of several shapes of the images that a run trains on.

    Attributes:
        size: pixels of a square's side, or ``[height, width]``. share: of the iterations, in proportion to the others';
            null is as many as it has images, or the same for all in a run without; given for all of them, or for none.
    """

    PLACE: ClassVar[str] = "data.shapes: "

    size: Count | tuple[Count, Count]
    share: Positive | None = None


@dataclass
class DataConfig(Bounded):
    """What is generated and what is real.

    Attributes:
        prompts: text file, one prompt per line; a table (JSON lines, JSON, CSV, TSV, Parquet); a folder of tables, or
            of WebDataset shards, whose captions are meant; or ``builtin:emoji``. A table for a teacher that edits has a
            column ``reference`` too: an image or a list of them.
        images: folder of captioned images: files, WebDataset shards, or tables with images in them; or
            ``builtin:emoji`` (``-32`` at 32 pixels); a data-free method only measures itself against them, and null is
            then allowed.
        pairs: folder that ``fewstep pairs`` wrote; null where the method needs none.
        shapes: of the images, ``[{size: 1024}, {size: [832, 1216], share: 0.5}]``, each iteration of one of them; none
            is ``teacher.resolution`` alone, which has to be among them: in it the student is exported. All are
            measured. Real images go to the shape of the nearest proportions.
        column: of the texts in tables of prompts and of captions; null is the only one called text, caption or prompt.
        upscale: enlarge images below the teacher's resolution; without it they cannot be used.
        max_bad: share of the images that may be left out because they cannot be used; each is named, and another one
            stands in for it. Above it the run stops.
        cache_prompts: encode all prompts before training, onto the disk; false encodes those of each batch beside the
            batch before; null encodes them before where they take at most ``cache_gb``.
        cache_images: the same of ``images`` and the VAE.
        cache_gb: GB that prompts with captions, and images, may take there where that is left to their size.
        encoder_device: where text encoders are before training, and beside it: cpu, cuda:1; null is with the networks.
    """

    PLACE: ClassVar[str] = "data."

    prompts: str
    images: str | None = None
    pairs: str | None = None
    shapes: list[ShapeConfig] = field(default_factory=list)
    column: str | None = None
    upscale: bool = False
    max_bad: Share = 0.01
    cache_prompts: bool | None = None
    cache_images: bool | None = None
    cache_gb: Least0 = 64.0
    encoder_device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = [Shape.of(one.size) for one in self.shapes]
        shares = {one.share is None for one in self.shapes}
        told = [shape.said for shape in sizes]
        if len(sizes) == 1 or len({*sizes}) < len(sizes):
            raise RecipeError(
                f"data.shapes: {told}: expected at least two, each another; a single one is teacher.resolution"
            )
        if len(shares) > 1:
            raise RecipeError(f"data.shapes: {told}: expected a share for each of them, or for none")


@dataclass
class RoleConfig(Bounded):
    """How one role is trained.

    Attributes:
        kind: "lora" trains an adapter on the shared frozen base, "full" a deep copy in fp32.
        rank, alpha: of the adapter; its strength is ``alpha / rank`` (DMD2: 64 and 8).
        targets: names of adapted layers, matched from the end; null takes the list of the network's class.
        lr, betas, eps, weight_decay: of AdamW; eps in the scale of the method's published code (1e-8 in fp32, 1e-4 for
            pure bf16), see ``Method.sums``. warmup: iterations of linear warm-up. decay: iterations of
            linear decay to zero at the end of the run. inverse_sqrt: iterations after which the rate falls with the
            inverse root of their number (EDM2, arXiv 2312.02696, eq. 67); 0 for never.
        optimizer: "adamw" is torch's fused one; "adamw8bit" keeps its moments in 8 bits (extra ``8bit``).
        ema: decay of a moving average of the trained weights after each of this role's updates; 0 for none.
        ema_images: instead of it the half-life of that average in images, at first a twentieth of those that have been
            (EDM, SiD); whatever the batch, the memory is as long.
        ema_device: "cpu" keeps that average in the host's memory; null beside the weights.
        gradient_checkpointing: recompute this role's activations in the backward pass; null does as the teacher.
        start_from: a finished run, one of its checkpoints, or an export, whose weights this role begins with: those of
            the role of the same name, averaged where there is an average; an export has those of its student. null is
            the teacher. An adapter must have the same rank and targets there; one of another alpha is rescaled. They
            are read once: a run that is resumed has its own.
    """

    kind: Literal["lora", "full"] = "lora"
    rank: Count = 64
    alpha: Positive = 64.0
    targets: list[str] | None = None
    lr: Positive = 5e-5
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Least0 = 0.01
    warmup: Count0 = 0
    decay: Count0 = 0
    inverse_sqrt: Count0 = 0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    ema: Annotated[float, Bound("0 <= ema < 1; 0 is off, 0.999 is usual", lambda x: 0 <= x < 1)] = 0.0
    ema_images: Count0 = 0
    ema_device: Literal["cpu"] | None = None
    gradient_checkpointing: bool | None = None
    start_from: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema and self.ema_images:
            raise RecipeError(
                f"ema_images: {self.ema_images}: expected 0 beside an ema of {self.ema:g}, which is another memory of "
                "the same average; set one of them 0"
            )

    def memory(self, updates: int, images: int, seen: int) -> float | None:
        """What an average keeps of itself at an update; None without one.

        Args:
            updates: of the role so far, this one included. images: since the one before. seen: until then.
        """
        if self.ema:  # the first ones have a shorter memory, so that the start is soon forgotten
            return min(self.ema, (1 + updates) / (10 + updates))
        half = min(self.ema_images, 0.05 * seen)
        return 0.5 ** (images / half) if half else (0.0 if self.ema_images else None)


@dataclass
class TrainConfig(Bounded):
    """How long, how much at once, and how often something is written.

    Attributes:
        steps: iterations. batch_size: samples of one micro-batch on one process.
        accumulate: micro-batches per update on each process. seed: of everything that is drawn.
        clip_norm: of the gradient of each phase (DMD2: 10). log_every: iterations.
        sample_every, checkpoint_every: iterations; 0 for never. keep: newest checkpoints kept.
        best: a number of the log, e.g. "generator/dm"; the checkpoint before which its mean was best is kept too.
        rollbacks: how often a run without finite gradients returns to its newest checkpoint and goes on with learning
            rates times ``rollback_lr``, instead of stopping. rollback_lr: this factor.
        device: auto, cpu, cuda, xpu, mps, or one of several, such as cuda:1.
        shard: processes over which trained weights are split.
        trackers: "tensorboard", "wandb" and others of accelerate's, which get the log's numbers too.
        tf32: round fp32 products of a GPU to TF32.
    """

    PLACE: ClassVar[str] = "train."

    steps: Count
    batch_size: Count = 1
    accumulate: Count = 1
    seed: Seed = 0
    clip_norm: Positive = 10.0
    log_every: Count = 10
    sample_every: Count0 = 500
    checkpoint_every: Count0 = 500
    keep: Count = 2
    best: str | None = None
    rollbacks: Count0 = 0
    rollback_lr: Positive = 0.5
    device: str = "auto"
    shard: Count = 1
    trackers: list[str] = field(default_factory=list)
    tf32: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.device)


@dataclass
class SampleConfig(Bounded):
    """Grids drawn while training.

    Attributes:
        prompts: shown from left to right: texts, or a file as ``data.prompts`` (for an editing teacher a table with
            references); null takes some of ``data.prompts``.
        count: how many when ``prompts`` is null. teacher_steps: of the teacher's row. columns: of the grid.
        scale: integer enlargement of small images.
        vae: folder or hub id of an AutoencoderTiny that decodes them, e.g. madebyollin/taesdxl; null is the teacher's.
        distance: so many samples of the student, beside each grid, for a Fréchet distance to ``data.images`` in
            ``evaluation.extractor``'s features, by torchmetrics; 0 for none. A trend, biased by the small number.
        seed: of the prompts and the noise.
    """

    PLACE: ClassVar[str] = "samples."

    prompts: str | list[str] | None = None
    count: Count = 16
    teacher_steps: Count0 = 25
    columns: Count = 8
    scale: Count = 1
    vae: str | None = None
    distance: Count0 = 0
    seed: Seed = 1234


@dataclass
class ExportConfig(Bounded):
    """What is written beside the LoRA.

    Attributes:
        kohya: also write the keys that ComfyUI and A1111 read. dtype: of the stored weights.
        tolerance: largest absolute difference between the stock pipeline's latents and the trainer's own.
    """

    PLACE: ClassVar[str] = "export."

    kohya: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    tolerance: Positive = 1e-4


Images = Annotated[int, Bound("0, or at least 2 images", lambda n: n == 0 or n >= 2)]


@dataclass
class EvalConfig(Bounded):
    """What is measured on the exported student after training; ``num`` 0 measures nothing.

    Attributes:
        num: images per row for the distances to the real ones, prompts in a fixed order.
        prompts: of these, a file or built-in name; null takes ``data.prompts``. With prompts that come more than once,
            the diversity within a prompt is measured too.
        named: further images per row, of prompts that caption exactly one real image; retrieval is measured on them.
        floor_steps, floor_solvers: teacher rows at these few steps, without training: diffusers' solvers, the "ays"
            tables, or "search" for the best schedule that ``fewstep floor`` finds.
        teacher_steps, teacher_guidance: of the full teacher row; 0 steps leaves it out.
        batch_size: images generated at once. extractor: feature space. seed: of the noise.
    """

    PLACE: ClassVar[str] = "evaluation."

    num: Images = 0
    prompts: str | None = None
    named: Images = 0
    floor_steps: Steps = field(default_factory=list)
    floor_solvers: list[Literal["ddim", "euler", "heun", "dpm++", "unipc", "ays", "search"]] = field(
        default_factory=lambda: ["dpm++"]
    )
    teacher_steps: Count0 = 50
    teacher_guidance: Number = 1.0
    batch_size: Count = 32
    extractor: str = "effnet-lite0"
    seed: Seed = 0
