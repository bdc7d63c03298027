"""Which program reads which export: the table on the page of exports, where every cell is shown by a test.

``python tests/export/test_readers.py`` writes the table anew.
"""

import ast
import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from fewstep.diffusion.student import Student
from fewstep.export import export_student, load_exported
from fewstep.recipe import RoleConfig
from fewstep.teachers.load import adapters
from fewstep.training.roles import build_role

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "concepts" / "export.md"
BEGIN, END = "<!-- table of tests/export/test_readers.py -->\n", "<!-- end of table -->\n"
READERS = ("stock diffusers", "`fewstep sample`, `eval`", "ComfyUI, A1111", "peft alone")

HERE, COMFY, ROUTED = "export/test_readers.py::", "export/test_comfyui.py::", "export/test_routed.py::"
DAY, TEACHERS, BESIDE = (
    "runs/test_end_to_end.py::",
    "teachers/test_teachers.py::",
    "export/test_beside_others.py::",
)
UNKNOWN = COMFY + "test_names_for_a_network_that_it_does_not_know_are_refused_by_name"
AS_IT_IS = COMFY + "test_a_file_that_is_read_as_it_is_needs_no_other"
HALF = DAY + "test_a_half_precision_teacher_and_export_are_verified_too"
SPRINT = "export/test_sprint_export.py::test_stock_diffusers_samples_it_at_every_number_of_steps"
TOKENS = "tokens/test_autoregressive.py::test_a_run_ends_with_a_verified_export_that_samples"
PEFT, NO_ADAPTER = HERE + "test_peft_alone_reads_a_lora", HERE + "test_a_whole_student_has_no_adapter"
FOLLOW = "export/test_targets.py::test_experts_that_are_networks_follow_one_another"
# Export -> for each reader whether it reads it, and the test that shows it.
ROWS = {
    "a LoRA, `pytorch_lora_weights.safetensors`": [
        ("yes, and fused", DAY + "test_fused_weights_equal_unfused_and_kohya_keys_mean_the_same"),
        ("yes", DAY + "test_an_exported_student_is_sampled_from_the_command_line"),
        (
            "SD 3, Flux, Chroma, Qwen-Image, Z-Image, HiDream: yes; SD 1.5, SDXL: no, the file of `--kohya`",
            AS_IT_IS,
        ),
        ("yes, without its prefix", PEFT),
    ],
    "the same with `export.dtype: float16`": [
        ("yes", HALF),
        (
            "yes",
            "export/test_before_training.py::test_half_precision_comes_back_bit_for_bit_where_students_share_it",
        ),
        ("as above", AS_IT_IS),
        ("yes", PEFT),
    ],
    "`kohya/NAME.safetensors`, of `--kohya`": [
        (
            "SD 1.5, SDXL: yes; Flux: of attention",
            COMFY + "test_stock_diffusers_reads_the_names_of_attention_back",
        ),
        ("no need: the file above", DAY + "test_fused_weights_equal_unfused_and_kohya_keys_mean_the_same"),
        (
            "yes, by its own list of names",
            COMFY + "test_the_written_file_holds_accepted_names_and_the_same_update",
        ),
        ("no", HERE + "test_peft_does_not_know_the_names_of_comfyui"),
    ],
    "a LoRA merged, `pipeline/` (PixArt, DiT, DDPM)": [
        ("yes", TEACHERS + "test_stock_diffusers_samples_a_student_of_a_table"),
        ("yes", TEACHERS + "test_a_sample_is_the_same_in_any_batch"),
        ("no", UNKNOWN),
        ("no adapter", NO_ADAPTER),
    ],
    "a student trained whole, `pipeline/`": [
        ("yes", "export/test_trajectory_export.py::test_what_a_student_is_told_is_folded_into_stock_weights"),
        ("yes", NO_ADAPTER),
        (
            "its network, of SD, SDXL, SD 3, Flux, Qwen-Image, HiDream",
            HERE + "test_a_whole_student_has_no_adapter",
        ),
        ("no adapter", NO_ADAPTER),
    ],
    "experts, a LoRA each and a callback": [
        ("yes", DAY + "test_experts_and_other_noise_are_verified_and_their_snippet_runs_in_stock_diffusers"),
        ("yes, and a style beside them", BESIDE + "test_fewstep_itself_leaves_a_style_alone"),
        ("a file each, one sampler behind another", BESIDE + "test_files_of_experts_have_names_of_their_own"),
        ("each alone", PEFT),
    ],
    "experts, a network each (trained whole, or PixArt, DiT, DDPM)": [
        ("by the card's program", FOLLOW),
        ("yes", FOLLOW),
        (
            "of the classes above, a file each, one sampler behind another",
            HERE + "test_experts_that_were_trained_whole_have_files_of_their_own_names",
        ),
        ("no adapter", FOLLOW),
    ],
    "parts behind a router": [
        (
            "each part; all by the card's program",
            ROUTED + "test_the_snippet_of_the_model_card_routes_without_fewstep",
        ),
        ("yes", ROUTED + "test_the_command_line_samples_and_measures_it"),
        ("each part alone", ROUTED + "test_a_run_leaves_a_part_for_every_student_and_a_router"),
        ("each part alone", ROUTED + "test_a_run_leaves_a_part_for_every_student_and_a_router"),
    ],
    "SANA-Sprint, `pipeline/` with SCM": [
        ("yes", SPRINT),
        ("yes", SPRINT),
        ("no", UNKNOWN),
        ("no adapter", NO_ADAPTER),
    ],
    "a student of tokens, `pipeline/`": [
        ("no, the class is fewstep's", TOKENS),
        ("yes", TOKENS),
        ("no", HERE + "test_what_comfyui_does_not_know_has_no_names_for_it"),
        ("no adapter", HERE + "test_what_comfyui_does_not_know_has_no_names_for_it"),
    ],
}


def document():
    lines = [("", *READERS), ("---",) * (1 + len(READERS))]
    lines += [(name, *(said for said, _ in cells)) for name, cells in ROWS.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_page_has_the_table():
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0] == document()


def test_every_cell_names_a_test_that_is_there():
    there = {}
    for cell in (test for cells in ROWS.values() for _, test in cells):
        file, _, name = cell.partition("::")
        if file not in there:
            body = ast.parse((TESTS / file).read_text()).body
            there[file] = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        assert name.startswith("test_") and name in there[file], cell
    assert {len(cells) for cells in ROWS.values()} == {len(READERS)}


# ------------------------------------------------------------------------------------ what no other test shows of it
def exported(teacher, folder, config, experts=("student",), **options):
    """Of experts with random weights, one or several."""
    roles = [build_role(name, teacher.net, config) for name in experts]
    for k, role in enumerate(roles):
        for weight in role.weights.values():
            weight.data = weight.data + 0.05 * torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(k)
            )
    nets = [teacher.denoiser.with_net(role.module) for role in roles]
    student = Student(nets, [999, 499][: len(nets)], roles=list(experts))
    weights = {role.name: role.final_weights() for role in roles}
    about = {"method": "x", "title": "mine"}
    return export_student(folder, teacher, student, weights, [config] * len(roles), about=about, **options)


def added(net, by):
    """What adapters of a name add to the weight of each layer."""
    layers = {name: layer for name, layer in net.named_modules() if by in getattr(layer, "lora_A", {})}
    return {name: layer.get_delta_weight(by) for name, layer in layers.items()}


@pytest.mark.parametrize("dtype, experts", [("float32", ("student",)), ("float16", ("first", "second"))])
def test_peft_alone_reads_a_lora(dtype, experts, sdxl, tmp_path):
    folder = exported(
        sdxl, tmp_path / "e", RoleConfig(rank=4, alpha=2, targets=["to_q", "to_v"]), experts, dtype=dtype
    )
    pipe = load_exported(folder)[0]
    for name in experts:
        file = (folder if len(experts) == 1 else folder / name) / "pytorch_lora_weights.safetensors"
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["lora_adapter_metadata"])
        net = copy.deepcopy(sdxl.net)
        inject_adapter_in_model(
            LoraConfig(**{k.removeprefix("unet."): v for k, v in about.items()}), net, "own"
        )
        state = {key.removeprefix("unet."): value for key, value in load_file(file).items()}
        assert not set_peft_model_state_dict(net, state, "own").unexpected_keys
        ours = added(net, "own")
        theirs = added(pipe.unet, name if len(experts) > 1 else "default_0")
        assert ours.keys() == theirs.keys() and ours
        assert all((ours[k] - theirs[k].to(ours[k])).abs().max() < 1e-3 * ours[k].abs().max() for k in ours)


def test_peft_does_not_know_the_names_of_comfyui(sdxl, tmp_path):
    config = RoleConfig(rank=2, targets=["to_q"])
    folder = exported(sdxl, tmp_path / "e", config, kohya=True)
    net = copy.deepcopy(sdxl.net)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), net, "own")
    state = load_file(folder / "kohya" / "mine.safetensors")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    set_peft_model_state_dict(net, state, "own")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_whole_student_has_no_adapter(sdxl, tmp_path):
    folder = exported(sdxl, tmp_path / "e", RoleConfig(kind="full"))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    network = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert network in names and not [name for name in names if "lora" in name]
    assert not [key for key in load_file(folder / network) if "lora" in key]
    assert (
        f"`{network}`, where it is one file, goes to `models/diffusion_models`"
        in (folder / "README.md").read_text()
    )
    pipe, record = load_exported(folder)
    assert record["kind"] == "full" and not hasattr(pipe.unet, "peft_config")


def test_experts_that_were_trained_whole_have_files_of_their_own_names(sdxl, tmp_path):
    folder = exported(sdxl, tmp_path / "e", RoleConfig(kind="full"), ("first", "second"))
    files = json.loads((folder / "fewstep.json").read_text())["comfyui"]["files"]
    assert files == {
        "pipeline/unet/diffusion_pytorch_model.safetensors": "mine_first.safetensors",
        "second/diffusion_pytorch_model.safetensors": "mine_second.safetensors",
    }
    assert all((folder / name).is_file() for name in files)
    card = (folder / "README.md").read_text()
    assert all(f"`{source}`, where it is one file, goes to" in card for source in files)
    assert "a KSampler (Advanced) for each, with the file of that expert" in card


def test_what_comfyui_does_not_know_has_no_names_for_it():
    known = {name for name, adapter in adapters().items() if adapter.comfyui}
    families = (
        "StableDiffusion",
        "StableDiffusionXL",
        "StableDiffusion3",
        "Flux",
        "QwenImage",
        "QwenImageEditPlus",
        "ZImage",
        "Chroma",
        *("Flux2", "Flux2Klein", "Krea2", "QwenImage21", "HiDreamImage"),
    )
    assert known == {f"{name}Pipeline" for name in families}
    assert {"VARPipeline", "LlamaGenPipeline", "SanaPipeline", "DiTPipeline"} <= set(adapters()) - known


if __name__ == "__main__":
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(head + BEGIN + document() + END + rest.split(END)[1])
