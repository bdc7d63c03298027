"""Multi-student distillation through real files: training, export, stock diffusers, the command line, resuming."""

import json
import shutil
from dataclasses import replace

import processes
import pytest
import torch
from processes import without_fewstep
from routing import Encoded
from safetensors.torch import load_file, save_file
from test_distributed import state
from test_end_to_end import PROMPTS, REFUSE, stock_latents, tiny

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.diffusion.student import Student
from fewstep.errors import FewstepError, RecipeError
from fewstep.export import (
    ExportError,
    export_student,
    load_exported,
    stock_call,
    stock_sample,
    trainer_sample,
    verify,
)
from fewstep.export.routed import RoutedPipeline
from fewstep.export.write import check_exportable
from fewstep.methods.router import RoutedStudent, Router
from fewstep.process import Process
from fewstep.recipe import RoleConfig
from fewstep.runs.checks import check_data
from fewstep.runs.session import Session, execute, reexport, resume
from fewstep.teachers import load_teacher
from fewstep.teachers.generate import generate
from fewstep.teachers.resize import resize
from fewstep.training.roles import averaged, build_role

# Without decay, which counts back from the end of the run, half a run is the beginning of a whole one.
WORDS = (
    *("--evaluation.num", "0", "--critic.kind", "lora", "--method.guidance_scale", "1.5"),
    *("--student.decay", "0"),
)


@pytest.fixture(scope="module")
def run(tiny_sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi")
    recipe = tiny("emoji_multi_student_1step", tiny_sdxl, folder, *WORDS, "--train.batch_size", "4")
    return execute(recipe), recipe


def trained(recipe):
    session = Session(recipe, *check_data(recipe), Process())
    assert session.trainer.restore()
    return session


def test_a_run_leaves_a_part_for_every_student_and_a_router(run):
    folder, recipe = run
    export = folder / "export"
    files = {p.relative_to(export).as_posix() for p in export.rglob("*") if p.is_file()}
    each = (
        "pytorch_lora_weights.safetensors",
        "scheduler/scheduler_config.json",
        "fewstep.json",
        "README.md",
    )
    assert {f"part_{k}/{name}" for k in (1, 2) for name in each} <= files
    assert {"router.safetensors", "router.json", "fewstep.json", "README.md"} <= files
    record = json.loads((export / "fewstep.json").read_text())
    assert (record["parts"], record["routed_on"], record["num_steps"]) == (["part_1", "part_2"], "pooled", 1)
    assert json.loads((export / "router.json").read_text())["sizes"] == [3, 2]
    assert not list(folder.rglob("*.part"))
    assert (folder / "samples" / "step_000004.png").is_file()
    assert (folder / "health" / "step_000004.png").is_file()


def test_parts_have_names_of_their_own_and_what_routes_them_is_nothing_that_comfyui_reads(run):
    export = run[0] / "export"
    assert "comfyui" not in json.loads((export / "fewstep.json").read_text())
    assert "ComfyUI" not in (export / "README.md").read_text()
    records = [json.loads((export / part / "fewstep.json").read_text()) for part in ("part_1", "part_2")]
    assert [record["title"] for record in records] == ["run_part_1", "run_part_2"]
    files = [name for record in records for name in record["comfyui"]["files"].values()]
    assert len(set(files)) == 2 and all("part_" in name for name in files)


def test_one_image_of_a_prompt_is_all_that_is_routed(run):
    pipe, record = load_exported(run[0] / "export")
    with pytest.raises(FewstepError, match=r"^num_images_per_prompt: 2: .* repeat a prompt"):
        pipe(PROMPTS, num_images_per_prompt=2, **record["call"])


def test_it_gives_a_tuple_where_a_dict_is_not_wanted(run):
    pipe, record = load_exported(run[0] / "export")
    g = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    asked = {**record["call"], "output_type": "np"}
    (images,) = pipe(PROMPTS[:2], generator=g(), return_dict=False, **asked)
    assert (images == pipe(PROMPTS[:2], generator=g(), **asked).images).all()


def test_keys_of_kohya_are_refused_where_a_part_has_none(teachers):
    teacher = teachers("SANA")
    router, times = Router(2), [teacher.denoiser.schedule.at(torch.ones(1)).item()]
    router.fit(Encoded(teacher.encode(PROMPTS)))
    parts = [
        Student(teacher.denoiser.with_net(teacher.net), times, roles=[name]) for name in ("one", "other")
    ]
    roles = [RoleConfig(rank=2), RoleConfig(rank=2)]
    check_exportable(RoutedStudent(parts, router), roles, teacher)
    with pytest.raises(RecipeError, match=r"^export\.kohya: true: .*SanaPipeline"):
        check_exportable(RoutedStudent(parts, router), roles, teacher, kohya=True)


def test_training_trainer_and_export_route_alike_and_make_the_same_samples(run, tiny_sdxl):
    folder, recipe = run
    session = trained(recipe)
    router, student = session.method.router, session.method.student
    pipe, record = load_exported(folder / "export")
    assert isinstance(pipe, RoutedPipeline)
    cond = session.teacher.encode(PROMPTS)
    parts = router(cond)
    assert sorted(parts.tolist()) == [0, 0, 0, 1, 1]
    assert parts.equal(pipe.route(PROMPTS)) and parts.equal(Router.load(folder / "export")(cond))
    assert {int(router(session.teacher.encode([p]))) for p in session.export_prompts} == {
        0,
        1,
    }  # both verified
    with averaged(*session.experts):
        own = trainer_sample(student, session.teacher, PROMPTS)
        alone = [trainer_sample(one, session.teacher, PROMPTS) for one in student.students]
    stock = stock_sample(pipe, record, session.teacher, PROMPTS)
    assert (own - stock).abs().max() < 1e-4
    for i, part in enumerate(parts.tolist()):
        assert (own[i] - alone[part][i]).abs().max() < 1e-5
        assert (own[i] - alone[1 - part][i]).abs().max() > 1e-3  # otherwise nothing would be proved
    part = load_exported(folder / "export" / "part_2")
    assert (stock_sample(*part, session.teacher, PROMPTS) - alone[1]).abs().max() < 1e-4


def test_a_part_runs_in_stock_diffusers_without_fewstep(run, tiny_sdxl, tmp_path):
    folder, recipe = run
    latents, printed = stock_latents(tiny_sdxl, folder / "export" / "part_1", tmp_path / "latents.pt", 1)
    assert "[799]" in printed
    session = trained(recipe)
    with averaged(*session.experts):
        own = trainer_sample(session.method.student.students[0], session.teacher, ["red apple", "a cat"])
    assert (latents - own).abs().max() < 1e-4


def test_the_snippet_of_the_model_card_routes_without_fewstep(run, tmp_path):
    folder, _ = run
    code = (folder / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code += f"\nprint([route(prompt) for prompt in {PROMPTS!r}], pipe.get_active_adapters())\n"
    script = tmp_path / "use.py"
    script.write_text(REFUSE + code)
    printed = without_fewstep(script, folder / "export")
    (folder / "export" / "image.png").unlink()
    pipe, record = load_exported(folder / "export")
    adapters = [record["parts"][k] for k in pipe.route(PROMPTS)]
    asked = record["parts"][int(pipe.route([record["prompt"]])[0])]
    assert printed.strip().endswith(f"{adapters} {[asked]}")


def test_another_router_is_noticed(run, tiny_sdxl, tmp_path):
    folder, _ = run
    teacher = load_teacher(str(tiny_sdxl))
    pipe, record = load_exported(folder / "export")
    own = stock_sample(pipe, record, teacher, PROMPTS)
    wrong = tmp_path / "export"
    shutil.copytree(folder / "export", wrong)
    tensors = load_file(wrong / "router.safetensors")
    save_file({name: -value for name, value in tensors.items()}, wrong / "router.safetensors")
    assert verify(folder / "export", own, teacher, PROMPTS, 1e-4, "float32") < 1e-4
    with pytest.raises(ExportError):
        verify(wrong, own, teacher, PROMPTS, 1e-4, "float32")


def test_images_are_the_same_whatever_the_batch_size(run):
    folder, _ = run
    pipe, record = load_exported(folder / "export")
    options = lambda generators: stock_call(pipe, record, generators)  # noqa: E731
    together, _ = generate(pipe, PROMPTS, options, batch_size=5, quiet=True)
    alone, _ = generate(pipe, PROMPTS, options, batch_size=1, quiet=True)
    assert together.shape == (5, 32, 32, 3) and abs(together.astype(int) - alone).max() <= 1
    pictures = pipe(PROMPTS[0], num_inference_steps=1).images
    assert len(pictures) == 1 and pictures[0].size == (32, 32)


def test_the_command_line_samples_and_measures_it(run, tiny_sdxl, tmp_path):
    folder, _ = run
    out = tmp_path / "grid.png"
    words = ["--prompt", "a cat", "--prompt", "red apple", "--out", str(out)]
    assert main(["sample", str(folder), *words]) == 0
    assert out.stat().st_size > 0
    from fewstep.evaluation.models import open_model

    model = open_model(str(tiny_sdxl), lora=str(folder))
    call = model.prepare(1)
    call = model.arguments(call, [torch.Generator().manual_seed(0)])
    assert model.pipe(["a cat"], output_type="np", **call).images.shape == (1, 32, 32, 3)
    assert model.prepare(1, "ddim")["guidance_scale"] == 0.0 and len(model.fingerprint()) == 64


def test_a_run_is_evaluated(tiny_sdxl, tmp_path):
    words = ("--evaluation.num", "4", "--evaluation.named", "2", "--evaluation.prompts", "null")
    words = (*WORDS, *words, "--evaluation.floor_steps", "[]", "--evaluation.teacher_steps", "2")
    folder = execute(tiny("emoji_multi_student_1step", tiny_sdxl, tmp_path, *words))
    rows = json.loads((folder / "eval" / "table.json").read_text())["rows"]
    assert any(row["kind"] == "student" and row["speed"]["nfe"] == 1 for row in rows)
    card = (folder / "export" / "README.md").read_text()
    reexport(folder)
    assert "## Measured" in card and (folder / "export" / "README.md").read_text() == card


def test_a_run_resumes_exactly_with_the_same_router(run, tiny_sdxl, tmp_path):
    straight, recipe = run
    words = (*WORDS, "--train.batch_size", "4")
    recipe = tiny("emoji_multi_student_1step", tiny_sdxl, tmp_path, *words)
    execute(replace(recipe, train=replace(recipe.train, steps=2)))
    resolved = tmp_path / "run" / "recipe.yaml"
    resolved.write_text(recipes.dump(recipe))
    broken = resume(resolved.parent)
    a, b = (load_file(f / "checkpoints" / "step_00000004" / "state.safetensors") for f in (straight, broken))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    a, b = (load_file(f / "export" / "router.safetensors") for f in (straight, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
def test_two_processes_train_what_one_trains_with_accumulation(tiny_sdxl, tmp_path):
    """Two rows each, so that a part has none on one process now and then."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    words = (*WORDS, "--student.ema", "0.5", "--train.accumulate", "2")
    one = execute(tiny("emoji_multi_student_1step", tiny_sdxl, tmp_path / "one", *words))
    words = (*words, "--train.accumulate", "1", "--train.shard", "2", "--train.device", "cpu")
    recipe = tiny("emoji_multi_student_1step", tiny_sdxl, tmp_path / "two", *words)
    (tmp_path / "two.yaml").write_text(recipes.dump(recipe))
    processes.run(2, [("execute", str(tmp_path / "two.yaml"))], tmp_path)
    first, second = state(one, 4), state(tmp_path / "two" / "run", 4)
    assert first.keys() == second.keys()
    weights = [name for name in first if "/weight/" in name]
    assert max((first[n] - second[n]).abs().max() for n in weights) < 2e-4
    for role in ("student_1", "student_2"):
        moved = [n for n in weights if n.startswith(role) and "lora_B" in n]
        assert max(first[n].abs().max() for n in moved) > 1e-3


def test_tokens_route_where_there_is_no_pooled_embedding_and_the_data_free_method_needs_no_images(
    tiny_sd15, tmp_path
):
    words = (*WORDS, "--method.gan_weight", "0", "--method.parts", "3", "--data.images", "null")
    words = (*words, "--teacher.pipeline_class", "null", "--method.start", "null", "--train.batch_size", "5")
    folder = execute(tiny("emoji_multi_student_1step", tiny_sd15, tmp_path, *words)) / "export"
    record = json.loads((folder / "fewstep.json").read_text())
    assert record["routed_on"] == "embeds" and len(record["parts"]) == 3
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "encoded[0].mean(0)" in code
    script = tmp_path / "use.py"
    script.write_text(REFUSE + code + f"\nprint([route(p) for p in {PROMPTS!r}])")
    printed = without_fewstep(script, folder)
    pipe, _ = load_exported(folder)
    assert str([record["parts"][k] for k in pipe.route(PROMPTS)]) in printed


@pytest.mark.parametrize(
    "words, message",
    [
        (("--method.parts", "1"), r"method\.parts: 1: expected at least 2"),
        (("--method.parts", "6"), r"method\.parts: 6 with 5 distinct prompts: .* lower method\.parts"),
        (("--roles.student_2.kind", "full"), r"roles\.student\.kind: lora and full: expected the same"),
        (
            ("--method.student_network", "{}", "--method.tsm_share", "1"),
            r"method\.tsm_share: 1\.0: expected 0 <",
        ),
        (
            ("--method.student_network", "{layers_per_blok: 1}"),
            r"^method\.student_network\.layers_per_blok: .*mean layers_per_block",
        ),
        (
            ("--method.student_network", "{in_channels: 3}"),
            r"^method\.student_network: .*cannot take the teacher's",
        ),
        (
            ("--method.student_network", "{block_out_channels: [8, 8]}"),
            r"roles\.student\.kind: lora: .* use full",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(words, message, tiny_sdxl, tmp_path):
    with pytest.raises(RecipeError, match=message):
        execute(tiny("emoji_multi_student_1step", tiny_sdxl, tmp_path, *WORDS, *words))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- smaller students
SMALL = (
    *(*WORDS, "--student.kind", "full", "--method.student_network", "{block_out_channels: [4, 8]}"),
    *("--train.batch_size", "4"),
)


@pytest.fixture(scope="module")
def small_run(tiny_sdxl, tmp_path_factory):
    recipe = tiny("emoji_multi_student_1step", tiny_sdxl, tmp_path_factory.mktemp("small"), *SMALL)
    return execute(recipe), recipe


def test_smaller_students_are_exported_whole_and_routed(small_run, tiny_sdxl):
    folder, recipe = small_run
    session = trained(recipe)
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    sizes = {name: count(role.module) for name, role in session.roles.items()}
    assert sizes["student_1"] == sizes["student_2"] < 0.5 * count(session.teacher.net)
    pipe, record = load_exported(folder / "export")
    assert isinstance(pipe, RoutedPipeline) and record["kind"] == "full"
    assert count(pipe.unet) == 2 * sizes["student_1"]  # moved, hashed and counted together
    with averaged(*session.experts):
        own = trainer_sample(session.method.student, session.teacher, PROMPTS)
        alone = [trainer_sample(one, session.teacher, PROMPTS) for one in session.method.student.students]
    assert (own - stock_sample(pipe, record, session.teacher, PROMPTS)).abs().max() < 1e-4
    parts = session.method.router(session.teacher.encode(PROMPTS)).tolist()
    assert all((own[i] - alone[1 - part][i]).abs().max() > 1e-3 for i, part in enumerate(parts))
    part = load_exported(folder / "export" / "part_2")
    assert (stock_sample(*part, session.teacher, PROMPTS) - alone[1]).abs().max() < 1e-4


def test_the_snippet_of_smaller_students_routes_without_fewstep(small_run, tmp_path):
    folder, _ = small_run
    code = (folder / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code += "\nprint(route(prompt), pipe.unet is networks[route(prompt)], networks.keys())\n"
    script = tmp_path / "use.py"
    script.write_text(REFUSE + code)
    printed = without_fewstep(script, folder / "export")
    pipe, record = load_exported(folder / "export")
    asked = record["parts"][int(pipe.route([record["prompt"]])[0])]
    assert printed.strip().endswith(f"{asked} True dict_keys({record['parts']})")


def test_a_run_of_smaller_students_resumes_exactly_across_the_end_of_their_first_stage(
    small_run, tiny_sdxl, tmp_path
):
    straight, _ = small_run
    recipe = tiny("emoji_multi_student_1step", tiny_sdxl, tmp_path, *SMALL)
    session = Session(recipe, *check_data(recipe), Process())
    session.folder.mkdir()
    (session.folder / "recipe.yaml").write_text(recipes.dump(recipe))
    session.trainer.iterate()
    session.trainer.save()
    broken = resume(session.folder)
    a, b = (load_file(f / "checkpoints" / "step_00000004" / "state.safetensors") for f in (straight, broken))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_layers_that_a_smaller_student_shares_with_the_teacher_start_as_its_own(tiny_sdxl):
    teacher = load_teacher(str(tiny_sdxl))
    same = resize(teacher, {}, "method.student_network").state_dict()
    assert all(value.equal(same[name]) for name, value in teacher.net.state_dict().items())
    small = resize(teacher, {"block_out_channels": (4, 16), "norm_num_groups": 2}, "method.student_network")
    own, theirs = small.state_dict(), teacher.net.state_dict()
    kept = [name for name in own if name in theirs and own[name].shape == theirs[name].shape]
    assert any("attn" in name for name in kept) and len(kept) < len(own)
    assert all(own[name].equal(theirs[name]) for name in kept)
    again = resize(teacher, {"block_out_channels": (4, 16), "norm_num_groups": 2}, "x").state_dict()
    assert all(value.equal(again[name]) for name, value in own.items())  # on every process alike


ROUTED = [
    "SD 1.5",
    "SDXL",
    "SD 3",
    "FLUX.1-dev",
    "FLUX.2-dev",
    "FLUX.2-klein",
    "Chroma",
    "Lumina 2",
    "HiDream",
    "SANA",
    "PixArt-alpha",
    "PixArt-Sigma",
]


LABELLED = ("EDM",)
WHOLE = ("SDXL", "FLUX.2-klein")  # of which whole students leave in the ordinary suite too


@pytest.mark.parametrize(
    "name, kind",
    [(name, "lora") for name in [*ROUTED, *LABELLED]]
    + [pytest.param(n, "full", marks=[] if n in WHOLE else pytest.mark.long) for n in [*ROUTED, *LABELLED]],
)
def test_every_class_routes_as_in_training_and_so_does_its_card(name, kind, teachers, tmp_path, monkeypatch):
    teacher = teachers(name)
    prompts = ["red apple", "a dog on a skateboard", "blue square", "a cat"]
    if name in LABELLED:
        prompts = ["1", "7", "3", "9"]
    roles = [build_role(n, teacher.net, RoleConfig(kind=kind, rank=2), seed=len(n)) for n in ("one", "other")]
    start = teacher.denoiser.schedule.at(torch.ones(1)).item()
    parts = [Student(teacher.denoiser.with_net(r.module), [start], roles=[r.name]) for r in roles]
    for weight in roles[1].weights.values():
        weight.data.add_(
            0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(weight)))
        )
    router = Router(2)
    router.fit(Encoded(teacher.encode(prompts)))
    student = RoutedStudent(parts, router)
    weights = {role.name: role.final_weights() for role in roles}
    own = trainer_sample(student, teacher, prompts)
    about = {"method": "x", "prompt": prompts[1]}
    folder = export_student(tmp_path / "e", teacher, student, weights, [r.config for r in roles], about=about)
    assert verify(folder, own, teacher, prompts, 1e-3, "float32") < 1e-3
    monkeypatch.chdir(folder)
    names = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert (folder / "image.png").is_file()
    routed = [names["route"](int(prompt) if name in LABELLED else prompt) for prompt in prompts]
    leaves = [f"part_{k + 1}" for k in router(teacher.encode(prompts)).tolist()]
    assert routed == leaves and len(set(routed)) == 2


@pytest.mark.parametrize("name", ["DiT", "UNet2D by class"])
def test_a_pipeline_that_draws_its_own_noise_is_refused(name, teachers):
    teacher, router = teachers(name), Router(2)
    parts = [Student(teacher.denoiser, [999], roles=[n]) for n in ("one", "other")]
    with pytest.raises(
        RecipeError, match=r"^method\.name: multi_student: the call of a \w+ takes no latents"
    ):
        check_exportable(RoutedStudent(parts, router), [RoleConfig(rank=2)] * 2, teacher)
