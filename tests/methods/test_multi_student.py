"""Multi-student distillation: the partition, who is called, who learns from what, and a conditional mixture."""

from types import SimpleNamespace

import pytest
import torch
from toys import SD, Mlp, Rows, distance, fit, toy

from fewstep.diffusion import objectives
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.errors import RecipeError
from fewstep.methods import Batch, Progress, terms
from fewstep.methods.multi_student import MultiStudent
from fewstep.methods.router import Router
from fewstep.recipe import RoleConfig
from fewstep.teachers.analytic import GaussianMixture

LABELS = torch.arange(4).repeat(250)


# ------------------------------------------------------------------------------------------------------ partition
def rows_of(points):
    """A store of pooled embeddings, beside others that must not matter."""
    return Rows(len(points), pooled=points, embeds=torch.randn(len(points), 3, 2))


def clouds():
    normal = Rng("points").normal(61, 16)
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3)  # no principal direction tells all of them apart
    return {
        "normal": normal,
        "repeated": torch.cat([normal, normal[:40]]),
        "shifted": 1e3 + normal,
        "grid": grid,
    }


@pytest.mark.parametrize("parts", [2, 3, 4, 5])
@pytest.mark.parametrize("name", clouds())
def test_parts_are_disjoint_cover_everything_and_are_equal_within_one(name, parts):
    points, router = clouds()[name], Router(parts)
    first = router.fit(rows_of(points))
    routed = router(Cond({"pooled": points}))
    assert routed.shape == (len(points),)  # each row has one part and no other
    distinct = router(Cond({"pooled": points.unique(dim=0)}))
    counts = distinct.bincount(minlength=parts).tolist()
    assert sum(counts) == len(points.unique(dim=0)) and max(counts) - min(counts) <= 1
    assert counts == router.sizes and len(counts) == parts
    assert routed[first].tolist() == list(range(parts))
    unseen = router(Cond({"pooled": 10 * Rng("unseen").normal(500, points.shape[1])}))
    assert unseen.min() >= 0 and unseen.max() < parts


def test_the_partition_is_a_function_of_the_set_of_conditions_and_survives_its_files(tmp_path):
    points = clouds()["normal"]
    order = Rng("order").permutation(len(points))
    one, two = Router(5), Router(5)
    one.fit(rows_of(points)), two.fit(rows_of(torch.cat([points[order], points[:7]])))
    one.save(tmp_path)
    read = Router.load(tmp_path)
    unseen = Cond({"pooled": Rng("unseen").normal(300, 16)})
    for cond in (Cond({"pooled": points}), unseen):
        assert one(cond).equal(two(cond)) and one(cond).equal(read(cond))
    assert (read.parts, read.feature, read.sizes) == (5, "pooled", one.sizes)


def test_labels_are_split_into_consecutive_ones_and_tokens_by_their_mean():
    router = Router(4)
    router.fit(Rows(50, label=torch.arange(10).repeat(5)))
    parts = router(Cond({"label": torch.arange(10)})).tolist()
    assert parts in (sorted(parts), sorted(parts, reverse=True)) and router.sizes == [3, 3, 2, 2]
    tokens = Rng("tokens").normal(20, 7, 8)
    by_tokens, by_mean = Router(3), Router(3)
    by_tokens.fit(Rows(20, embeds=tokens)), by_mean.fit(Rows(20, pooled=tokens.double().mean(1)))
    assert by_tokens.feature == "embeds"
    assert by_tokens(Cond({"embeds": tokens})).equal(by_mean(Cond({"pooled": tokens.double().mean(1)})))


def test_similar_conditions_share_a_part():
    centres = torch.tensor([[-9.0, 0], [9, 0]])
    points = (centres[:, None] + Rng("near").normal(2, 30, 2)).flatten(0, 1)
    router = Router(2)
    router.fit(rows_of(points))
    parts = router(Cond({"pooled": points})).view(2, 30)
    assert (parts == parts[:, :1]).all() and parts[0, 0] != parts[1, 0]


def test_what_cannot_work_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"method\.parts: 1: expected at least 2"):
        MultiStudent.Config(parts=1)
    with pytest.raises(RecipeError, match=r"method\.parts: 5 with 4 distinct prompts.*lower method\.parts"):
        Router(5).fit(Rows(1000, label=LABELS))
    with pytest.raises(RecipeError, match=r"method\.name.*dmd2"):
        Router(2).fit(Rows(3, id=torch.arange(3)))
    with pytest.raises(RecipeError, match=r"method\.time_range"):
        MultiStudent.Config(time_range=(0.9, 0.1))
    with pytest.raises(RecipeError, match=r"method\.critic_steps"):
        MultiStudent.Config(critic_steps=0)


# ------------------------------------------------------------------------------------------------------ who does what
@pytest.fixture(scope="module")
def mixture():
    """Eight modes on a ring, two for each of four labels."""
    ring = GaussianMixture.ring(SD, radius=2.2, std=0.2)
    weights = torch.eye(4).repeat_interleave(2, 1) / 2
    return GaussianMixture(SD, ring.means, torch.tensor(0.04), weights)


@pytest.fixture(scope="module")
def fitted(mixture):
    torch.manual_seed(0)
    return fit(mixture, Mlp(labels=4))


def trainer_of(mixture, fitted, steps=8, batch_size=16, parts=2, labels=LABELS, **options):
    config = MultiStudent.Config(**{"parts": parts, "critic_steps": 2, "gan_weight": 0.0, **options})
    return toy(MultiStudent, config, mixture, fitted, steps=steps, batch_size=batch_size, labels=labels)


def weights(trainer, role=None):
    return {
        f"{r}/{n}": w.detach().clone()
        for r, owner in trainer.roles.items()
        if role in (None, r)
        for n, w in owner.weights.items()
    }


def same(a, b):
    return all(a[key].equal(b[key]) for key in a)


def test_every_sample_is_made_by_one_student_the_one_of_its_part(mixture, fitted):
    method = trainer_of(mixture, fitted, parts=3).method
    student, calls = method.student, []
    assert student.router is method.router is method.critic.router  # the same object trains and samples
    for k, denoiser in enumerate(student.denoisers):
        denoiser.x0 = lambda x_t, t, cond, k=k: calls.append((k, cond["label"])) or torch.full_like(x_t, k)
    cond = Cond({"label": torch.tensor([3, 0, 1, 2, 0, 3, 1, 1])})
    made = student.sample(torch.zeros(8, 2), cond, Rng(0).normal_like)
    assert made[:, 0].long().equal(method.router(cond))  # in the order asked
    assert sum(len(labels) for _, labels in calls) == 8 and len({k for k, _ in calls}) == len(calls)
    for k, labels in calls:
        assert (method.router(Cond({"label": labels})) == k).all()
    assert student.roles == ["student_1", "student_2", "student_3"] and student.num_steps == 1
    one = student.sample(torch.zeros(1, 2), cond.rows(slice(1)), Rng(0).normal_like)
    assert one[0].equal(made[0]) and len(calls) == 4


def test_weights_change_only_by_rows_of_their_part(mixture, fitted):
    trainer = trainer_of(mixture, fitted)
    router, inner = trainer.method.router, trainer.data.batch
    mine = (router(Cond({"label": torch.arange(4)})) == 0).nonzero()[:, 0]
    only = Cond({"label": mine.repeat(16 // len(mine))})

    def batch(iteration, micro):
        made = inner(iteration, micro)
        made.cond, made.host = only, {}
        return made

    trainer.data.batch = batch
    before = weights(trainer)
    for _ in range(4):
        trainer.iterate()
    after = weights(trainer)
    moved = {key.split("/")[0] for key in after if not after[key].equal(before[key])}
    assert moved == {"student_1", "critic_1"}


def test_a_student_learns_what_it_would_learn_alone_on_its_rows(mixture, fitted):
    """The gradient of a part does not see the other rows of the micro-batch, only their number."""
    trainer = trainer_of(mixture, fitted)
    method, seen = trainer.method, []
    x0 = method.hosts[0].student.denoiser.x0
    method.hosts[0].student.denoiser.x0 = lambda x_t, t, cond: seen.append(cond["label"]) or x0(x_t, t, cond)
    batch = trainer.data.batch(0, 0)
    method.on_part(0, method.hosts[0].generator_loss, batch, Progress())
    expected = batch.cond["label"][method.router(batch.cond) == 0]
    assert seen[0].equal(expected) and 0 < len(expected) < 16


def test_means_over_micro_batches_are_the_mean_over_all_rows_of_a_part(mixture, fitted):
    method = trainer_of(mixture, fitted).method
    labels, values = torch.arange(4).repeat(6), Rng(0).normal(24)
    part = method.router(Cond({"label": labels}))
    for k in range(2):
        total = 0.0
        for chunk in part.argsort().split(8):  # one lacks a part
            batch = Batch(Cond({"label": labels[chunk]}), (8, 2), Rng(1), Rng(2))
            batch.cond = Cond({"label": labels[chunk], "value": values[chunk]})
            view = method.part(k, batch)
            total += view.share * view.cond["value"].mean() / 3
        assert total.item() == pytest.approx(values[part == k].mean().item(), abs=1e-6)


def test_a_part_without_rows_still_calls_its_networks_and_gives_no_gradient(mixture, fitted):
    trainer = trainer_of(mixture, fitted)
    method, calls = trainer.method, []
    absent = 1 - int(method.router(Cond({"label": torch.tensor([0])})))
    host = method.hosts[absent]
    for name, denoiser in (("student", host.student.denoiser), ("critic", host.critic)):
        x0 = denoiser.x0
        denoiser.x0 = lambda *args, name=name, x0=x0, **kwargs: calls.append(name) or x0(*args, **kwargs)
    for role in trainer.roles.values():
        role.requires_grad_(True)
    batch = Batch(Cond({"label": torch.zeros(8, dtype=torch.long)}), (8, 2), Rng(1), Rng(2))
    sum(method.on_part(absent, host.generator_loss, batch, Progress()).values()).backward()
    sum(method.on_part(absent, host.critic_loss, batch, Progress()).values()).backward()
    assert calls == ["student", "critic", "critic"]
    for role in (f"student_{absent + 1}", f"critic_{absent + 1}"):
        grads = [w.grad for w in trainer.roles[role].weights.values()]
        assert all(g is not None and not g.any() for g in grads)


def test_real_images_meet_the_discriminator_of_their_part_with_their_own_conditions(mixture, fitted):
    config = MultiStudent.Config(parts=2, taps=["layers.4"])
    assert "images" in MultiStudent.needs(config) and "images" not in MultiStudent.needs(
        MultiStudent.Config(gan_weight=0.0)
    )
    trainer = toy(MultiStudent, config, mixture, fitted, steps=8, batch_size=16, labels=LABELS)
    method, seen = trainer.method, []
    real = torch.arange(4).repeat(4)
    batch = trainer.data.batch(0, 0)
    batch.real, batch.real_cond = 100.0 + real[:, None].expand(16, 2), Cond({"label": real})
    host = method.hosts[0]
    inner = host.discriminator.logits
    host.discriminator.logits = lambda d, x, t, c: seen.append((x, c["label"])) or inner(d, x, t, c)
    host.noised = lambda x0, batch, *_range: (x0, torch.zeros(len(x0)))
    losses = method.on_part(0, host.critic_loss, batch, Progress())
    x, labels = seen[0]
    count = int((method.router(batch.real_cond) == 0).sum())
    assert (x[:count, 0] - 100).long().equal(labels[:count]) and (x[count:] < 50).all()
    assert (method.router(Cond({"label": labels})) == 0).all()
    assert labels[count:].equal(batch.cond["label"][method.router(batch.cond) == 0])
    assert set(losses) == {"denoising", "discriminator"}
    # Each side weighs as many rows as it has: mean over micro-batches is mean over rows.
    of_real, of_fake = inner(host.judge, x, torch.zeros(len(x)), Cond({"label": labels})).split(
        [count, len(x) - count]
    )
    wanted = 2 * count / 16 * objectives.gan_generator(of_real)
    wanted = wanted + 2 * (len(x) - count) / 16 * objectives.gan_generator(-of_fake)
    assert 2 * count != len(x)
    assert losses["discriminator"].item() == pytest.approx(1e-2 * wanted.item(), rel=1e-5)
    logits = torch.randn(5, 1)
    assert objectives.gan_generator(-logits) + objectives.gan_generator(logits) == pytest.approx(
        objectives.gan_discriminator(logits, logits)
    )


def test_with_the_gan_all_roles_learn(mixture, fitted):
    config = MultiStudent.Config(parts=2, critic_steps=2, taps=["layers.4"])
    trainer = toy(MultiStudent, config, mixture, fitted, steps=4, batch_size=16, labels=LABELS)
    inner = trainer.data.batch

    def batch(iteration, micro):
        made = inner(iteration, micro)
        made.real_cond = made.cond
        made.real = mixture.sample(16, Rng("real", iteration), made.cond)
        return made

    trainer.data.batch = batch
    before = weights(trainer)
    for _ in range(4):
        trainer.iterate()
    after = weights(trainer)
    moved = {key.split("/")[0] for key in after if not after[key].equal(before[key])}
    assert moved == set(trainer.roles) >= {"discriminator_1", "discriminator_2"}
    assert all(value.isfinite().all() for value in after.values())


def test_a_resumed_run_goes_on_exactly(mixture, fitted, tmp_path):
    def run(folder, *stops):
        for stop in stops:
            trainer = trainer_of(mixture, fitted)
            trainer.folder = tmp_path / folder
            trainer.restore()
            while trainer.progress.iteration < stop:
                trainer.iterate()
            trainer.save()
        return weights(trainer)

    once = run("once", 8)
    assert same(once, run("twice", 4, 8)) and same(once, run("thrice", 3, 5, 8))


# ------------------------------------------------------------------------------------------- teacher score matching
def small_trainer(mixture, fitted, network=None, student=None, steps=8, batch_size=16, **options):
    """Students of a network of their own, and critics of the teacher's."""
    config = {"parts": 2, "critic_steps": 2, "gan_weight": 0.0, "student_network": {}, **options}
    real = mixture.sample(1000, Rng("real"), Cond({"label": LABELS}))
    return toy(
        MultiStudent,
        MultiStudent.Config(**config),
        mixture,
        fitted,
        steps=steps,
        batch_size=batch_size,
        labels=LABELS,
        real=real,
        network=network,
        student=student,
    )


@pytest.mark.parametrize("data", ["part", "all"])
def test_teacher_score_matching_by_hand(mixture, fitted, data):
    """Mean over the part's real samples of the weighted squared distance to the teacher's own prediction."""
    trainer = small_trainer(mixture, fitted, batch_size=64, tsm_data=data)
    method, batch, seen = trainer.method, trainer.data.batch(0, 0), []
    x0 = mixture.x0
    watched = lambda *a, **k: seen.append((*a, k)) or x0(*a, **k)  # noqa: E731
    method.teacher = SimpleNamespace(x0=watched, schedule=SD)
    loss = method.tsm_loss(0, batch, Progress())["matching"]
    (x_t, t, cond, options) = seen[0]
    assert options.get("guidance", 1.0) == 1.0 and t.min() < 100 and t.max() > 900
    mine = method.router(batch.real_cond) == 0
    expected = batch.real_cond["label"][mine] if data == "part" else batch.real_cond["label"]
    assert cond["label"].equal(expected)
    made = method.hosts[0].student.denoiser.x0(x_t, t, cond)
    # The network predicts v, whose error is alpha^2 + sigma^2 = 1 times that of x0 over sigma^2.
    weight = 1 / SD.sigma(t) ** 2
    error = (weight * (made - x0(x_t, t, cond)).double().square().mean(1)).sum()
    count = 32 if data == "part" else 64  # of a part: the mean over micro-batches is that over its rows
    assert loss.item() == pytest.approx(error.item() / count, rel=1e-5)


def test_the_minimiser_of_teacher_score_matching_is_the_teacher_whatever_the_data(monkeypatch):
    """An affine student fitted at one level to data of another law: the regression has no residual."""
    teacher = GaussianMixture(SD, torch.tensor([[0.7, -0.4]]).double(), torch.tensor(0.3).double())
    level = torch.tensor([500.0], dtype=torch.float64)

    class Affine:
        schedule, prediction, scale, shift = SD, "x0", None, None

        def x0(self, x_t, t, cond, *, guidance=1.0):
            return self.shift + self.scale * x_t

    student, critic = Affine(), Affine()
    student.scale = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    student.shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    networks = {"student_1": student, "student_2": student, "critic_1": critic, "critic_2": critic}
    config = MultiStudent.Config(parts=2, gan_weight=0.0, student_network={}, tsm_data="all")
    method = MultiStudent(config, teacher, (2,), **networks)
    real = 3 + 2 * Rng("other").normal(512, 2).double()
    noisy = SD.add_noise(real, Rng("eps").normal(512, 2).double(), level.expand(512))
    monkeypatch.setattr(terms, "noised", lambda *_: (noisy, level.expand(512)))
    none = Cond({})
    batch = Batch(none, (512, 2), Rng(1), Rng(2), real=real, real_cond=none)
    weights = [student.scale, student.shift]
    optimizer = torch.optim.LBFGS(
        weights, max_iter=200, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = method.tsm_loss(0, batch, Progress())["matching"]
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() < 1e-15
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    low, high = teacher.x0(x, level.expand(2), none)
    torch.testing.assert_close(student.shift.detach(), low, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(student.scale.detach(), high - low, rtol=1e-7, atol=1e-9)


def test_only_students_learn_in_the_first_stage_and_none_of_it_without_a_network_of_their_own(
    mixture, fitted
):
    trainer = small_trainer(mixture, fitted, tsm_share=0.5)
    before = weights(trainer)
    for _ in range(4):
        trainer.iterate()
    after = weights(trainer)
    moved = {key.split("/")[0] for key in after if not after[key].equal(before[key])}
    assert moved == {"student_1", "student_2"} and trainer.updates["student_1"] == 4
    for _ in range(4):
        trainer.iterate()
    assert trainer.updates == {"student_1": 6, "student_2": 6, "critic_1": 4, "critic_2": 4}
    names = {phase.name for phase in trainer_of(mixture, fitted).phases}
    assert not any(name.startswith("tsm") for name in names)
    assert MultiStudent.needs(trainer.method.config) == ("prompts", "images")


# ------------------------------------------------------------------------------------------------------ distributions
def test_two_students_reach_the_conditional_mixture(mixture, fitted):
    trainer = trainer_of(mixture, fitted, steps=350, batch_size=512, critic_steps=3)
    start = distance(trainer, mixture)
    trainer.train()
    assert distance(trainer, mixture) < min(start, 0.05)


def test_smaller_students_become_the_teachers_denoiser_on_their_part(mixture, fitted):
    torch.manual_seed(1)
    small, role = Mlp(width=64, labels=4).requires_grad_(False), RoleConfig(kind="full", lr=5e-3)
    trainer = small_trainer(mixture, fitted, small, role, steps=160, batch_size=128, tsm_share=0.98)
    method, cond = trainer.method, Cond({"label": torch.arange(4).repeat(100)})
    x_t, t = terms.noised(mixture.sample(400, Rng(3), cond), SD, Batch(cond, (400, 2), Rng(4), Rng(5)))

    def error(k):
        difference = method.hosts[k].student.denoiser.x0(x_t, t, cond) - mixture.x0(x_t, t, cond)
        return difference.square().mean(1)

    mine = method.router(cond) == 0
    start = error(0).mean()
    while trainer.progress.iteration < 150:
        trainer.iterate()
    assert error(0)[mine].mean() < 0.05 * start and error(1)[~mine].mean() < 0.05 * start
    assert error(0)[~mine].mean() > 3 * error(0)[mine].mean()  # it never saw the others
