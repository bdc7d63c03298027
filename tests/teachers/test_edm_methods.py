"""Every method on every network of EDM's family: two iterations, an export that stock calls sample as the trainer does.

DD1 and DD2 are of tokens; Multi-Student, which splits labels, has tests of its own.
"""

from dataclasses import replace

import pytest
import test_support as support
from zoo import ZOO, Kind

from fewstep.diffusion.rng import Rng
from fewstep.errors import RecipeError
from fewstep.methods import METHODS

TAPS = ("model.dec.8x8_in0",)
CLASSES = {"num_class_embeds": 10}
NETWORKS = {
    "DDPM++": ZOO["EDM"],
    "NCSN++": Kind("EDMPipeline", {**CLASSES, "model_type": "ncsn++"}, None, TAPS, ("7", "3"), False),
    "ADM": Kind(
        "EDMPipeline", {**CLASSES, "model_type": "adm", "model_channels": 32}, None, TAPS, ("7", "3"), False
    ),
    "EDM2": ZOO["EDM2"],
}
OPTIONS = {
    "boot": {"intervals": 4},
    "diff_instruct": {},
    "disback": {"nodes": 1, "record_steps": 1, "backtrack_steps": 1},
    "dmd": {"critic_steps": 1},
    "dmd2": {"critic_steps": 1, "taps": ...},
    "fdistill": {"critic_steps": 1, "taps": ...},
    "hyper_sd": {"segments": [4, 1]},
    "ladd": {"taps": ...},
    "phased_dmd": {"num_steps": 2, "critic_steps": 1},
    "sana_sprint": {"guidance_embedding": False, "guidance_scale": 1.0, "warmup": 1, "taps": ...},
    "scm": {"warmup": 1},
    "sid": {"gan_weight": 1e-3, "gan_schedule": (0, 0), "taps": ...},
    "sim": {},
    "swiftbrush": {},
    "uni_instruct": {"gan_schedule": (0, 0), "taps": ...},
}
UNGUIDED = {("swiftbrush", network): "null" for network in ("NCSN++", "ADM", "EDM2")}
REFUSED = {**UNGUIDED, ("boot", "EDM2"): "has no time embedding"}


class Data(support.Data):
    """With pairs too."""

    def batch(self, iteration, micro):
        rng = Rng(0, "pairs", iteration, micro)
        pairs = (rng.normal(*self.shape), rng.normal(*self.shape))
        return replace(super().batch(iteration, micro), pairs=pairs, pair_cond=self.cond)


def test_all_methods_are_here():
    assert {*OPTIONS} == {*METHODS} - {"dd1", "dd2", "multi_student"}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", OPTIONS)
def test_two_iterations_on_each_network(name, network, teacher_of, tmp_path, monkeypatch):
    kind = replace(NETWORKS[network], adapts=False)
    options = {key: list(kind.taps) if value is ... else value for key, value in OPTIONS[name].items()}
    monkeypatch.setattr(support, "Data", Data)
    monkeypatch.setitem(support.METHODS, name, lambda *_: METHODS[name].Config(**options))
    if (name, network) in REFUSED:
        with pytest.raises(RecipeError, match=REFUSED[name, network]):
            support.two_steps(teacher_of(kind), kind, name)
        return
    assert support.two_steps(teacher_of(kind), kind, name, tmp_path)[0].endswith(": pipeline")


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory):
    from fewstep.teachers import load_teacher
    from fewstep.teachers.tiny import write_tiny_pipeline

    known = {}

    def get(kind):
        key = str(kind.options)
        if key not in known:
            folder = tmp_path_factory.mktemp("edm") / "teacher"
            known[key] = load_teacher(str(write_tiny_pipeline(kind.pipeline_class, folder, **kind.options)))
        return known[key]

    return get
