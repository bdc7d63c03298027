"""Export of an autoregressive teacher's student: a pipeline folder; no stock pipeline draws all tokens at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs import RoleConfig
from ..diffusion.student import Sampler
from ..errors import RecipeError
from ..teachers.base import Teacher
from ..teachers.pipelines import hushed
from ..tokens.entries import EntryStudent
from ..version import __version__
from .target import Edition, Target, Weights, describe

if TYPE_CHECKING:
    from ..tokens.pipeline import AutoregressivePipeline


class Tokens(Target):
    """The teacher's pipeline with the student in place of its transformer."""

    @classmethod
    def fits(cls, teacher: Teacher, student: Sampler, role: RoleConfig) -> bool:
        return teacher.kind == "autoregressive"

    def check_role(self, role: RoleConfig) -> None:
        if role.kind != "full":
            raise RecipeError(
                f"roles.student.kind: {role.kind}: the student of an autoregressive teacher has layers that the "
                "teacher lacks, so it is no adapter of it; use full"
            )

    @property
    def net(self) -> Any:
        denoiser: Any = self.student.denoisers[-1]
        return getattr(denoiser, "net", denoiser)

    def save(self, folder: Path, weights: Weights, edition: Edition) -> None:
        (tensors,) = weights.values()
        net = copy.deepcopy(self.net).cpu().float()
        net.load_state_dict(
            {**dict(net.named_buffers()), **{n: v.float() for n, v in tensors.items()}}, strict=False
        )
        pipe = self.teacher.pipe
        config = {name: pipe.config[name] for name in ("temperature", "top_k", "top_p")}
        if isinstance(self.student, EntryStudent):
            config["entries"] = self.student.entries
        with hushed():
            parts = {**pipe.components, "transformer": net.to(edition.precision)}
            type(pipe)(**parts, **config).save_pretrained(folder / "pipeline")

    def particulars(self) -> dict[str, Any]:
        return _sampled(type(self.net).__name__, self.student.num_steps)


def _sampled(network: str, num_steps: int) -> dict[str, Any]:
    """Of the record: the student's class, and the calls at each number of steps."""
    calls = {str(k): {"call": {"num_inference_steps": k}} for k in range(1, num_steps + 1)}
    found = {"student": network, **calls[str(num_steps)]}
    return found | ({"steps": calls} if len(calls) > 1 else {})  # fewer steps are the first ones


def export_released(folder: Path, pipe: AutoregressivePipeline, source: str) -> None:
    """The export folder of a student that others trained and released.

    Args:
        source: name of the file that it came in.
    """
    pipe.save_pretrained(folder / "pipeline")
    family = type(pipe.backbone).__name__
    record = {
        "fewstep": __version__,
        "method": "dd1",
        "title": Path(source).stem,
        "released": source,
        "teacher": {"GPT": "LlamaGen"}.get(family, family),
        "pipeline_class": type(pipe).__name__,
        "kind": "full",
        "num_steps": pipe.student().num_steps,
        "resolution": pipe.resolution,
        "latent_shape": [pipe.num_tokens, pipe.codes.shape[1]],
        "dtype": "float32",
        **_sampled(type(pipe.transformer).__name__, pipe.student().num_steps),
    }
    describe(folder, record)
