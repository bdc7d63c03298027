"""``builtin:emoji-ar`` and the recipe that trains it: what it trains is what the pipeline holds."""

import pytest
import torch

from fewstep import load_teacher
from fewstep.data import emoji
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.teachers.load import BUILTIN
from fewstep.tokens.students import CausalStudent


@pytest.fixture(scope="module")
def recipe(training_recipe):
    return training_recipe("train_emoji_ar")


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("builtin:emoji-ar")


def test_the_network_in_training_is_the_pipelines(recipe, tmp_path):
    torch.manual_seed(0)
    gpt, vq = recipe.make_gpt().eval(), recipe.make_vqvae().eval()
    torch.nn.init.normal_(gpt.output.weight, std=0.1)
    for part in (gpt, vq):  # saved as fp16
        part.half().float()
    torch.save({"ema": gpt.state_dict()}, tmp_path / "gpt.pt")
    torch.save({"vq": vq.state_dict(), "tokens": torch.zeros(1, 64)}, tmp_path / "codes.pt")
    recipe.save_pipeline(tmp_path, tmp_path / "pipeline")
    saved = load_teacher(str(tmp_path / "pipeline"))
    names = ["red apple", "any food fruit", "dog face"]
    features = recipe.text_features(names).view(3, recipe.SLOTS, -1)
    cond = saved.encode(names)
    assert torch.allclose(cond["embeds"], features, atol=1e-4)
    tokens = Rng("tokens").permutation(1024)[:192].view(3, 64)
    null = torch.tensor([False, False, True])
    with torch.no_grad():
        own = gpt(vq.quantize.embedding(tokens), Cond({"embeds": features, "null": null}))
        made = saved.net(tokens, Cond({"embeds": cond["embeds"], "null": null}))
    assert own.std() > 0.1 and torch.allclose(own, made, atol=0.02)  # the table is rounded once more


def test_some_tokens_are_misread_and_never_more_than_half_on_average(recipe):
    torch.manual_seed(0)
    tokens = torch.zeros(4000, 64, dtype=torch.long)
    wrong = (recipe.misread(tokens) != tokens).float().mean(1)
    assert wrong.mean() == pytest.approx(recipe.WRONG / 3, abs=0.01)  # the mean of half a squared uniform
    assert (wrong < 0.02).float().mean() > 0.15 and 0.4 < wrong.quantile(0.99) < 0.6
    assert tokens.eq(0).all()


def test_one_wrong_token_does_not_spoil_those_after_it(teacher):
    """A student makes mistakes, and the teacher's opinion of what follows is what DD2 learns from."""
    images, names = emoji.load()
    order = Rng("asked").permutation(len(names))[:32].tolist()
    real = torch.cat([teacher.pipe.tokenize(x[None]) for x in _unit(images[order])])
    wrong = real.clone()
    wrong[:, 20] = (wrong[:, 20] + 500) % 1024
    cond = teacher.encode([names[i] for i in order])
    with torch.no_grad():
        right, spoiled = (
            teacher.net(t, cond).log_softmax(-1).gather(-1, real[..., None])[:, 21:].exp().mean()
            for t in (real, wrong)
        )
    assert right > 0.9 and spoiled > 0.85


def test_students_start_from_what_the_teacher_knows(teacher):
    """Its table is linear in the codes, so a network that reads codes is the same network."""
    tokens = Rng("tokens").permutation(1024)[:128].view(2, 64)
    student = CausalStudent.of(teacher.net, teacher.denoiser.codes, head_width=16, head_depth=1)
    cond = teacher.encode(["red apple", "dog face"])
    with torch.no_grad():
        features = student.context(teacher.denoiser.codes[tokens], cond)["features"]
        assert torch.allclose(features, teacher.net.features(tokens, cond), atol=0.05)


def test_it_is_small_and_draws_what_it_is_asked_for(teacher):
    files = [p for p in BUILTIN["builtin:emoji-ar"].rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 16e6
    images, names = emoji.load()
    order = Rng("asked").permutation(len(names))[:24].tolist()
    real = torch.cat([teacher.pipe.tokenize(x[None]) for x in _unit(images[order])])
    cond = teacher.encode([names[i] for i in order])
    made = teacher.denoiser.sample(Rng("draw").uniform(24, 64), cond)
    equal = (made[:, None] == real[None]).float().mean(-1)
    assert (equal.argmax(1) == torch.arange(24)).float().mean() > 0.7  # by chance 1 in 24
    # Codes have the spread of the noise that flows to them, and decode to the image.
    assert 0.5 < teacher.denoiser.codes.std() < 1.5
    decoded = teacher.decode_pixels(teacher.denoiser.codes[real])
    assert (decoded - _unit(images[order])).abs().mean() < 0.06


def _unit(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
