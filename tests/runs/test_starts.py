"""Roles that start from an earlier run or its export: to the last bit what that ended with, or one line why not."""

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from toys import SD, Mlp, fit, toy

from fewstep import recipe as recipes
from fewstep.cli import main
from fewstep.cost import plan
from fewstep.errors import FewstepError, RecipeError
from fewstep.methods.boot import BOOT
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.hyper_sd import HyperSD
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.process import Process
from fewstep.recipe import DataConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig
from fewstep.runs.build import build
from fewstep.runs.checks import check_data
from fewstep.runs.library import load_recipe, recipe_files
from fewstep.runs.session import Session, execute, resume
from fewstep.runs.smoke import smoke
from fewstep.runs.starts import check_starts, find
from fewstep.teachers import load_teacher
from fewstep.teachers.analytic import GaussianMixture
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training import checkpoint
from fewstep.training.roles import Role

# Half the strength, so that what an export folds in comes out again to the last bit.
ROLES = {
    "lora": RoleConfig(rank=4, alpha=2.0, lr=1e-2, targets=["to_q", "conv1"]),
    "full": RoleConfig(kind="full", lr=1e-3),
}
KINDS = sorted(ROLES)


def recipe_of(teacher, folder: Path, method=None, steps=2, **roles) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("a cat\na dog\nred apple\n")
    return Recipe(
        output=str(folder / "run"),
        teacher=TeacherConfig(path=str(teacher), attention="math"),
        method=method or DMD2.Config(num_steps=1, start=623, critic_steps=1, gan_weight=0.0),
        data=DataConfig(prompts=str(folder / "prompts.txt")),
        train=TrainConfig(
            steps=steps, batch_size=2, log_every=1, sample_every=0, checkpoint_every=1, device="cpu"
        ),
        roles=roles,
        samples=SampleConfig(count=1, columns=1, teacher_steps=1),
    )


@pytest.fixture(scope="module", params=KINDS)
def first(request, tiny_sd15, tmp_path_factory):
    """A finished run: (its kind, its folder, what it ended with)."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    role = ROLES[kind]
    run = execute(recipe_of(tiny_sd15, folder, student=replace(role, ema=0.5), critic=role))
    ended = load_file(checkpoint.every(run / "checkpoints")[-1] / "state.safetensors")
    return kind, run, ended


def started(recipe: Recipe) -> Session:
    return Session(recipe, *check_data(recipe), Process())


def of(ended: dict, role: str, part: str) -> dict[str, torch.Tensor]:
    return {n.split("/", 2)[2]: value for n, value in ended.items() if n.startswith(f"{role}/{part}/")}


def equal(weights: dict, expected: dict) -> bool:
    return weights.keys() == expected.keys() and all(w.equal(expected[n]) for n, w in weights.items())


# ------------------------------------------------------------------------------------------------------------ a chain
@pytest.mark.parametrize("place", ["run", "checkpoint", "export"])
def test_a_run_starts_with_what_another_ended_with(first, place, tiny_sd15, tmp_path):
    kind, run, ended = first
    places = {"run": run, "checkpoint": run / "checkpoints" / "step_00000002", "export": run / "export"}
    student = replace(ROLES[kind], ema=0.9, start_from=str(places[place]))
    session = started(recipe_of(tiny_sd15, tmp_path, student=student, critic=ROLES[kind]))
    weights, average = session.roles["student"].weights, session.roles["student"].average
    expected = of(ended, "student", "average")
    assert not equal(of(ended, "student", "weight"), expected)
    assert equal(weights, expected) and equal(average, expected)
    seen, turn = [], session.trainer.turn

    def watched(phase, batches):
        if not seen:
            seen.append({n: w.detach().clone() for n, w in session.roles["student"].weights.items()})
        return turn(phase, batches)

    session.trainer.turn = watched
    session.trainer.iterate()
    assert equal(seen[0], expected) and not equal(session.roles["student"].weights, expected)
    # The critic, which was not told, is the teacher.
    plain = started(recipe_of(tiny_sd15, tmp_path, student=ROLES[kind], critic=ROLES[kind]))
    other = started(recipe_of(tiny_sd15, tmp_path, student=student, critic=ROLES[kind]))
    assert equal(other.roles["critic"].weights, plain.roles["critic"].weights)
    assert not equal(plain.roles["student"].weights, expected)


def test_any_role_takes_the_weights_of_its_namesake(first, tiny_sd15, tmp_path):
    kind, run, ended = first
    role = replace(ROLES[kind], start_from=str(run))
    critic = started(recipe_of(tiny_sd15, tmp_path, student=ROLES[kind], critic=role)).roles["critic"]
    assert equal(critic.weights, of(ended, "critic", "weight")) and critic.average is None


def test_an_earlier_checkpoint_is_named_by_its_folder(first, tiny_sd15, tmp_path):
    kind, run, ended = first
    earlier = run / "checkpoints" / "step_00000001"
    role = replace(ROLES[kind], start_from=str(earlier))
    student = started(recipe_of(tiny_sd15, tmp_path, student=role, critic=ROLES[kind])).roles["student"]
    held = of(load_file(earlier / "state.safetensors"), "student", "average")
    assert equal(student.weights, held) and not equal(student.weights, of(ended, "student", "average"))


def test_a_run_that_started_elsewhere_ends_in_an_export_and_resumes_without_its_start(
    first, tiny_sd15, tmp_path
):
    kind, run, _ = first
    shutil.copytree(run / "export", tmp_path / "export")
    student = replace(ROLES[kind], start_from=str(tmp_path / "export"))
    recipe = recipe_of(tiny_sd15, tmp_path / "one", steps=3, student=student, critic=ROLES[kind])
    whole = execute(recipe)
    assert (whole / "export" / "fewstep.json").is_file()
    broken = tmp_path / "two"
    shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("step_00000003", "export"))
    shutil.rmtree(tmp_path / "export")
    shutil.rmtree(broken / "checkpoints" / "step_00000003", ignore_errors=True)
    resume(broken)
    states = [load_file(f / "checkpoints" / "step_00000003" / "state.safetensors") for f in (whole, broken)]
    assert equal(*states)
    # Without a checkpoint it begins again, and needs what it started from.
    shutil.rmtree(broken / "checkpoints")
    with pytest.raises(RecipeError, match=r"roles\.student\.start_from: .*/export: no such folder"):
        resume(broken)


def test_an_adapter_of_another_alpha_is_the_same_network(tiny_sd15, tmp_path):
    role = replace(ROLES["lora"], alpha=3.0)
    run = execute(recipe_of(tiny_sd15, tmp_path / "a", student=role, critic=role))
    ended = of(load_file(run / "checkpoints" / "step_00000002" / "state.safetensors"), "student", "weight")
    for place, alpha in ((run, 3.0), (run, 6.0), (run / "export", 6.0)):
        config = replace(role, alpha=alpha, start_from=str(place))
        got = (
            started(recipe_of(tiny_sd15, tmp_path / "b", student=config, critic=role))
            .roles["student"]
            .weights
        )
        for name, weight in got.items():
            factor = 3.0 / alpha if ".lora_B." in name else 1.0
            torch.testing.assert_close(weight.detach(), factor * ended[name])
        if alpha == 3.0:
            assert equal(got, ended)


def test_followers_start_as_the_student_does(first, tiny_sd15, tmp_path):
    kind, run, ended = first
    method = HyperSD.Config(segments=[2, 1], solver_steps=4, stage_teacher="previous")
    student = replace(ROLES[kind], ema=0.5, start_from=str(run))
    teacher = load_teacher(str(tiny_sd15))
    roles, _ = build(recipe_of(tiny_sd15, tmp_path, method, student=student), teacher, Process())
    assert {"student", "target", "previous"} <= roles.keys()
    for name in ("student", "target", "previous"):
        assert equal(roles[name].weights, of(ended, "student", "average"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_student_is_told_comes_from_its_run_and_not_from_its_export(kind, tiny_sd15, tmp_path):
    role = replace(ROLES[kind], targets=["to_q"])
    run = execute(recipe_of(tiny_sd15, tmp_path / "a", BOOT.Config(guidance_scale=1.0), student=role))
    ended = of(load_file(run / "checkpoints" / "step_00000002" / "state.safetensors"), "student", "weight")
    assert any(name.startswith("level_embedding.") for name in ended)

    def student(place):
        config = replace(role, start_from=str(place))
        return recipe_of(tiny_sd15, tmp_path / "b", BOOT.Config(guidance_scale=1.0), student=config)

    assert equal(started(student(run)).roles["student"].weights, ended)
    problem = r"other weights .*level_embedding\.embedder.*; expected the run of that student"
    refused(student(run / "export"), problem, False)


def test_experts_start_from_one_student_and_from_experts(tiny_sd15, tmp_path):
    """A family takes one student, and each of it its namesake where there are several, in an export too."""
    method, teacher = PhasedDMD.Config(num_steps=2, phases=2, critic_steps=1), load_teacher(str(tiny_sd15))
    role = ROLES["lora"]
    one = execute(recipe_of(tiny_sd15, tmp_path / "one", student=role, critic=role))
    ended = of(load_file(one / "checkpoints" / "step_00000002" / "state.safetensors"), "student", "weight")
    config = replace(role, start_from=str(one))
    recipe = recipe_of(tiny_sd15, tmp_path / "two", method, student=config, critic=role)
    roles, _ = build(recipe, teacher, Process())
    assert equal(roles["student_1"].weights, ended) and equal(roles["student_2"].weights, ended)
    two = execute(recipe)
    ended = load_file(two / "checkpoints" / "step_00000002" / "state.safetensors")
    for place in (two, two / "export"):
        config = replace(role, start_from=str(place))
        roles, _ = build(
            recipe_of(tiny_sd15, tmp_path / "c", method, student=config, critic=role), teacher, Process()
        )
        for name in ("student_1", "student_2"):
            assert equal(roles[name].weights, of(ended, name, "weight"))
        with pytest.raises(
            RecipeError, match=r"roles\.student\.start_from: .*(no role student|none for student);"
        ):
            check_starts(recipe_of(tiny_sd15, tmp_path / "d", student=config, critic=role))


def test_parts_of_a_routed_export_are_its_students(tmp_path):
    record = {
        "kind": "lora",
        "num_steps": 1,
        "parts": ["part_1", "part_2"],
        "teacher": "t",
        "scheduler": "LCMScheduler",
    }
    (tmp_path / "fewstep.json").write_text(json.dumps(record))
    from safetensors.torch import save_file

    for k in (1, 2):
        (tmp_path / f"part_{k}").mkdir()
        held = {"unet.a.to_q.lora_A.weight": torch.full((4, 3), float(k))}
        save_file(held, tmp_path / f"part_{k}" / "pytorch_lora_weights.safetensors")
    into = {"a.to_q.lora_A.default.weight": torch.zeros(4, 3)}
    source = find("student_2", tmp_path)
    assert source.sizes == {name: tensor.shape for name, tensor in into.items()} and source.ranks == {4}
    source.read(into)
    assert into["a.to_q.lora_A.default.weight"].eq(2).all()


# ------------------------------------------------------------------------------------------------------ starting again
def test_a_role_that_starts_again_goes_back_to_what_it_was_built_from(tmp_path):
    ring = GaussianMixture.ring(SD, radius=2.2, std=0.2)
    torch.manual_seed(0)
    net = fit(ring, Mlp(width=16), steps=5)

    def trainer_of(value):
        made = toy(PhasedDMD, PhasedDMD.Config(critic_steps=1), ring, net, steps=4, batch_size=4)
        critic = made.roles["critic"]
        critic.config = replace(critic.config, start_from="somewhere")
        for weight in critic.weights.values():
            weight.data.fill_(value)
        made = type(made)(made.method, made.roles, made.data, made.config, folder=tmp_path, quiet=True)
        made.on_sample = None
        return made

    def seen_at_restart(trainer, until):
        seen, turn = [], trainer.turn

        def watched(phase, batches):
            if phase.name == "generator_2":
                seen.append([w.detach().clone() for w in trainer.roles["critic"].weights.values()])
            return turn(phase, batches)

        trainer.turn = watched
        while trainer.progress.iteration < until:
            trainer.iterate()
        return seen[:1]

    straight = trainer_of(0.125)
    (seen,) = seen_at_restart(straight, 4)
    assert all(w.eq(0.125).all() for w in seen)
    broken = trainer_of(0.125)
    assert not seen_at_restart(broken, 1)
    broken.save()
    resumed = trainer_of(0.5)  # built without its start; the checkpoint has it
    assert resumed.restore()
    (seen,) = seen_at_restart(resumed, 4)
    assert all(w.eq(0.125).all() for w in seen)
    for role in straight.roles:
        assert equal(straight.roles[role].weights, resumed.roles[role].weights)
    resumed.roles["critic"].start = None
    with pytest.raises(
        FewstepError, match=r"holds other weights than this recipe trains, e\.g\. \['critic/start/"
    ):
        resumed.restore()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_start_a_role_goes_back_to_the_teacher(kind, tiny_sd15, tmp_path):
    teacher = load_teacher(str(tiny_sd15))
    roles, _ = build(
        recipe_of(tiny_sd15, tmp_path, student=ROLES[kind], critic=ROLES[kind]), teacher, Process()
    )
    role: Role = roles["critic"]
    before = {n: w.detach().clone() for n, w in role.weights.items()}
    role.remember()
    for weight in role.weights.values():
        weight.data += 1
    role.restart()
    assert role.start is None
    for name, weight in role.weights.items():
        assert weight.equal(before[name] + 1 if ".lora_A." in name else before[name])


# ------------------------------------------------------------------------------------------------------------ refusals
def refused(recipe: Recipe, problem: str, before: bool = True) -> None:
    """One line with the field; ``before`` anything is loaded."""
    check = check_starts if before else (lambda r: build(r, load_teacher(r.teacher.path), Process()))
    with pytest.raises(RecipeError, match=rf"^roles\.\w+\.start_from: .*{problem}") as stop:
        check(recipe)
    assert "\n" not in str(stop.value)


def test_folders_that_are_nothing_to_start_from(first, tiny_sd15, tmp_path):
    kind, run, _ = first

    def student(place, **changes):
        role = replace(ROLES[kind], start_from=str(place), **changes)
        return recipe_of(tiny_sd15, tmp_path / "b", student=role, critic=ROLES[kind])

    refused(student(tmp_path / "nothing"), "nothing: no such folder; expected a finished run or an export")
    (tmp_path / "empty").mkdir()
    refused(student(tmp_path / "empty"), "is neither a run .* nor an export")
    shutil.copytree(run, tmp_path / "early", ignore=shutil.ignore_patterns("step_00000002", "export"))
    shutil.rmtree(tmp_path / "early" / "checkpoints" / "step_00000002", ignore_errors=True)
    refused(
        student(tmp_path / "early"), r"stands at step 1 of 2; finish it with `fewstep resume .*step_00000001$"
    )
    check_starts(student(tmp_path / "early" / "checkpoints" / "step_00000001"))
    shutil.rmtree(tmp_path / "early" / "checkpoints")
    refused(student(tmp_path / "early"), "has no checkpoint; train it first, or give an export")
    shutil.copytree(run / "checkpoints" / "step_00000002", tmp_path / "lone")
    refused(student(tmp_path / "lone"), r"a checkpoint outside its run; expected RUN/checkpoints/step_\*")
    other = "full" if kind == "lora" else "lora"
    held = {"lora": "an adapter", "full": "whole weights"}
    for place in (run, run / "export"):
        refused(
            student(place, kind=other),
            f"holds {held[kind]}, and roles.student.kind is {other}; expected {kind}",
        )
        if kind == "lora":
            refused(
                student(place, rank=8), r"an adapter of rank 4, and roles\.student\.rank is 8; expected 4"
            )
            problem = r"adapts other layers than roles\.student\.targets, e\.g\. .*to_k.*; expected those of that run"
            refused(student(place, targets=["to_k"]), problem, False)
    phased = recipe_of(tiny_sd15, tmp_path / "c", PhasedDMD.Config(num_steps=2, phases=2))
    with pytest.raises(FewstepError, match="has no role node_1; there are critic, student"):
        find("node_1", run)
    assert check_starts(phased) is None


def test_weights_of_another_size_are_refused(first, tmp_path):
    kind, run, _ = first
    wide = write_tiny_pipeline("StableDiffusionPipeline", tmp_path / "wide", block_out_channels=(16, 32))
    for place in (run, run / "export"):
        role = replace(ROLES[kind], start_from=str(place))
        problem = "other weights than this role trains, e.g. .*; expected a network of the same architecture and size"
        refused(recipe_of(wide, tmp_path / "b", student=role, critic=ROLES[kind]), problem, False)


@pytest.mark.parametrize("place", ["run", "export"])
def test_damaged_files_are_refused(first, place, tiny_sd15, tmp_path):
    kind, run, _ = first
    shutil.copytree(run, tmp_path / "copy")
    found = {"run": "checkpoints/step_00000002/state.safetensors", "export": "export/**/*.safetensors"}[place]
    (path,) = (
        p for p in (tmp_path / "copy").glob(found) if "unet" in str(p) or kind == "lora" or place == "run"
    )
    path.write_bytes(path.read_bytes()[:-100])
    folder = tmp_path / "copy" if place == "run" else tmp_path / "copy" / "export"
    role = replace(ROLES[kind], start_from=str(folder))
    recipe = recipe_of(tiny_sd15, tmp_path / "b", student=role, critic=ROLES[kind])
    refused(recipe, "(cannot be read|is damaged)", False)
    if place == "run":  # of the right length, and wrong
        path.write_bytes(path.read_bytes() + bytes(100))
        refused(recipe, "state.safetensors is damaged", False)


def test_refusals_come_before_the_teacher_is_loaded(tiny_sd15, tmp_path, monkeypatch):
    def load(*_args, **_options):
        raise AssertionError("too late")

    monkeypatch.setattr("fewstep.runs.session.load_teacher", load)
    role = RoleConfig(rank=4, start_from=str(tmp_path / "nothing"))
    with pytest.raises(RecipeError, match=r"roles\.student\.start_from: .*nothing: no such folder"):
        execute(recipe_of(tiny_sd15, tmp_path, student=role))
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_teacher_is_said_to_be_one(tiny_sd15, tmp_path, capsys):
    role = ROLES["lora"]
    run = execute(recipe_of(tiny_sd15, tmp_path / "a", student=role, critic=role))
    moved = shutil.copytree(tiny_sd15, tmp_path / "elsewhere")
    for path, expected in ((tiny_sd15, False), (moved, True)):
        config = replace(role, start_from=str(run))
        build(
            recipe_of(path, tmp_path / "b", student=config, critic=role), load_teacher(str(path)), Process()
        )
        assert (
            f"is an adapter of {tiny_sd15}, and goes on {path} here" in capsys.readouterr().err
        ) == expected


# --------------------------------------------------------------------------------------------- plan, smoke, old recipes
def test_a_plan_needs_no_folder_and_smoke_says_that_it_leaves_it_out(tiny_sd15, tmp_path, capsys):
    role = replace(ROLES["lora"], start_from=str(tmp_path / "later"))
    with_start = recipe_of(tiny_sd15, tmp_path, student=role, critic=ROLES["lora"])
    without = recipe_of(tiny_sd15, tmp_path, student=ROLES["lora"], critic=ROLES["lora"])
    one, two = (plan(recipe).to_dict("h100-80gb") for recipe in (with_start, without))
    assert one == two
    small = smoke(with_start)
    assert all(config.start_from is None for config in small.roles.values())
    said = capsys.readouterr().err
    assert said == f"fewstep: note: --smoke: student starts from the teacher, not from {tmp_path / 'later'}\n"


# Recipe -> the one that its roles start from.
CHAINS = {
    "emoji_ar_dd2_from_dd1_1step": "emoji_ar_dd1_2step",
    "emoji_scm_1step": "emoji_hyper_sd_1step",
    "sd15_dmd2_1step_stage2": "sd15_dmd2_1step_stage1",
    "sd15_multi_student_1step_adm": "sd15_multi_student_1step_dm",
    "sd15_sida_1step": "sd15_sid_1step",
    "sdxl_disback_1step": "sdxl_dmd2_1step",
    "sdxl_dmd2_1step": "sdxl_regression_1step",
}


def test_every_start_of_a_recipe_is_what_another_recipe_ends_in():
    found = {}
    for name in recipe_files():
        recipe = load_recipe(name)
        starts = {role.start_from for role in recipe.roles.values()} - {None}
        if starts:
            (start,) = starts
            found[name] = first = Path(start.removesuffix("/export")).name
            before = load_recipe(first)
            assert start in (before.output, f"{before.output}/export")
            assert before.teacher == recipe.teacher
    assert found == CHAINS


@pytest.mark.parametrize(
    "name",
    [name if i in (1, 3) else pytest.param(name, marks=pytest.mark.long) for i, name in enumerate(CHAINS)],
)
def test_both_runs_of_a_chain_smoke_and_the_second_starts_from_the_first(name, tmp_path, monkeypatch):
    """As a user: ``fewstep train FIRST --smoke --output X``, then the other with ``start_from`` of X."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    recipe, first = load_recipe(name), tmp_path / "first"
    starts = [role for role, config in recipe.roles.items() if config.start_from]
    far = [f"--roles.{role}.{option}" for role in starts for option in ("lr=1e-2", "warmup=0")]
    assert main(["train", CHAINS[name], "--smoke", f"--output={first}", *far]) == 0
    place = first / "export" if recipe.role("student").start_from.endswith("/export") else first
    words = [f"--roles.{role}.start_from={place}" for role in starts]
    begun, train = {}, Session.train
    monkeypatch.setattr(
        Session,
        "train",
        lambda session, resuming: (
            begun.update({n: copy.deepcopy(role.weights) for n, role in session.roles.items()})
            or train(session, resuming)
        ),
    )
    assert main(["train", name, "--smoke", f"--output={tmp_path / 'second'}", *words]) == 0
    ended = load_file(checkpoint.every(first / "checkpoints")[-1] / "state.safetensors")
    assert starts
    for role, weights in begun.items():
        if recipes.family(role) in starts:
            held = of(ended, role, "average") or of(ended, role, "weight")
            assert weights.keys() == held.keys()
            assert all(w.allclose(held[n], rtol=2e-3, atol=1e-4) for n, w in weights.items())
    assert any(recipes.family(role) == "student" for role in begun)
    assert (tmp_path / "second" / "export" / "fewstep.json").is_file()


def test_a_plan_counts_what_a_role_goes_back_to(tiny_sd15, tmp_path):
    method, role = PhasedDMD.Config(num_steps=2, phases=2), ROLES["full"]
    held = [
        plan(recipe_of(tiny_sd15, tmp_path, method, student=ROLES["lora"], critic=critic)).parts
        for critic in (role, replace(role, start_from="runs/later"))
    ]
    before, after = ({part.name: part.weights for part in parts} for parts in held)
    assert after["critic"] == 2 * before["critic"] and after["student_1"] == before["student_1"]


def test_the_hash_of_a_recipe_knows_only_a_start_that_is_given(tiny_sd15, tmp_path):
    recipe = recipe_of(tiny_sd15, tmp_path, student=ROLES["lora"])
    plain = recipes.to_dict(recipes.from_dict(recipes.to_dict(recipe)))
    del (
        plain["output"],
        plain["roles"]["student"]["start_from"],
        plain["roles"]["student"]["ema_images"],
        plain["roles"]["student"]["inverse_sqrt"],
        plain["data"]["column"],
        plain["data"]["upscale"],
        plain["data"]["max_bad"],
        plain["data"]["cache_prompts"],
        plain["data"]["cache_images"],
        plain["data"]["cache_gb"],
        plain["data"]["encoder_device"],
        plain["data"]["shapes"],
        plain["teacher"]["variant"],
        plain["teacher"]["config"],
        plain["teacher"]["loras"],
        plain["teacher"]["quantization"],
        plain["teacher"]["offload"],
        plain["method"]["guidance_time_range"],
        plain["method"]["time_law"],
    )  # options that came later
    before = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    assert (
        recipes.digest(recipe)
        == before
        == recipes.digest(recipes.override(recipe, ["--teacher.offload", "true"]))  # trains the same
        != recipes.digest(recipes.override(recipe, ["--data.column", "text"]))
    )
    for option in ("--method.guidance_time_range=[0.0, 0.5]", "--method.time_law=log_normal"):
        assert recipes.digest(recipes.override(recipe, [option])) != before
    assert recipes.digest(recipes.override(recipe, ["--student.start_from", "runs/a"])) != recipes.digest(
        recipe
    )


def test_the_option_of_dd2_that_was_once_says_where_it_is_now(tmp_path):
    from fewstep.runs.library import load_recipe

    recipe = load_recipe("emoji_ar_dd2_from_dd1_1step")
    assert recipe.roles["student"].start_from == "runs/emoji_ar_dd1_2step/export"
    plain = recipes.to_dict(recipe)
    plain["method"]["from_dd1"] = None  # as runs of that time hold it
    assert recipes.from_dict(plain) == recipe
    plain["method"]["from_dd1"] = "runs/dd1/export"
    with pytest.raises(RecipeError) as stop:
        recipes.from_dict(plain)
    assert str(stop.value) == (
        "method.from_dd1: runs/dd1/export: is roles.student.start_from now; give it there, and leave this out"
    )


# ------------------------------------------------------------------------------------------------------------ processes
@pytest.mark.long
def test_two_processes_start_from_what_one_or_two_ended_with(first, tiny_sd15, tmp_path):
    kind, run, ended = first

    def recipe(name, place, steps=2, shard=2):
        student = replace(ROLES[kind], ema=0.5, start_from=place and str(place))
        made = recipe_of(tiny_sd15, tmp_path / name, steps=steps, student=student, critic=ROLES[kind])
        train = replace(made.train, shard=shard, accumulate=2 // shard)
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipes.dump(replace(made, train=train)))
        return path

    two = tmp_path / "two" / "run"
    paths = {"two": recipe("two", run), "three": recipe("three", two), "four": recipe("four", two / "export")}
    # What a critic goes back to is split as its weights are, and in the checkpoint of each.
    phased = PhasedDMD.Config(num_steps=2, phases=2, critic_steps=1)
    critic = replace(ROLES[kind], start_from=str(run))
    five = recipe_of(tiny_sd15, tmp_path / "five", phased, student=ROLES["lora"], critic=critic)
    paths["five"] = tmp_path / "five.yaml"
    paths["five"].write_text(recipes.dump(replace(five, train=replace(five.train, shard=2))))
    processes.run(2, [("execute", str(path)) for path in paths.values()], tmp_path)
    # One process does the same, from one's run and from two's.
    alone = recipes.load(recipe("alone", run, shard=1))
    states = [checkpoint_of(execute(alone)), checkpoint_of(two)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)
    went_back_to = of(checkpoint_of(tmp_path / "five" / "run"), "critic", "start")
    assert equal(went_back_to, of(ended, "critic", "weight"))
    later = recipes.load(recipe("later", two, shard=1))
    student = started(later).roles["student"]
    assert equal(student.weights, of(states[1], "student", "average"))


def checkpoint_of(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.every(run / "checkpoints")[-1]
    tensors = {n: torch.zeros(size) for n, size in checkpoint.sizes(folder).items()}
    checkpoint.read(folder, tensors)
    return tensors
