"""Generated folders: the image of a sample depends on nothing but the sample; kills, shards, refusals."""

import json
import math
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.diffusion.denoiser import Scalar
from fewstep.diffusion.embedding import with_scalar
from fewstep.diffusion.student import Student
from fewstep.diffusion.times import even_times
from fewstep.errors import FewstepError
from fewstep.evaluation import sampling
from fewstep.evaluation.images import ArrayImages, FirstImages, open_images
from fewstep.evaluation.models import open_model
from fewstep.evaluation.prompts import read_prompts
from fewstep.evaluation.sampling import Job, check_pairs, read_manifest, sample_folder
from fewstep.evaluation.spec import Entry
from fewstep.export import export_student
from fewstep.methods.scm import student_of
from fewstep.recipe import RoleConfig
from fewstep.teachers import load_teacher
from fewstep.teachers.tiny import write_tiny_pipeline
from fewstep.training.roles import build_role

ABOUT = {"title": "x", "recipe": "0", "guidance_scale": 4.5, "trained_steps": 0}
TEXTS = ["red apple", "a cat", "blue square", "crescent moon", "green tree", "house", "sun"]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    return read_prompts(tmp_path / "prompts.txt")


@pytest.fixture(scope="module")
def model(tiny_sd15):
    return open_model(str(tiny_sd15))


JOB = Job(steps=2, solver="lcm", guidance=1.0)  # a sampler that adds noise between its steps


def pixels(folder):
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.rglob("[!.]*.png"))]).astype(int)


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("[!.]*.png"))}


def make(model, prompts, folder, job=JOB, **options):
    return sample_folder(model, prompts, job, folder, **{"speed_runs": 0, **options})


def test_the_image_of_a_sample_does_not_depend_on_batches_or_shards(model, prompts, tmp_path):
    """Same files for the same batch shape; at another batch size kernels may round by one level."""
    make(model, prompts, tmp_path / "five", batch_size=5)
    make(model, prompts, tmp_path / "one", batch_size=1)
    for rank in (1, 0):
        make(model, prompts, tmp_path / "shards", batch_size=1, rank=rank, world=2)
    assert files(tmp_path / "one") == files(tmp_path / "shards")
    five, one = pixels(tmp_path / "five"), pixels(tmp_path / "one")
    assert len(one) == len(TEXTS) and abs(five - one).max() <= 1
    assert abs(one[0] - one[1]).max() > 10  # and samples differ
    source = open_images(tmp_path / "one")
    assert len(source) == len(TEXTS)


def test_noise_between_steps_is_the_samples_own(model, prompts, tmp_path):
    """The last of three samples alone is what it is in their batch, although noise was drawn for all."""
    call = model.prepare(2, "lcm", 1.0)
    batch = sampling.draw(model, TEXTS[:3], [0, 1, 2], JOB, call)
    alone = sampling.draw(model, TEXTS[2:3], [2], JOB, call)
    assert abs(batch[2].astype(int) - alone[0]).max() <= 1
    shared = model.pipe(
        TEXTS[:3], generator=torch.Generator().manual_seed(0), output_type="np", **call
    ).images
    assert abs((shared[2] * 255).round() - alone[0]).max() > 10  # one generator for all would not do


def test_resumed_folder_has_the_files_of_an_uninterrupted_one(model, prompts, tmp_path, monkeypatch):
    make(model, prompts, tmp_path / "whole", batch_size=4)
    done = []

    def stop(image, path):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(path)
        return save(image, path)

    save = sampling.save_png
    monkeypatch.setattr(sampling, "save_png", stop)
    with pytest.raises(KeyboardInterrupt):
        make(model, prompts, tmp_path / "part", batch_size=4)
    monkeypatch.undo()
    left = tmp_path / "part" / ".part-elsewhere-1-000005.png"  # by a killed writer
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    (tmp_path / "part" / "000001.png").write_bytes(b"")  # left by a loss of power
    make(model, prompts, tmp_path / "part", batch_size=4)
    assert files(tmp_path / "part") == files(tmp_path / "whole")
    assert not list((tmp_path / "part").glob(".*"))


def test_a_complete_folder_is_left_alone_and_may_grow(model, prompts, tmp_path, monkeypatch):
    make(model, prompts, tmp_path / "a", num=3, batch_size=2)
    before = files(tmp_path / "a")
    monkeypatch.setattr(sampling, "draw", lambda *_: pytest.fail("nothing is missing"))
    make(model, prompts, tmp_path / "a", num=3)
    monkeypatch.undo()
    manifest = make(model, prompts, tmp_path / "a", num=5, batch_size=2)
    assert manifest["num"] == 5 and read_manifest(tmp_path / "a")["num"] == 5
    assert {name: files(tmp_path / "a")[name] for name in before} == before


def test_a_folder_of_another_run_is_refused_with_what_differs(model, prompts, tmp_path):
    make(model, prompts, tmp_path / "a", num=2)
    for change, words in [
        ({"seed": 7}, ["seed", "0", "7"]),
        ({"guidance": 3.0}, ["guidance", "1.0", "3.0"]),
        ({"steps": 4, "solver": "ddim"}, ["steps", "solver", "lcm", "ddim", "DDIMScheduler"]),
    ]:
        with pytest.raises(FewstepError, match="another run") as error:
            make(model, prompts, tmp_path / "a", replace(JOB, **change))
        assert all(word in str(error.value) for word in words) and "rounding" not in str(error.value)
    (tmp_path / "other.txt").write_text("else\n" * 3)
    with pytest.raises(FewstepError, match="prompts_sha256"):
        make(model, read_prompts(tmp_path / "other.txt"), tmp_path / "a", num=2)
    run = json.loads((tmp_path / "a" / "manifest.json").read_text())["run"]
    assert {"torch", "diffusers", "weights", "prompts_sha256", "seed", "steps", "solver", "guidance"} <= set(
        run
    )
    (tmp_path / "b").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "x.png")
    with pytest.raises(FewstepError, match=r"no manifest\.json"):
        make(model, prompts, tmp_path / "b")
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(FewstepError, match="no manifest of"):
        make(model, prompts, tmp_path / "a")


def test_other_weights_are_another_run(model, prompts, tmp_path):
    make(model, prompts, tmp_path / "a", num=1)
    weight = model.network.conv_out.bias
    weight.data[0] += 1e-3
    try:
        with pytest.raises(FewstepError, match="weights"):
            make(model, prompts, tmp_path / "a", num=1)
    finally:
        weight.data[0] -= 1e-3


@pytest.mark.parametrize(
    "name, one, other", [("sigmas", [1.0, 0.5], [1.0, 0.4]), ("timesteps", [9, 4], [9, 3])]
)
def test_other_times_of_the_calls_are_another_run(model, prompts, name, one, other):
    """As those of a searched schedule, of a flow or of a table, which no option of the job holds."""
    first, again, changed = (
        sampling._describe(model, prompts, JOB, {"guidance_scale": 1.0, name: times})["run"]
        for times in (one, one, other)
    )
    assert first == again != changed


def test_network_evaluations_are_counted(model, prompts, tmp_path):
    """Guidance doubles the batch, so it doubles the count; a second-order solver would show too."""
    for name, job, expected in [
        ("plain", Job(2, "ddim", 1.0), 2),
        ("guided", Job(3, "ddim", 5.0), 6),
        ("lcm", Job(1, "lcm", 0.0), 1),
    ]:
        speed = make(model, prompts, tmp_path / name, job, num=1, speed_runs=2)["speed"]
        assert speed["nfe"] == expected
        assert speed["seconds"] > 0 and speed["seconds_error"] >= 0 and speed["peak_memory_mb"] > 50
        assert read_manifest(tmp_path / name)["speed"] == speed


def test_pixels_that_are_not_finite_and_rounding(model, prompts, tmp_path, monkeypatch):
    class Output:
        images = np.full((1, 8, 8, 3), 0.999)

    pipe = type("Pipe", (), {"__call__": lambda self, *a, **k: Output})()
    fake = replace(model, pipe=model.pipe)
    fake.pipe = pipe
    assert sampling.draw(fake, ["a"], [0], JOB, {})[0, 0, 0, 0] == 255
    assert sampling.draw(fake, ["a"], [0], replace(JOB, rounding="truncate"), {})[0, 0, 0, 0] == 254
    Output.images = np.full((1, 8, 8, 3), np.nan)
    with pytest.raises(FewstepError, match="samples 4 to 4 have pixels that are not finite"):
        sampling.draw(fake, ["a"], [4], JOB, {})


def test_geneval_layout(model, tmp_path):
    lines = [{"tag": "single_object", "include": [{"class": "cat"}], "prompt": "a cat"}, {"prompt": "a dog"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    job = replace(JOB, layout="geneval", per_prompt=4)
    for rank in (0, 1):
        make(model, read_prompts(tmp_path / "p.jsonl"), tmp_path / "g", job, rank=rank, world=2)
    found = sorted(str(p.relative_to(tmp_path / "g")) for p in (tmp_path / "g").rglob("*.*") if p.is_file())
    samples = [f"{k:05d}/samples/{i:04d}.png" for k in range(2) for i in range(4)]
    assert found == sorted([*samples, "00000/metadata.jsonl", "00001/metadata.jsonl", "manifest.json"])
    assert [json.loads((tmp_path / f"g/{k:05d}/metadata.jsonl").read_text()) for k in range(2)] == lines


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "holds no prompt"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"\xff\xfe", "is no UTF-8 text: it is UTF-16"),
    ],
)
def test_bad_prompt_files(tmp_path, text, message):
    (tmp_path / "p.txt").write_bytes(text)
    with pytest.raises(FewstepError, match=message):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"tag": "b"}\n')
    with pytest.raises(FewstepError, match=r"line 2: has no 'prompt'"):
        read_prompts(tmp_path / "p.jsonl")


def test_bad_requests_come_before_the_pipeline_is_loaded(tmp_path, capsys):
    from fewstep.cli import main

    (tmp_path / "p.txt").write_text("a\nb\n")

    def run(*words):
        try:
            code = main(
                ["eval", "generate", "no/such/pipeline", "--out", str(tmp_path / "out"), *map(str, words)]
            )
        except SystemExit as exit:
            code = exit.code
        assert code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    prompts = ("--prompts", tmp_path / "p.txt")
    assert "expected 1 to 2" in run("--steps", 4, *prompts, "--num", 3)
    assert "--rounding is 'up'" in run("--steps", 4, *prompts, "--rounding", "up")
    assert "--layout is 'tree'" in run("--steps", 4, *prompts, "--layout", "tree")
    assert "from 1 on" in run("--steps", "4,0", *prompts)
    assert "cannot be read" in run("--steps", 4, "--prompts", tmp_path / "none.txt")
    assert "--lora nowhere: expected the export" in run("--steps", 4, *prompts, "--lora", "nowhere")
    assert "no/such/pipeline" in run("--steps", 4, *prompts)


def test_published_few_step_weights_are_called_at_their_times(model):
    """DMD2's: one step at 999, four at 999 ... 249, SDXL's single step at 399; no blending with the noise."""
    for steps, timesteps, expected in [
        (1, None, [999]),
        (4, (999, 749, 499, 249), [999, 749, 499, 249]),  # LCM's own would be 999, 759, 499, 259
        (1, (399,), [399]),
    ]:
        call = model.prepare(steps, "lcm", 0.0, timesteps)
        assert call.pop("guidance_scale") == 0.0
        scheduler = model.pipe.scheduler
        scheduler.set_timesteps(**call)
        assert scheduler.timesteps.tolist() == expected
        x, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        alpha = scheduler.alphas_cumprod[expected[-1]]
        scheduler._step_index = len(expected) - 1
        x0 = scheduler.step(noise, scheduler.timesteps[-1], x).prev_sample
        torch.testing.assert_close(x0, (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5, rtol=1e-4, atol=1e-4)
    with pytest.raises(FewstepError, match="--timesteps has 2 times for --steps 1"):
        Job(1, timesteps=(999, 499))


def test_solvers_that_cannot_be(model):
    with pytest.raises(FewstepError, match="--solver plms: expected one of own, lcm"):
        model.prepare(2, "plms")
    model.scheduler, kept = type("Flow", (), {})(), model.scheduler
    with pytest.raises(FewstepError, match="no noise table"):
        model.prepare(2, "ddim")
    model.scheduler = kept


@pytest.fixture(scope="module")
def student(tiny_sd15, tmp_path_factory):
    """An untrained export of four steps, of a whole pipeline."""
    from fewstep.export import student_scheduler

    folder = tmp_path_factory.mktemp("student")
    pipe = open_model(str(tiny_sd15)).pipe
    pipe.scheduler, call = student_scheduler(pipe.scheduler, [999, 749, 499, 249])
    pipe.save_pretrained(folder / "export" / "pipeline")
    record = {"kind": "full", "num_steps": 4, "timesteps": [999, 749, 499, 249], "call": call}
    record["pipeline_class"] = type(pipe).__name__
    (folder / "export" / "fewstep.json").write_text(json.dumps(record))
    return folder


def test_a_student_runs_at_its_own_and_other_even_steps(student, prompts, tmp_path):
    model = open_model(str(student))
    call = model.prepare(4)
    assert call == {"num_inference_steps": 4, "guidance_scale": 0.0}
    make(model, prompts, tmp_path / "own", Job(4), num=1)
    run = read_manifest(tmp_path / "own")["run"]
    assert (run["scheduler"], run["guidance"]) == ("LCMScheduler", 0.0)
    for steps, times in [(1, [999]), (2, [999, 499]), (8, [999, 874, 749, 624, 499, 374, 249, 124])]:
        call = model.prepare(steps)
        model.pipe.scheduler.set_timesteps(steps)
        assert model.pipe.scheduler.timesteps.tolist() == times and call["guidance_scale"] == 0.0
    with pytest.raises(FewstepError, match="--steps 3"):
        model.prepare(3)


@pytest.mark.parametrize("noise", ["fresh", "ddim"])
def test_a_flow_student_at_other_steps_follows_its_teachers_shift(noise, tmp_path):
    """As it would have been trained for that number, and as stock diffusers calls the network."""
    teacher = load_teacher(str(write_tiny_pipeline("StableDiffusion3Pipeline", tmp_path / "sd3")))
    schedule = teacher.denoiser.schedule
    assert schedule.shift == 3.0
    role = build_role("student", teacher.net, RoleConfig(kind="full"))
    student = Student(teacher.denoiser.with_net(role.module), even_times(schedule, 4), noise)
    weights = {"student": {n: w.detach() for n, w in role.weights.items()}}
    about = {**ABOUT, "method": "dmd2"}
    export_student(tmp_path / "s" / "export", teacher, student, weights, [role.config], about=about)
    model = open_model(str(tmp_path / "s"))
    assert model.record["shift"] == 3.0
    for steps, times in [(1, [1.0]), (2, [1.0, 0.75]), (3, [1.0, 6 / 7, 0.6]), (4, [1, 0.9, 0.75, 0.5])]:
        assert even_times(schedule, steps) == pytest.approx(times)
        called = []
        hook = model.network.register_forward_pre_hook(
            lambda _net, _args, options, seen=called: seen.append(options["timestep"]), with_kwargs=True
        )
        model.pipe("a cat", output_type="latent", **model.prepare(steps))
        hook.remove()
        assert [t.flatten()[0].item() / 1000 for t in called] == pytest.approx(times, abs=1e-5)


def test_a_sana_sprint_student_at_other_steps_has_even_angles(tmp_path, capsys):
    teacher = load_teacher(str(write_tiny_pipeline("SanaPipeline", tmp_path / "sana")))
    role = build_role("student", teacher.net, RoleConfig(kind="full"))
    denoiser = with_scalar(teacher.denoiser.with_net(role.module), "guidance", Scalar(4.5))
    role.collect()
    student = student_of(denoiser, [[math.pi / 2, 1.3]])
    weights = {"student": {n: w.detach() for n, w in role.weights.items()}}
    about = {**ABOUT, "method": "sana_sprint"}
    export_student(tmp_path / "s" / "export", teacher, student, weights, [role.config], about=about)
    model = open_model(str(tmp_path / "s"))
    for steps, angles in [
        (2, [math.pi / 2, 1.3]),
        (1, [math.pi / 2]),
        (3, [math.pi / 2 * k / 3 for k in (3, 2, 1)]),
    ]:
        capsys.readouterr()
        call = model.prepare(steps)
        said = f"was trained for 2 steps; {steps} are evenly spaced" in capsys.readouterr().err
        assert said is (steps != 2)  # it is said where it is so
        model.pipe("a cat", output_type="latent", **call)
        assert model.pipe.scheduler.timesteps[:-1].tolist() == pytest.approx(angles, abs=1e-5)
        assert type(model.pipe.scheduler).__name__ == "SCMScheduler" and call["guidance_scale"] == 4.5


def test_replaced_network(tiny_sd15, model, tmp_path):
    from safetensors.torch import save_file

    state = {name: value + 0.01 for name, value in model.network.state_dict().items()}
    save_file(state, tmp_path / "net.safetensors")
    torch.save(state, tmp_path / "net.bin")
    other = open_model(str(tiny_sd15), network=str(tmp_path / "net.safetensors"))
    assert other.fingerprint() != model.fingerprint()
    assert open_model(str(tiny_sd15), network=str(tmp_path / "net.bin")).fingerprint() == other.fingerprint()
    assert other.about["network"].endswith("net.safetensors")
    torch.save({"bad": os.system}, tmp_path / "code.bin")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, reason in (
        ("code.bin", "does not fit"),
        ("other.safetensors", "does not fit"),
        ("absent.safetensors", "does not exist"),
    ):
        with pytest.raises(FewstepError, match=f"{name} {reason}"):
            open_model(str(tiny_sd15), network=str(tmp_path / name))


@pytest.mark.parametrize(
    "job, message",
    [
        ({"size": 31}, "--size 31: expected a multiple of 8"),
        ({"size": 30}, "--size 30: expected a multiple of 8"),
        ({"timesteps": (1000, 1)}, "--timesteps 1000,1: expected falling times from 999 to 0"),
        ({"timesteps": (1, 500)}, "--timesteps 1,500: expected falling times"),
    ],
)
def test_what_a_pipeline_cannot_draw_leaves_no_folder(model, prompts, tmp_path, job, message):
    with pytest.raises(FewstepError, match=message):
        make(model, prompts, tmp_path / "out", Job(2, **job))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("guidance", [float("nan"), float("inf")])
def test_guidance_is_a_finite_number(guidance):
    with pytest.raises(FewstepError, match=r"--guidance is (nan|inf), expected a number that is finite"):
        Job(1, guidance=guidance)
    with pytest.raises(FewstepError, match=r"guidance is .* expected numbers"):
        Entry("a", "b", guidance=(guidance,))


def test_killed_at_any_moment_and_resumed(model, prompts, tmp_path):
    """SIGKILL while images are written: every file under its name is whole, and the end is the same."""
    (tmp_path / "p.txt").write_text("\n".join(f"thing {i}" for i in range(40)))
    many = read_prompts(tmp_path / "p.txt")
    folder = tmp_path / "killed"
    for more in (1, 9, 20):
        child = os.fork()
        if child == 0:
            try:
                make(model, many, folder, batch_size=4)
            finally:
                os._exit(1)
        deadline = time.time() + 120
        while len(list(folder.glob("[0-9]*.png"))) < more and time.time() < deadline:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert more <= len(files(folder)) < 40
        assert pixels(folder).shape[1:] == (
            model.pipe.vae_scale_factor * model.network.config.sample_size,
        ) * 2 + (3,)
    make(model, many, folder, batch_size=4)
    make(model, many, tmp_path / "whole", batch_size=4)
    assert len(files(folder)) == 40 and files(folder) == files(tmp_path / "whole")
    assert not list(folder.glob(".*"))


def test_command_line_shards_by_rank(tiny_sd15, tmp_path, monkeypatch, capsys):
    from fewstep.cli import main

    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    words = ["eval", "generate", str(tiny_sd15), "--steps", "1,2", "--solver", "lcm", "--guidance", "1"]
    words += ["--prompts", str(tmp_path / "p.txt"), "--speed-runs", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("1", 3), ("0", 7)):
        monkeypatch.setenv("RANK", rank)
        assert main(words) == 0
        assert len(files(tmp_path / "out" / "1-step")) == len(files(tmp_path / "out" / "2-steps")) == expected
    assert "2 network evaluations" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out" / "2-steps")["speed"]["nfe"] == 2
    monkeypatch.setenv("RANK", "2")
    assert main(words) == 2 and "RANK < WORLD_SIZE" in capsys.readouterr().err


@pytest.mark.slow
def test_accelerate_launch_makes_the_files_of_one_process(tiny_sd15, tmp_path, launch_two):
    """Two processes started by accelerate's own launcher, each with its share, as a user would start them."""
    from fewstep.cli import main

    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    words = ["eval", "generate", str(tiny_sd15), "--steps", "2", "--solver", "lcm", "--guidance", "1"]
    words += ["--prompts", str(tmp_path / "p.txt"), "--speed-runs", "0", "--batch-size", "1"]
    words += ["--device", "cpu", "--out"]
    assert "(process 1)" in launch_two("accelerate", [*words, str(tmp_path / "two")])
    assert main([*words, str(tmp_path / "one")]) == 0
    one, two = (files(tmp_path / name / "2-steps") for name in ("one", "two"))
    assert one == two and len(one) == len(TEXTS)


def test_the_first_of_some_images_may_be_fewer_than_prompts_and_not_more():
    many = ArrayImages(np.zeros((13, 4, 4, 3), np.uint8))
    check_pairs(FirstImages(many, 5), 12)
    check_pairs(FirstImages(many, 12), 6, per_prompt=2)
    with pytest.raises(FewstepError, match="13 images for 12 prompts, expected 12"):
        check_pairs(FirstImages(many, 13), 12)


def test_seconds_and_evaluations_are_of_one_image(monkeypatch):
    """Batches of 4, 2 and 1, a second each: 0.25, 0.5 and 1 s an image, 3 evaluations of each sample."""
    from fewstep.evaluation import speed

    clock = iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    net = torch.nn.Linear(3, 3)
    watch = speed.Stopwatch(net)
    for rows in (4, 2, 1):
        with watch.drawing(rows):
            for _ in range(3):
                net(torch.zeros(rows, 3))
    found = watch.read()
    assert found["seconds"] == 0.5 and found["nfe"] == 3 and found["batch"] == 4
    assert found["seconds_error"] == pytest.approx(1.2533 * np.std([0.25, 0.5, 1], ddof=1) / 3**0.5)
    calls = []
    assert speed.measure_speed(lambda: calls.append(net(torch.zeros(1, 3))), net, 2)["runs"] == 2
    assert len(calls) == 3  # the first of them warms up


def test_times_of_a_network_are_no_rows():
    from fewstep.evaluation.speed import counted

    class Network(torch.nn.Module):
        def forward(self, time, x):
            return x

    net = Network()
    with counted(net) as rows:
        net(torch.zeros(1), torch.zeros(3, 2))
        net(time=torch.zeros(()), x=torch.zeros(2, 2))
    assert rows.count == 5


def test_built_in_prompts_are_the_labels_and_the_nothing_of_class_teachers():
    assert read_prompts("builtin:imagenet-classes").texts == tuple(map(str, range(1000)))
    assert read_prompts("builtin:unconditional").texts == ("",) * 64
    with pytest.raises(FewstepError, match=r"^--prompts: builtin:nope is no file"):
        read_prompts("builtin:nope")
