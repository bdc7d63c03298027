"""What a GPU executes, executed on the stand-in accelerator: recipes, commands, methods.

The device is for a whole process and for good, so forks of a process that has run nothing have it
(``on_standin.py``), each for many recipes.
"""

import json
from importlib.metadata import version
from pathlib import Path

import on_standin
import pytest
import standin
from processes import python

from fewstep.runs.library import load_recipe, recipe_files

pytestmark = pytest.mark.skipif(standin.compiler() is None, reason="the stand-in needs a C++ compiler")

HERE = Path(__file__).parent
# One of each kind of network in the ordinary suite, the rest with --long.
FAST = {"sdxl_dmd2_4step", "sd3_scm_1step", "var_d16_dd1_2step"}


# Their networks rotate by complex numbers, in whose backward pass torch's engine crashes on this device.
COMPLEX = ("QwenImagePipeline", "QwenImageEditPlusPipeline", "ZImagePipeline", "QwenImage21Pipeline")


def kinds():
    """A recipe for each method on each class of pipeline: what others change are numbers, prompts and steps."""
    found = {}
    for name in sorted(recipe_files(), key=lambda name: (name not in FAST, name)):
        recipe = load_recipe(name)
        if recipe.teacher.pipeline_class in COMPLEX:
            continue
        found.setdefault((recipe.method_class.name, recipe.teacher.pipeline_class), name)
    return sorted(found.values())


RECIPES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.long) for name in kinds()]
COMMANDS = ["train", "resume", "replay", "export", "sample", "cache", "pairs", "prepare", "bench", "floor"]
COMMANDS += ["eval generate", "eval fid"]
ON_THE_CPU = {"export"}  # whose weights may be anyone's
COARSE = [pytest.param(name, marks=pytest.mark.long) for name in ("sd3_scm_1step", "sdxl_dmd2_4step")]


def child(folder, *words):
    """Runs ``on_standin.py``, in a process that has run nothing yet, and gives the lines that it has written."""
    out, said, place = (folder / name for name in ("lines.jsonl", "said.txt", "cache"))
    script = HERE / "support" / "on_standin.py"
    words, env = (words[0], str(out), *words[1:]), {"FEWSTEP_CACHE": str(place)}
    code = python(script, *words, folder=HERE, out=said, err=said, env=env)
    assert code == 0, said.read_text(errors="replace")[-3000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


def chosen(request, test):
    """Names that a test of this file runs with."""
    return [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and item.originalname == test and not item.get_closest_marker("skip")
    ]


@pytest.fixture(scope="module")
def courses(request, tmp_path_factory):
    """Recipe -> what it has come to, of those whose tests run here."""
    names = chosen(request, "test_a_recipe_trains_resumes_and_exports")
    made = child(tmp_path_factory.mktemp("recipes"), "recipes", *names)
    return {course["recipe"]: course for course in made}


def check(course):
    assert course["fault"] is None, course["fault"]
    assert course["reached"] == list(on_standin.STAGES)
    assert course["devices"] == [standin.NAME]
    # HiDream's experts are told how many tokens each of them has, as in the stock network.
    assert [wait for wait in course["waits"] if "hidream.py" not in wait] == []


def needs_transformers_5(name):
    if name.startswith("emoji_flow") and version("transformers") < "5":
        pytest.skip("builtin:emoji-flow needs transformers 5")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_resumes_and_exports(name, courses):
    needs_transformers_5(name)
    check(courses[name])
    assert row(name, courses[name]["reached"]) in (HERE / "README.md").read_text().splitlines()


def row(name, reached):
    return f"| `{name}` | {' | '.join('yes' if stage in reached else 'no' for stage in on_standin.STAGES)} |"


def test_the_table_has_every_kind_of_recipe():
    text = (HERE / "README.md").read_text()
    assert f"| on the stand-in | {' | '.join(on_standin.STAGES)} |" in text
    assert [line for line in text.splitlines() if line.endswith(" yes | yes | yes |")] == [
        row(name, on_standin.STAGES) for name in kinds()
    ]


@pytest.fixture(scope="module")
def coarse(request, tmp_path_factory):
    """Recipe -> what it has come to without float64."""
    names = chosen(request, "test_a_device_without_float64_will_do")
    made = child(tmp_path_factory.mktemp("coarse"), "recipes", "--without-float64", *names)
    return {course["recipe"]: course for course in made}


@pytest.mark.slow
@pytest.mark.parametrize("name", COARSE)
def test_a_device_without_float64_will_do(name, coarse):
    check(coarse[name])


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Command -> its exit code, output, and most bytes on the device."""
    return {done["command"]: done for done in child(tmp_path_factory.mktemp("commands"), "commands")}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_on_the_device(name, commands):
    done = commands[name]
    assert done["code"] == 0, done["said"]
    assert done["bytes"] > 100_000 or name in ON_THE_CPU


@pytest.mark.slow
def test_every_method_keeps_its_contract_on_the_device_and_no_iteration_waits(tmp_path):
    script, said = tmp_path / "again.py", tmp_path / "said.txt"
    script.write_text("import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))")
    words = ["--standin", "-q", "-p", "no:cacheprovider", "methods/test_contract.py", "data/test_devices.py"]
    assert python(script, *words, folder=HERE, out=said, err=said) == 0, said.read_text()[-3000:]


def test_what_the_stand_in_refuses_and_counts(tmp_path):
    script, said = tmp_path / "refuses.py", tmp_path / "said.txt"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE / 'support')!r})\n{REFUSES}")
    assert python(script, folder=tmp_path, out=said, err=said) == 0, said.read_text()[-3000:]


REFUSES = """
import standin
import torch

device = standin.install(float64=False)

def refused(function, kind, words):
    try:
        function()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)

x, y = torch.ones(3, device=device), torch.ones(3)
refused(lambda: x + y, RuntimeError, "same device")
refused(lambda: torch.randn(3, device=device, generator=torch.Generator()), RuntimeError, "generator")
for make in (x.double, lambda: y.double().to(device), lambda: torch.zeros(3, dtype=torch.float64, device=device)):
    refused(make, TypeError, "float64")
assert not torch.randn(3, generator=torch.Generator(device).manual_seed(0), device=device).cpu().equal(
    torch.randn(3, generator=torch.Generator().manual_seed(0)))
for wait, kind in (
    (x.sum().item, "read"), (x.tolist, "read"), (lambda: bool(x.any()), "read"), (lambda: x[x > 0], "read"),
    (x.nonzero, "read"), (x.cpu, "read"), (lambda: y.to(device), "upload"), (lambda: x[[0, 1]], "upload"),
):
    with standin.waits() as found:
        wait()
    assert [w.kind for w in found][:1] == [kind], (kind, found)
with standin.waits() as found:
    (x * 2 + torch.randn_like(x)).sum()
    y.pin_memory().to(device, non_blocking=True)
    here = (x * 5).to("cpu", non_blocking=True)
assert not found and not here.equal(5 * y)  # not arrived
torch.accelerator.synchronize()
assert here.equal(5 * y)

from fewstep.device import upload
from fewstep.diffusion.schedules import VP

with device:  # where a scheduler is made on the device, its table is kept on the host all the same
    schedule = VP(torch.linspace(0.999, 0.005, 1000))
assert schedule.alpha(torch.tensor([5.0], device=device)).device.type == device.type
assert schedule.alpha(torch.tensor([5.0], device="cpu")).device.type == "cpu"
assert upload(x, "cpu").equal(torch.ones(3)) and upload(x, device) is x
"""


def test_offloaded_blocks_train_the_same_bits_in_less_memory_and_nothing_waits(tmp_path):
    script, said = tmp_path / "offloads.py", tmp_path / "said.txt"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE / 'support')!r})\n{OFFLOADS}")
    assert python(script, folder=tmp_path, out=said, err=said) == 0, said.read_text()[-3000:]


OFFLOADS = """
import standin
import torch

device = standin.install()

from fewstep.device import peak, reset_peak
from fewstep.diffusion import frozen
from fewstep.diffusion.kernels import checkpoint_blocks
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role

wide = {"block_out_channels": (64, 128), "norm_num_groups": 8, "attention_head_dim": (2, 4)}
folder = str(write_tiny_pipeline("StableDiffusionXLPipeline", "wide", **wide))

def step(recomputed, **options):
    teacher = load_teacher(folder, device=device, **options)
    for name in ("text_encoder", "text_encoder_2", "vae"):
        setattr(teacher.pipe, name, None)
    if recomputed:
        checkpoint_blocks(teacher.net)
    roles = [build_role(name, teacher.net, RoleConfig(rank=2), seed) for seed, name in enumerate(("student", "critic"))]
    assert {w.device.type for role in roles for w in role.weights.values()} == {device.type}
    reset_peak(device)
    x, t = torch.ones(1, *teacher.latent_shape, device=device), torch.tensor([500.0], device=device)
    cond = teacher.blank(1).to(device)
    found = []
    for role in roles:
        with standin.waits() as waited:
            out = teacher.denoiser.with_net(role.module).x0(x, t, cond)
            out.square().mean().backward()
        assert not waited, waited[0]
        found += [out.detach(), *(w.grad for w in role.weights.values())]
    return [value.cpu() for value in found], peak(device), frozen.numel(teacher.net)

for recomputed in (False, True):
    (plain, most, count), (off, less, _) = (step(recomputed, offload=wish) for wish in (False, True))
    assert all(a.equal(b) for a, b in zip(plain, off, strict=True)) and any(g.any() for g in off[1:])
    assert less < most - 0.8 * 4 * count, (most, less, count)
"""
