"""``fewstep prepare`` on EDM2: told sCM's angle by slow features, it comes near the teacher again, and has students."""

import json
import math

import pytest
import torch

from fewstep.cli import main
from fewstep.data.images import load_images
from fewstep.diffusion.rng import Rng
from fewstep.diffusion.schedules import EDM
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, Progress
from fewstep.runs import prepare as preparing
from fewstep.runs.prepare import PrepareConfig, prepare, smooth
from fewstep.runs.smoke import _few_emoji
from fewstep.teachers import load_teacher
from fewstep.teachers.edm.edm2 import MPFourier
from fewstep.teachers.edm.smooth import smoothed
from fewstep.teachers.tiny import write_tiny_pipeline

ENDS = (0.002, 80.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a network that heeds its time, as a trained one does."""
    place = write_tiny_pipeline("EDMPipeline", tmp_path_factory.mktemp("edm2") / "tiny", model_type="edm2")
    pipe = load_teacher(str(place)).pipe
    for name, gain in pipe.unet.named_parameters():
        if name.endswith("emb_gain"):
            gain.data.fill_(3.0)
    pipe.save_pretrained(place)
    return place


@pytest.fixture
def teacher(folder):
    return load_teacher(str(folder))


def test_slow_features_turn_no_more_than_so_often_over_the_quarter_circle():
    angle = torch.linspace(0, math.pi / 2, 20_001)
    waves = MPFourier(32, turns=3.0)(angle)
    assert torch.allclose(waves.square().mean(1), torch.ones(len(angle)), atol=1e-5)
    assert torch.allclose(
        waves[:, 0], math.sqrt(2) * torch.cos(2 * math.pi * 3 * angle / (math.pi / 2)), atol=1e-3
    )
    assert torch.allclose(
        waves[:, 16], math.sqrt(2) * torch.sin(2 * math.pi * 3 * angle / (math.pi / 2)), atol=1e-3
    )
    crossings = (waves[1:] * waves[:-1] < 0).sum(0)
    assert crossings.max() == crossings[0] == 6 and (crossings[:16].diff() <= 0).all()
    assert MPFourier(33, turns=1.0)(angle).shape == (20_001, 33)
    assert torch.equal(MPFourier(8, turns=1.0).freqs, MPFourier(8, turns=1.0).freqs)
    assert not torch.equal(MPFourier(8).freqs, MPFourier(8).freqs)


def test_the_network_is_told_the_angle_and_its_layer_on_it_is_fitted(teacher):
    net = teacher.net
    made, cut = smoothed(net, 1.0, False, ENDS)
    assert made.config.turns == 1.0 and net.config.turns is None
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0])
    assert torch.allclose(made.time_of(sigma), torch.atan(sigma / 0.5)) and torch.equal(
        net.time_of(sigma), sigma.log() / 4
    )
    turns = net.unet.emb_fourier.freqs.abs() * (math.log(ENDS[1] / ENDS[0]) / 4) / (2 * math.pi)
    assert 0 < cut == (turns > 1).sum() < len(turns)
    unfitted, _ = smoothed(net, 1.0, False, ENDS, steps=0)
    told = [n.unet.emb_noise(n.unet.emb_fourier(n.time_of(sigma))) for n in (net, made, unfitted)]
    assert (told[1] - told[0]).norm() < 0.8 * (told[2] - told[0]).norm()
    others = {
        k: v for k, v in net.state_dict().items() if not k.startswith(("unet.emb_fourier", "unet.emb_noise"))
    }
    assert all(torch.equal(made.state_dict()[k], v) for k, v in others.items())
    for name in ("freqs", "phases"):  # of its uncertainty, which is not retrained
        assert torch.equal(getattr(made.logvar_fourier, name), getattr(net.logvar_fourier, name))


def test_with_pixel_norm_a_modulation_has_magnitude_one(teacher):
    made, _ = smoothed(teacher.net, 1.0, True, ENDS, steps=1)
    block = made.unet.enc["8x8_block0"]
    block.emb_gain.data.fill_(3.0)
    seen = []
    handle = block.conv_res1.register_forward_pre_hook(lambda *_: None)
    real = block.conv_res0.forward
    block.conv_res0.forward = lambda x: torch.ones_like(real(x))
    from fewstep.teachers.edm import edm2

    plain = edm2.silu
    try:
        edm2.silu = lambda x: seen.append(x) or plain(x)
        made(torch.randn(2, 4, 16, 16), torch.tensor([1.0, 2.0]), torch.tensor([1, 2]))
    finally:
        edm2.silu = plain
        handle.remove()
    flat = [x for x in seen if x.ndim == 4 and x.shape[2:] == (8, 8) and (x == x[:, :, :1, :1]).all()]
    assert flat and torch.allclose(flat[0].square().mean(1), torch.ones(2, 8, 8), atol=1e-3)


def test_the_loss_is_the_error_of_the_networks_own_output(teacher):
    denoiser, _ = smooth(teacher, PrepareConfig())
    method = preparing.Preparation(PrepareConfig(null_probability=0.0), teacher.denoiser, student=denoiser)
    cond = teacher.encode(["1", "2", "3"])
    real = Rng(0).normal(3, *teacher.latent_shape)
    found = method.loss(Batch(cond, real.shape, Rng(1), Rng(2), real=real, real_cond=cond), Progress())[
        "prediction"
    ]
    rng, schedule = Rng(1), EDM()
    t = schedule.draw_times(rng.uniform(3), 1e-3)
    x = schedule.add_noise(real, rng.normal_like(real), t)
    size = (t.float() ** 2 + 0.25).sqrt().view(-1, 1, 1, 1)
    labels = [net.one_hot(cond["label"], 3) for net in (teacher.net, denoiser.net)]
    raw = [
        net.raw(x / size, net.time_of(t.float()), label)
        for net, label in zip((teacher.net, denoiser.net), labels)
    ]
    assert found.item() == pytest.approx((raw[0] - raw[1]).square().mean().item(), rel=1e-3)


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("prepared")
    images = load_images(str(_few_emoji(place, prompts="builtin:imagenet-classes")))
    config = PrepareConfig(error=1e-9, steps=8, check_every=4, batch_size=4, lr=3e-3, turns=0.16)
    record = prepare(load_teacher(str(folder)), place / "smooth", images, config, quiet=True)
    return place, record


def test_a_prepared_network_is_smoother_and_nearer_and_loads_with_all_its_buffers(teacher, prepared):
    place, record = prepared
    assert record["after"]["stiffness"] < record["before"]["stiffness"] and record["before"]["error"] == 0
    assert record["after"]["error"] < record["checks"][0]["error"]
    kept = load_teacher(str(place / "smooth"))
    assert (
        kept.net.config.turns == 0.16
        and json.loads((place / "smooth" / "prepare.json").read_text()) == record
    )
    assert torch.equal(kept.net.unet.emb_fourier.freqs, MPFourier(16, turns=0.16).freqs)
    assert torch.equal(kept.net.logvar_fourier.freqs, teacher.net.logvar_fourier.freqs)
    with pytest.raises(FewstepError, match="is prepared already; distill it as it is"):
        smooth(kept, PrepareConfig())


def test_a_stopped_preparation_goes_on_only_as_it_was_begun(folder, tmp_path, monkeypatch):
    """Its weights belong to features that turn so often; and nothing is left of it once it is done."""
    images = load_images(str(_few_emoji(tmp_path, prompts="builtin:imagenet-classes")))
    common = {"error": 1e-9, "check_every": 1, "batch_size": 2}
    training, out = tmp_path / "smooth.training", tmp_path / "smooth"

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing.Trainer, "train", stop)
        prepare(load_teacher(str(folder)), out, images, PrepareConfig(steps=2, **common), quiet=True)
    assert training.is_dir() and not out.exists()
    with pytest.raises(
        FewstepError, match=r"smooth\.training was stopped with turns 1\.0; go on with these, or delete"
    ):
        prepare(
            load_teacher(str(folder)), out, images, PrepareConfig(steps=2, turns=0.16, **common), quiet=True
        )
    prepare(load_teacher(str(folder)), out, images, PrepareConfig(steps=1, **common), quiet=True)
    assert out.is_dir() and not training.exists()


def test_a_student_of_scm_on_it_is_exported_and_verified(prepared, capsys):
    place, _ = prepared
    (place / "labels.txt").write_text("".join(f"{k}\n" for k in range(8)))
    words = ["train", "imagenet512_scm_2step", "--smoke", "--teacher", str(place / "smooth")]
    words += [
        "--prompts",
        str(place / "labels.txt"),
        "--images",
        str(place / "emoji"),
        "--output",
        str(place / "run"),
    ]
    assert main(words) == 0
    assert "verified in stock diffusers" in capsys.readouterr().out
    kept, own = (load_teacher(str(place / p)).net for p in ("run/export/pipeline", "smooth"))
    assert kept.config.turns == 0.16 and torch.equal(kept.unet.emb_fourier.freqs, own.unet.emb_fourier.freqs)
    assert any((a - b).abs().max() > 0 for a, b in zip(kept.parameters(), own.parameters()))


def test_what_needs_no_preparation_or_has_no_such_norm_is_refused(tmp_path, teacher, tiny_sdxl):
    edm = load_teacher(str(write_tiny_pipeline("EDMPipeline", tmp_path / "edm", num_class_embeds=10)))
    with pytest.raises(
        FewstepError, match=r"reads ln.sigma. / 4, .* it is smooth as it is; distill it without"
    ):
        smooth(edm, PrepareConfig())
    fourier = load_teacher(str(write_tiny_pipeline("EDMPipeline", tmp_path / "ncsn", model_type="ncsn++")))
    with pytest.raises(
        FewstepError, match=r"prepare: .*ncsn: EDM's ncsn\+\+ .* have no preparation; expected"
    ):
        smooth(fourier, PrepareConfig())
    with pytest.raises(FewstepError, match="pixel_norm: UNet2DConditionModel has none, EDM2's has"):
        smooth(load_teacher(str(tiny_sdxl)), PrepareConfig(pixel_norm=True))
    with pytest.raises(FewstepError, match="qk_norm: EDM2Precond has none"):
        smooth(teacher, PrepareConfig(qk_norm=True))
