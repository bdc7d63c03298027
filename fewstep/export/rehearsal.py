"""Whether a stock pipeline will sample the student as it is trained, asked of the teacher's weights before training."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..diffusion.student import Student
from ..errors import FewstepError, RecipeError
from ..teachers.base import Teacher
from ..teachers.pipelines import hushed
from .target import Edition, Stock, Target
from .verify import compared_pixels, stock_sample, trainer_sample
from .weights import pipeline_with


def rehearse(target: Target, prompt: str) -> float | None:
    """Samples an untrained student as its export will be, by the stock pipeline and by the trainer.

    With the teacher's own network, in fp32: what is tried is the pipeline, its scheduler, conditions and autoencoder.
    Calls of one image, K each.

    Returns:
        The largest absolute difference of latents; None for students that no class of diffusers samples with a network
        of the teacher's class, and where memory does not suffice.

    Raises:
        RecipeError: they differ, or the pipeline cannot.
    """
    if not isinstance(target, Stock) or not target.keeps_class:
        return None
    teacher = target.teacher
    try:
        with _as_it_was(teacher), hushed():
            difference, scale = _differences(target, prompt)
    except torch.OutOfMemoryError:
        return None
    except FewstepError:
        raise
    except Exception as error:  # of whatever kind a stock pipeline raises that does not fit its parts
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise RecipeError(
            f"teacher.path: {teacher.source}: a {teacher.pipeline_class} with a {type(target.scheduler).__name__}, "
            f"which would sample a student of a {type(teacher.pipe.scheduler).__name__}'s path, fails ({said}); give a "
            "teacher whose scheduler and network are of the kind that this class was made for"
        ) from error
    if not difference <= 1e-3 * scale:
        raise RecipeError(
            f"teacher.path: {teacher.source}: a stock {teacher.pipeline_class} is off fewstep's sample of the "
            f"untrained student by {difference:.1e}, of {scale:.1e}, so the export would not be what is trained: its "
            f"network ({type(teacher.net).__name__}) or its scheduler ({type(teacher.pipe.scheduler).__name__}) has an "
            "option that fewstep does not know of; give another teacher"
        )
    return difference


def _differences(target: Stock, prompt: str) -> tuple[float, float]:
    """(largest difference of latents, largest latent); pixels are checked on the way."""
    teacher, student = target.teacher, target.student
    told = getattr(student.denoisers[0], "embedded", 1.0)
    plain = Student(
        teacher.denoiser.with_net(teacher.net, told), student.times, student.noise, eta=student.eta
    )
    record = target.record(Edition({}))
    record.pop("experts", None)
    with tempfile.TemporaryDirectory() as folder:
        target.scheduler.save_pretrained(folder)
        scheduler = type(target.scheduler).from_pretrained(folder)
    pipe = pipeline_with(teacher, teacher.net, scheduler)
    pipe.set_progress_bar_config(disable=True)
    own = trainer_sample(plain, teacher, [prompt])
    made = stock_sample(pipe, record, teacher, [prompt])
    if teacher.draws_latents:
        compared_pixels(pipe, record, teacher, [prompt], made)
    else:
        own = teacher.pixels(own).cpu()
    return (made - own).abs().max().item(), max(1.0, own.abs().max().item())


@contextmanager
def _as_it_was(teacher: Teacher) -> Iterator[None]:
    """Everything in fp32 meanwhile; it goes back without loss, for fp32 holds every number of half precision."""
    modules = [m for m in teacher.pipe.components.values() if isinstance(m, nn.Module)]
    tensors: list[Any] = [t for m in modules for t in itertools.chain(m.parameters(), m.buffers())]
    halves = [(t, t.dtype) for t in tensors if t.is_floating_point() and t.dtype != torch.float32]
    net = vars(teacher.net)
    forward = net.get("forward")
    try:
        for tensor, _ in halves:  # the very tensors that students share
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)
        net.pop("forward", None)  # class labels are bound to it
        if forward is not None:
            net["forward"] = forward
