"""What stays in memory and what leaves it: recomputation, averages, moments, encoders, checkpoints, previews."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from test_end_to_end import tiny
from torch import nn

from fewstep.cli import main
from fewstep.data.batches import Ahead
from fewstep.data.cache import cache_root
from fewstep.errors import FewstepError, RecipeError
from fewstep.process import Process
from fewstep.recipe import RoleConfig, dump
from fewstep.runs.preview import tiny_decoder
from fewstep.teachers import load_teacher
from fewstep.training import checkpoint, optimizers
from fewstep.training.roles import Role, build_role


def linear(inputs=64, outputs=128, **options):
    torch.manual_seed(0)
    return Role("student", nn.Linear(inputs, outputs), RoleConfig(kind="full", lr=1e-2, **options))


def train(role, optimizer, steps=1, finite=True):
    for i in range(steps):
        torch.manual_seed(i)
        role.module(torch.randn(8, role.module.in_features)).square().mean().backward()
        optimizers.take_step(optimizer, 1e-2, torch.tensor(float(not finite)))
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------------ roles
def test_each_role_recomputes_or_not_as_it_says(tiny_sdxl):
    teacher = load_teacher(str(tiny_sdxl))
    teacher.net.enable_gradient_checkpointing()
    roles = {
        wish: build_role("student", teacher.net, RoleConfig(rank=2, gradient_checkpointing=wish))
        for wish in (None, True, False)
    }
    torch.manual_seed(0)
    x, t, cond = torch.randn(2, *teacher.latent_shape), torch.tensor([100.0, 800.0]), teacher.blank(2)
    calls, gradients = {}, []
    for wish, role in roles.items():
        calls[wish], resnet = 0, role.module.down_blocks[0].resnets[0]

        def count(*_, wish=wish):
            calls[wish] += 1

        resnet.conv1.register_forward_hook(count)
        teacher.denoiser.with_net(role.module).x0(x, t, cond).square().mean().backward()
        gradients.append([w.grad for w in role.weights.values()])
    assert calls == {None: 2, True: 2, False: 1}
    assert teacher.net.is_gradient_checkpointing
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_an_average_on_the_cpu_is_the_same_average_and_refused_where_it_is_split():
    beside, apart = linear(ema=0.9), linear(ema=0.9, ema_device="cpu")
    for role in (beside, apart):
        train(role, optimizers.optimizer_of(role))
        role.update_average(1)
    torch.testing.assert_close(apart.average, beside.average)
    role = linear(ema=0.9, ema_device="cpu")
    role.weights["weight"].device_mesh = SimpleNamespace()
    with pytest.raises(RecipeError, match=r"roles.student.ema_device: cpu: expected null"):
        role.collect()


# -------------------------------------------------------------------------------------------------------- optimisers
def test_eight_bits_without_their_package_are_refused_by_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(RecipeError, match=r"roles.student.optimizer: adamw8bit: .*'fewstep\[8bit\]'"):
        optimizers.optimizer_of(linear(optimizer="adamw8bit"))


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")
def test_moments_in_eight_bits_train_alike_and_come_back_exactly(tmp_path):
    with torch.compiler.set_stance("force_eager"):
        full, small = linear(), linear(optimizer="adamw8bit")
        for role in (full, small):
            train(role, optimizers.optimizer_of(role), 5)
        torch.testing.assert_close(small.module.weight, full.module.weight, atol=5e-3, rtol=0)
        run = linear(optimizer="adamw8bit")
        optimizer = optimizers.optimizer_of(run)
        train(run, optimizer, 3)
        weight = run.module.weight.clone()
        train(run, optimizer, finite=False)
        assert torch.equal(run.module.weight, weight) and optimizer.state[run.module.weight]["step"] == 3
        checkpoint.save(tmp_path / "step_3", {"student": run}, {"student": optimizer}, {}, Process())
        weights = list(run.weights.values())
        held = sum(t.nbytes for w in weights for k in ("exp_avg", "exp_avg_sq")
                   for t in optimizers.plain(k, optimizer.state[w][k]).values())  # fmt: skip
        assert optimizers.bytes_8bit(weights) == held
        again = linear(optimizer="adamw8bit")
        others = optimizers.optimizer_of(again)
        checkpoint.load(tmp_path / "step_3", {"student": again}, {"student": others})
        for role, its in ((run, optimizer), (again, others)):
            train(role, its, 2)
        assert torch.equal(run.module.weight, again.module.weight)


# ------------------------------------------------------------------------------------------------------- checkpoints
def test_a_checkpoint_is_as_large_as_trained_weights_and_their_state(tiny_sdxl, tmp_path):
    teacher = load_teacher(str(tiny_sdxl))
    role = build_role("student", teacher.net, RoleConfig(rank=2, ema=0.9))
    optimizer = optimizers.optimizer_of(role)
    for weight in role.weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    checkpoint.save(tmp_path / "step_1", {"student": role}, {"student": optimizer}, {}, Process())
    sizes = [w.nbytes for w in role.weights.values()]
    header = 8 + int.from_bytes((tmp_path / "step_1" / "state.safetensors").read_bytes()[:8], "little")
    stored = (tmp_path / "step_1" / "state.safetensors").stat().st_size - header
    assert stored == 4 * sum(sizes) + 4 * len(sizes)  # weight, average, two moments, and the count of steps
    assert header < 600 * 4 * len(sizes)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of Linux")
def test_saving_makes_no_second_copy(tmp_path):
    role = linear(2048, 4096)  # 34 MB, and as much again for each of two moments
    optimizer = optimizers.optimizer_of(role)
    train(role, optimizer)

    def peak():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    checkpoint.save(tmp_path / "step_1", {"student": role}, {"student": optimizer}, {}, Process())
    assert peak() - before < role.module.weight.nbytes


# -------------------------------------------------------------------------------------------------- data and previews
def test_what_is_cached_is_not_encoded_again_and_a_cut_goes_on(tiny_sdxl, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fewstep.data.store.SHARD", 2)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(tiny("sdxl_dmd2_4step", tiny_sdxl, tmp_path)))
    assert main(["cache", str(path)]) == 0
    said = capsys.readouterr().out
    assert "conditions" in said and "latents" in said and "5 rows" in said
    shards = sorted(cache_root().glob("latents-*/*.safetensors"))
    made = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert len(shards) == 3
    shards[1].unlink()  # as if it had been stopped
    assert main(["cache", str(path)]) == 0
    again = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert [s for s in shards if again[s] != made[s]] == [shards[1]]


def test_the_vae_comes_back_for_the_time_of_a_grid(sdxl, monkeypatch):
    moves, vae = [], sdxl.pipe.vae
    monkeypatch.setattr(vae, "to", lambda device: moves.append(str(device)))
    sdxl.drop_encoders(vae=True)
    assert moves == ["cpu"]
    assert sdxl.decode(torch.zeros(1, *sdxl.latent_shape)).shape == (1, *[sdxl.resolution] * 2, 3)
    assert moves == ["cpu", str(sdxl.device), "cpu"]


def test_a_tiny_vae_draws_previews_and_one_for_other_latents_is_refused(sdxl, tmp_path):
    from diffusers import AutoencoderTiny

    options = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    for channels in (4, 16):
        AutoencoderTiny(latent_channels=channels, **options).save_pretrained(tmp_path / str(channels))
    images = tiny_decoder(str(tmp_path / "4"), sdxl)(torch.zeros(3, *sdxl.latent_shape))
    side = 2 * sdxl.latent_shape[-1]
    assert images.shape == (3, side, side, 3) and images.dtype.name == "uint8"
    with pytest.raises(FewstepError, match=r"samples.vae: .*16 channels; expected one for 4"):
        tiny_decoder(str(tmp_path / "16"), sdxl)
    with pytest.raises(FewstepError, match=r"samples.vae: cannot load"):
        tiny_decoder(str(tmp_path / "none"), sdxl)


class Counting:
    """Batches that say which they are."""

    rows: ClassVar = {"prompts": 1}

    def __init__(self):
        self.made = []

    def batch(self, iteration, micro):
        self.made.append((iteration, micro))
        if iteration == 13:
            raise OSError("gone")
        return object()


def test_batches_come_ahead_once_each_and_after_a_jump_too():
    data = Counting()
    ahead = Ahead(data)
    for iteration in (0, 1, 2, 7, 8, 2, 3):  # back after a rollback
        for micro in (0, 1):
            ahead.batch(iteration, micro)
    ahead.thread.shutdown()
    asked = [(i, m) for i in (0, 1, 2, 3, 7, 8, 9, 2, 3, 4) for m in (0, 1)]
    assert sorted(data.made) == sorted(asked)
    ahead = Ahead(data)
    ahead.batch(12, 0)
    with pytest.raises(OSError, match="gone"):
        ahead.batch(13, 0)


def test_a_grid_that_cannot_be_written_is_told_when_it_is_waited_for(sdxl, tmp_path):
    from fewstep.runs.preview import Preview

    recipe = tiny("sdxl_dmd2_4step", Path(sdxl.source), tmp_path, "--method.gan_weight=0")
    student = SimpleNamespace(sample=lambda noise, *_: noise)
    method = SimpleNamespace(student=student, critic=None)
    preview = Preview(recipe, sdxl, method, [], ["red apple", "a cat"], tmp_path / "run")
    (tmp_path / "run").write_text("in the way")
    preview.draw(1, True)
    with pytest.raises(FewstepError, match=r"step_000001.png"):
        preview.settle()
    (tmp_path / "run").unlink()
    preview.draw(2, True)
    preview.settle()
    assert (tmp_path / "run" / "samples" / "step_000002.png").is_file()
