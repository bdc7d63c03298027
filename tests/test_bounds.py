"""Every number that a person can give has a bound, and what lies beyond it is refused in one line that names it."""

import argparse
import dataclasses
import math
from typing import Annotated, get_args, get_origin

import pytest

from fewstep import configs
from fewstep import recipe as recipes
from fewstep.bounds import Bound, Bounded, hints_of, numbers, refusal
from fewstep.cli import main
from fewstep.cli.main import parser
from fewstep.diffusion.times import TimeLaw
from fewstep.errors import RecipeError
from fewstep.methods import METHODS
from fewstep.runs.library import load_recipe
from fewstep.runs.prepare import PrepareConfig

SHIPPED = {name: cls for name, cls in METHODS.items() if cls.__module__.startswith("fewstep.")}
CONFIGS = [
    *(cls for cls in vars(configs).values() if getattr(cls, "__module__", "") == configs.__name__),
    *(cls.Config for cls in SHIPPED.values()),
    PrepareConfig,
]


def fields(cls):
    """Every field of a dataclass and of the groups in it: name, annotation."""
    for field in dataclasses.fields(cls):
        hint = hints_of(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint)
        else:
            yield f"{cls.__qualname__}.{field.name}", hint


def unbounded(hint, inside=False):
    """Whether there is a number in an annotation that no bound is said of."""
    if get_origin(hint) is Annotated:
        return unbounded(get_args(hint)[0], any(isinstance(note, Bound) for note in hint.__metadata__))
    if hint in (int, float):
        return not inside
    return any(unbounded(inner, inside) for inner in get_args(hint) if inner is not Ellipsis)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__qualname__)
def test_every_number_of_a_config_has_a_bound(cls):
    assert issubclass(cls, Bounded) or not any("number" in str(hint) for _, hint in fields(cls))
    bare = [name for name, hint in fields(cls) if unbounded(hint)]
    assert not bare, f"say what these may be, as in fewstep/bounds.py: {bare}"


FREE = {  # any number is good, where it is finite
    "guidance_scale", "guidance_range", "guidance_scales", "teacher_guidance", "mean", "time_mean", "noise_mean",
    "reward_margin", "weight", "DD2.Config.alpha",
}  # fmt: skip


def first_to(value, number):
    """A list with another first number, at whatever depth that is."""
    if not isinstance(value, list | tuple):
        return number
    return type(value)([first_to(value[0], number), *value[1:]])


@pytest.mark.parametrize("cls", [*CONFIGS, TimeLaw], ids=lambda cls: cls.__qualname__)
def test_numbers_beyond_every_bound_are_refused_by_their_field(cls, tally):
    needed = {"path": "a", "prompts": "a", "steps": 1, "size": 1}
    made = cls(**{name: needed[name] for name in needed if name in hints_of(cls)})
    for name, value in vars(made).items():
        if isinstance(value, bool) or not list(numbers(value)):
            continue
        free = {name, f"{cls.__qualname__}.{name}"} & FREE
        for number in [math.nan, math.inf, *([] if free else [-(10**9)])]:
            with pytest.raises(RecipeError, match=rf"(^|[. ]){name}: .*: expected \S") as refused:
                dataclasses.replace(made, **{name: first_to(value, number)})
            assert "\n" not in str(refused.value)
            tally("numbers refused", 1)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("samples.columns", "0", "samples.columns: 0: expected at least 1"),
        ("samples.scale", "0", "samples.scale: 0: expected at least 1"),
        ("samples.count", "0", "samples.count: 0: expected at least 1"),
        ("samples.teacher_steps", "-1", "samples.teacher_steps: -1: expected 0 or more"),
        ("samples.seed", "-1", "samples.seed: -1: expected 0 or more, below 2^62"),
        (
            "student.betas",
            "[1.5, 0.9]",
            "roles.student.betas: (1.5, 0.9): expected 0 or more, and below 1",
        ),
        ("student.eps", "-1", "roles.student.eps: -1.0: expected a positive number"),
        ("student.eps", "0", "roles.student.eps: 0.0: expected a positive number"),
        ("student.alpha", "0", "roles.student.alpha: 0.0: expected a positive number"),
        ("student.warmup", "-1", "roles.student.warmup: -1: expected 0 or more"),
        ("critic.weight_decay", "-0.1", "roles.critic.weight_decay: -0.1: expected 0 or more"),
        ("train.rollback_lr", "nan", "train.rollback_lr: nan: expected a positive number"),
        ("train.seed", str(2**62), f"train.seed: {2**62}: expected 0 or more, below 2^62"),
        ("teacher.resolution", "0", "teacher.resolution: 0: expected at least 1"),
        ("export.tolerance", "0", "export.tolerance: 0.0: expected a positive number"),
        ("evaluation.teacher_guidance", ".inf", "evaluation.teacher_guidance: inf: expected a finite number"),
        ("method.gan_weight", "-1", "method.gan_weight: -1.0: expected 0 or more"),
    ],
)
def test_a_number_just_beyond_its_bound_is_refused(option, value, said):
    with pytest.raises(RecipeError) as refused:
        recipes.override(load_recipe("demo"), [f"--{option}", value])
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("student.betas", "[0, 0.999]"),
        ("student.weight_decay", "0"),
        ("student.ema", "0"),
        ("samples.columns", "1"),
        ("samples.teacher_steps", "0"),
        ("train.seed", "0"),
        ("train.sample_every", "0"),
        ("evaluation.teacher_guidance", "-1"),
    ],
)
def test_the_bound_itself_is_good(option, value):
    recipes.override(load_recipe("demo"), [f"--{option}", value])


def test_a_bound_is_kept_at_any_depth():
    @dataclasses.dataclass
    class Some(Bounded):
        PLACE = "some of {name}: "
        name: str = "x"
        grid: list[list[Annotated[float, Bound("below 2", lambda x: x < 2)]]] | None = None
        one: Annotated[int, Bound("not 3", lambda n: n != 3)] | list[Annotated[int, Bound("not 4")]] = 0
        plain: float = 0.0

    Some.__annotations__ = {field.name: field.type for field in dataclasses.fields(Some)}
    for good in ({"grid": [[1, 1], [1]]}, {"grid": []}, {"one": [3]}, {"one": 10**400}, {"plain": -1.0}):
        Some(**good)
    for bad, said in (
        ({"grid": [[1], [1, 2]]}, "some of x: grid: [[1], [1, 2]]: expected below 2"),
        ({"one": 3, "name": "{y}"}, "some of {y}: one: 3: expected not 3"),
        ({"plain": math.nan}, "some of x: plain: nan: expected finite numbers"),
    ):
        with pytest.raises(RecipeError) as refused:
            Some(**bad)
        assert str(refused.value) == said
    assert refusal(float | None, None) is None


# ------------------------------------------------------------------------------------------------------- command line
def numeric(parser):
    """Options of every command that read numbers: (command, option, reader)."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(action.choices.values()):
                yield from numeric(inner)
        elif action.type in (int, float) or _reads_numbers(action):
            yield parser.prog, "/".join(action.option_strings), action.type


def _reads_numbers(action):
    try:
        return action.type is not None and bool([*numbers(action.type("1"))])
    except (argparse.ArgumentTypeError, ValueError):
        return False


FREE_WORDS = ("--guidance",)


def test_every_number_of_the_command_line_has_a_bound():
    found = list(numeric(parser()))
    assert len(found) > 40 and {"--batch-size", "--num", "--lr", "--top-p", "--timesteps"} <= {
        o for _, o, _ in found
    }
    for command, option, reader in found:
        for word in ["nan", "inf", "1e999", "x", "", *([] if option in FREE_WORDS else ["-1000000000"])]:
            with pytest.raises(argparse.ArgumentTypeError, match="expected"):
                pytest.fail(f"{command} {option} {word} is {reader(word)}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pairs emoji_dmd_1step --batch-size 0", "--batch-size: 0: expected at least 1, a whole number"),
        ("pairs emoji_dmd_1step --num 0", "--num: 0: expected at least 1, a whole number"),
        ("pairs emoji_dmd_1step --seed -1", "--seed: -1: expected 0 or more, below 2^62, a whole number"),
        ("floor x --steps 4 --out y --batch-size 0", "--batch-size: 0: expected at least 1, a whole number"),
        ("floor x --steps 4,4 --out y", "--steps: 4,4: expected different numbers from 1 on, such as 1,2,4"),
        ("bench demo --iterations 0", "--iterations: 0: expected at least 1, a whole number"),
        ("prepare x --images y --out z --lr 0", "--lr: 0: expected a positive number"),
        ("sample x --scale 1.5", "--scale: 1.5: expected at least 1, a whole number"),
    ],
)
def test_a_bad_number_of_a_command_is_refused_in_one_line(words, said, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"fewstep: {said}; see fewstep {words.split()[0]} --help\n")
