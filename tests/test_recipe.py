"""Recipes: strict reading, faithful writing, overrides from the command line."""

import dataclasses

import pytest
import yaml

from fewstep import recipe as recipes
from fewstep.errors import RecipeError
from fewstep.methods.dmd2 import DMD2
from fewstep.recipe import DataConfig, EvalConfig, Recipe, RoleConfig, TeacherConfig, TrainConfig
from fewstep.runs.library import load_recipe, recipe_files


def minimal(**method):
    return Recipe(
        output="out",
        teacher=TeacherConfig(path="folder"),
        method=DMD2.Config(**method),
        data=DataConfig(prompts="prompts.txt"),
        train=TrainConfig(steps=10),
        roles={"student": RoleConfig(rank=4)},
    )


def changed(path, value, data=None):
    """The plain form of a recipe with one field set."""
    plain = recipes.to_dict(minimal()) if data is None else data
    *parents, last = path.split(".")
    inner = plain
    for part in parents:
        inner = inner[part]
    inner[last] = value
    return plain


@pytest.mark.parametrize("name", recipe_files())
def test_every_shipped_recipe_survives_writing_and_reading(name, tmp_path):
    recipe = load_recipe(name)
    assert recipes.from_dict(recipes.to_dict(recipe)) == recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe))
    assert recipes.load(path) == recipe == load_recipe(str(path))
    assert recipes.digest(recipes.load(path)) == recipes.digest(recipe)


def test_a_written_recipe_spells_out_every_default():
    plain = yaml.safe_load(recipes.dump(minimal()))
    assert plain["method"]["name"] == "dmd2" and plain["method"]["critic_steps"] == 5
    assert plain["roles"]["student"]["betas"] == [0.9, 0.999]
    assert set(plain) == {f.name for f in dataclasses.fields(Recipe)}


@pytest.mark.parametrize(
    "path, hint",
    [
        ("tran", "train"),
        ("train.stpes", "train.stpes: unknown field; did you mean steps"),
        ("teacher.pth", "did you mean path"),
        ("method.critic_step", "method.critic_step: unknown field; did you mean critic_steps"),
        ("roles.student.rnk", "roles.student.rnk: unknown field; did you mean rank"),
        ("data.qqqqq", "known fields: prompts, images"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(path, hint):
    with pytest.raises(RecipeError) as refusal:
        recipes.from_dict(changed(path, 1))
    assert path in str(refusal.value) and hint in str(refusal.value)


@pytest.mark.parametrize(
    "path, value",
    [
        ("train.steps", "many"),
        ("train.steps", 1.5),
        ("train.batch_size", [2]),
        ("teacher.path", 7),
        ("teacher.dtype", "float64"),
        ("method.weight", "l2"),
        ("method.times", "999"),
        ("roles.student.lr", "fast"),
        ("roles.student.targets", "to_q"),
        ("data", None),
    ],
)
def test_a_wrong_type_is_refused_with_field_and_value(path, value):
    with pytest.raises(RecipeError) as refusal:
        recipes.from_dict(changed(path, value))
    assert str(refusal.value).startswith(path) and repr(value) in str(refusal.value)


@pytest.mark.parametrize(
    "path, value",
    [
        ("train.steps", 0),
        ("train.device", "tpu"),
        ("method.critic_steps", 0),
        ("method.time_range", [0.9, 0.1]),
        ("roles.student.rank", 0),
        ("roles.student.ema", 1.5),
    ],
)
def test_an_impossible_value_is_refused_with_its_field(path, value):
    with pytest.raises(RecipeError) as refusal:
        recipes.from_dict(changed(path, value))
    assert str(refusal.value).startswith(path)


def test_several_faults_are_told_at_once():
    with pytest.raises(RecipeError) as refusal:
        recipes.from_dict(changed("train.stepz", 1, changed("teacher.dtype", "int8")))
    assert len(str(refusal.value).splitlines()) == 2


def test_missing_fields_unknown_methods_and_roles_are_refused():
    plain = recipes.to_dict(minimal())
    del plain["train"]["steps"]
    with pytest.raises(RecipeError, match=r"train\.steps: missing"):
        recipes.from_dict(plain)
    with pytest.raises(RecipeError, match=r"method\.name: 'dmd9' is unknown; expected one of .*dmd2"):
        recipes.from_dict(changed("method.name", "dmd9"))
    with pytest.raises(RecipeError, match=r"roles\.teacher.*student, critic, discriminator"):
        recipes.from_dict(changed("roles.teacher", {}))
    for data in ([], "text", None, {}, {"method": "dmd2"}):
        with pytest.raises(RecipeError):
            recipes.from_dict(data)


def test_a_critic_that_would_never_learn_is_refused():
    with pytest.raises(RecipeError, match="critic_on_student_turn"):
        DMD2.Config(critic_steps=1, critic_on_student_turn=False)


@pytest.mark.parametrize("text", ["a: [", "\x00", "- a\n- b\n", ""])
def test_a_file_that_is_no_recipe_is_refused(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        recipes.load(path)
    with pytest.raises(RecipeError, match=r"missing\.yaml"):
        recipes.load(tmp_path / "missing.yaml")


def test_overrides():
    words = "--teacher my/path --train.steps=20 --batch 3".replace("--batch", "--train.batch_size").split()
    recipe = recipes.override(
        minimal(),
        [
            *words,
            "--student.lr=1e-4",
            "--critic.kind",
            "full",
            "--method.times",
            "[999, 499]",
            "--output=a=b",
        ],
    )
    assert recipe.teacher.path == "my/path" and recipe.output == "a=b"
    assert (recipe.train.steps, recipe.train.batch_size) == (20, 3)
    assert recipe.roles["student"].lr == 1e-4 and recipe.roles["student"].rank == 4  # the rest stays
    assert recipe.roles["critic"].kind == "full"
    assert recipe.method.times == [999, 499]
    short = recipes.override(minimal(), ["--steps", "7", "--prompts", "p.txt", "--images", "null"])
    assert (short.train.steps, short.data.prompts, short.data.images) == (7, "p.txt", None)
    assert recipes.override(minimal(), []) == minimal()


@pytest.mark.parametrize(
    "words, message",
    [
        (["steps", "7"], "'steps': expected an option"),
        (["--steps"], "--steps: needs a value"),
        (["--train.stpes", "7"], "did you mean steps"),
        (["--train.steps", "x"], "train.steps: 'x'"),
        (["--output.deep.er", "1"], "output is a single value"),
        (["--student.lr", "-1"], "lr"),
    ],
)
def test_wrong_overrides_are_refused(words, message):
    with pytest.raises(RecipeError) as refusal:
        recipes.override(minimal(), words)
    assert message in str(refusal.value)


def test_digest_ignores_the_output_folder_and_nothing_else():
    recipe = minimal()
    digest = recipes.digest(recipe)
    assert recipes.digest(dataclasses.replace(recipe, output="elsewhere")) == digest
    for words in (["--train.seed", "1"], ["--student.lr", "1e-3"], ["--method.guidance_scale", "2"]):
        assert recipes.digest(recipes.override(recipe, words)) != digest


def test_what_follows_the_student_is_trained_alike_without_an_average():
    recipe = recipes.override(load_recipe("emoji_hyper_sd"), ["--student.ema", "0.9", "--student.lr", "0.5"])
    target = recipe.role("target")
    assert (target.ema, target.lr) == (0.0, 0.5) and recipe.role("student").ema == 0.9


def test_an_output_folder_may_be_a_number():
    assert recipes.override(load_recipe("emoji_dmd2_1step"), ["--output", "2026"]).output == "2026"


@pytest.mark.parametrize(
    ("name", "old", "value", "new"),
    [
        ("sid_4step", "tap", "mid_block", r"method\.taps, a list,"),
        ("ladd_4step", "steps", [4], r"method\.num_steps"),
        ("dd2_1step", "from_dd1", "runs/dd1", r"roles\.student\.start_from"),
    ],
)
def test_an_option_that_has_moved_is_refused_with_its_new_name(name, old, value, new):
    path = next(path for recipe, path in recipe_files().items() if recipe.endswith(name))
    plain = recipes.to_dict(load_recipe(str(path)))
    plain["method"][old] = None
    assert recipes.from_dict(plain)  # it said nothing
    plain["method"][old] = value
    with pytest.raises(RecipeError, match=rf"^method\.{old}: .*is {new} now; give it there"):
        recipes.from_dict(plain)


@pytest.mark.parametrize(
    "options",
    [
        {"num": -1},
        {"num": 1},
        {"named": 1},
        {"floor_steps": [0]},
        {"floor_steps": [4, 4]},
        {"teacher_steps": -1},
        {"batch_size": 0},
    ],
)
def test_an_evaluation_that_could_not_be_made_is_refused_by_its_field(options):
    (name,) = options
    with pytest.raises(RecipeError, match=f"evaluation.{name}: .*expected"):
        EvalConfig(**options)
