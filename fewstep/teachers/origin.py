"""What a teacher's weights are made of: a pipeline, or a file of one, and LoRAs that are merged into it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..configs import TeacherLora
from ..errors import FewstepError, in_line
from ..files import at_home
from .pipelines import heard

RECORD = (
    "teacher_weights"  # of an export's fewstep.json, beside "teacher": what is not said by the path alone
)
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w.-]+\.safetensors)")


@dataclass(frozen=True)
class Origin:
    """Where a pipeline's weights come from; see :class:`~fewstep.recipe.TeacherConfig`."""

    path: str
    variant: str | None = None
    config: str | None = None
    loras: tuple[TeacherLora, ...] = ()

    @classmethod
    def of(
        cls,
        path: str,
        variant: str | None = None,
        config: str | None = None,
        loras: Iterable[TeacherLora | Mapping[str, Any]] = (),
    ) -> Origin:
        """From a recipe's fields, or a record's."""
        typed = (one if isinstance(one, TeacherLora) else TeacherLora(**one) for one in loras)
        return cls(path, variant, config, tuple(typed))

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Origin:
        """Of an export's ``fewstep.json``."""
        return cls.of(record["teacher"], **record.get(RECORD, {}))

    @property
    def single(self) -> bool:
        """Whether it is one file of a whole model."""
        return self.path.endswith(".safetensors") and os.path.isfile(at_home(self.path))

    def placed(self) -> Origin:
        """For those who read it elsewhere: whole paths, of LoRAs to their files; ids of the hub as they are."""
        loras = tuple(replace(one, path=_placed(_lora_path(one.path))) for one in self.loras)
        return Origin(_placed(self.path), self.variant, self.config and _placed(self.config), loras)

    def said(self) -> dict[str, Any]:
        """All but the path, as far as there is any."""
        plain = {**asdict(self), "loras": [asdict(one) for one in self.loras]}
        return {name: value for name, value in plain.items() if name != "path" and value}

    def record(self) -> dict[str, Any]:
        """For ``fewstep.json``."""
        placed = self.placed()
        more = placed.said()
        return {"teacher": placed.path, **({RECORD: more} if more else {})}


def _placed(path: str) -> str:
    path = at_home(path)
    return os.path.abspath(path) if os.path.exists(path) else path


def _lora_path(path: str) -> str:
    return str(lora_file(path)) if os.path.isdir(at_home(path)) else path


def lora_file(path: str) -> Path:
    """The file of a LoRA: itself, the only one of a folder, or of the hub.

    Raises:
        FewstepError: nothing there, or pickled.
    """
    place = Path(at_home(path))
    if place.is_dir():
        files = sorted(place.glob("*.safetensors"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise FewstepError(
                f"teacher.loras: {path}: expected a folder with one .safetensors file, found {names}; name the file"
            )
        return files[0]
    if place.is_file() and place.suffix == ".safetensors":
        return place
    if place.is_file():
        raise FewstepError(
            f"teacher.loras: {path}: expected a .safetensors file; others can run code as they are read. Where you "
            f"trust it: {to_safetensors(str(place))}"
        )
    if not (found := HUB_FILE.fullmatch(path)):
        raise FewstepError(
            f"teacher.loras: {path} does not exist; give a .safetensors file, a folder with one, or "
            "owner/name/file.safetensors of the hub"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(found[1], found[2]))
    except Exception as error:  # the hub client raises a dozen kinds
        raise FewstepError(f"teacher.loras: cannot fetch {path}: {in_line(error)}") from error


def to_safetensors(path: str) -> str:
    """The command that reads a pickled file without running code of it, and writes its tensors."""
    new = str(Path(path).with_suffix(".safetensors"))
    return (
        'python -c "import torch, safetensors.torch as s; '
        f"d = torch.load({path!r}, map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in d.items() if hasattr(v, 'clone')}}, {new!r})\""
    )


def check_loras(loras: Sequence[TeacherLora], kind: str) -> None:
    """What can be known before anything is loaded: the files are there, and the pipeline's class reads LoRAs.

    Raises:
        FewstepError: with the field.
    """
    import diffusers

    if loras and not hasattr(getattr(diffusers, kind, None), "load_lora_weights"):
        raise FewstepError(
            f"teacher.loras: {loras[0].path}: diffusers reads no LoRA of a {kind}; leave it out, or give a pipeline "
            "into which it was merged"
        )
    for one in loras:
        lora_file(one.path)


def merge_loras(pipe: Any, loras: Sequence[TeacherLora]) -> None:
    """Adds LoRAs to a stock pipeline's own weights, by its own loader; text encoders' too.

    Raises:
        FewstepError: one does not fit.
    """
    names = [f"teacher_{k}" for k in range(len(loras))]
    for name, one in zip(names, loras):
        file = lora_file(one.path)
        try:
            with heard("diffusers") as said:
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        except Exception as error:  # keys of another network, other sizes, a damaged file
            raise FewstepError(
                f"teacher.loras: {one.path} does not fit a {type(pipe).__name__} such as this one: {in_line(error)}"
            ) from error
        if not any(name in held for held in pipe.get_list_adapters().values()):
            raise FewstepError(
                f"teacher.loras: {one.path} does not fit a {type(pipe).__name__}: none of its layers is one of this "
                "pipeline's; give a LoRA of this model"
            )
        if left := [text for text in said if "unexpected keys" in text]:
            text = " ".join(left[0].split())[:300]
            raise FewstepError(
                f"teacher.loras: {one.path} fits this {type(pipe).__name__} in part only: {text}"
            )
    if loras:
        pipe.set_adapters(names, [one.weight for one in loras])
        pipe.fuse_lora(components=list(pipe.get_list_adapters()))
        pipe.unload_lora_weights()
