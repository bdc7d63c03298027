"""Export of an autoregressive teacher's student: a pipeline folder; no stock pipeline draws all tokens at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ..configs import RoleConfig
from ..diffusion.student import Sampler
from ..errors import RecipeError
from ..teachers.base import Teacher
from ..teachers.pipelines import hushed
from ..tokens.entries import EntryStudent
from .target import Edition, Target, Weights


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
        calls = {str(k): {"call": {"num_inference_steps": k}} for k in range(1, self.student.num_steps + 1)}
        found = {"student": type(self.net).__name__, **calls[str(self.student.num_steps)]}
        return found | ({"steps": calls} if len(calls) > 1 else {})  # fewer steps are the first ones
