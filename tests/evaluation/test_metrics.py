"""The mathematics against closed forms, brute force and invariances."""

import math

import numpy as np
import pytest
import torch

from fewstep.evaluation import metrics as M


def gaussian(n, dim, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) * scale + shift


def moments(x):
    return x.mean(0), torch.cov(x.T)


def spd(dim, seed):
    a = gaussian(2 * dim, dim, seed)
    return a.T @ a / (2 * dim)


# Fréchet distance


def test_frechet_of_diagonal_gaussians_is_the_sum_over_axes():
    s1, s2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([16.0, 1.0, 0.25])
    mu1, mu2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, -1.0])
    expected = (9 + 0 + 9) + (3**2 + 1**2 + 2.5**2)  # |mu1 - mu2|^2 + sum (sqrt s1 - sqrt s2)^2
    assert M.frechet_distance(mu1, s1.diag(), mu2, s2.diag()) == pytest.approx(expected, rel=1e-12)


def test_frechet_with_equal_covariance_is_the_squared_distance_of_the_means():
    sigma, mu = spd(20, 1), gaussian(1, 20, 2)[0]
    assert M.frechet_distance(mu, sigma, torch.zeros(20), sigma) == pytest.approx(
        mu.square().sum().item(), rel=1e-10
    )


def test_frechet_to_a_scaled_covariance():
    sigma, zero = spd(20, 3), torch.zeros(20)
    assert M.frechet_distance(zero, sigma, zero, 9 * sigma) == pytest.approx(
        4 * sigma.trace().item(), rel=1e-10
    )


def test_frechet_is_symmetric_and_invariant_under_rotation():
    a, b = moments(gaussian(200, 30, 4)), moments(gaussian(150, 30, 5, scale=1.5, shift=0.2))
    value = M.frechet_distance(*a, *b)
    rotation = torch.linalg.qr(gaussian(30, 30, 6)).Q
    turned = [(rotation @ mu, rotation @ sigma @ rotation.T) for mu, sigma in (a, b)]
    assert M.frechet_distance(*b, *a) == pytest.approx(value, rel=1e-10)
    assert M.frechet_distance(*turned[0], *turned[1]) == pytest.approx(value, rel=1e-10)


def test_frechet_of_commuting_matrices_in_another_basis():
    rotation = torch.linalg.qr(gaussian(12, 12, 7)).Q
    s1, s2 = torch.linspace(0.1, 3, 12).double(), torch.linspace(2, 0.5, 12).double()
    zero = torch.zeros(12)
    expected = (s1.sqrt() - s2.sqrt()).square().sum().item()
    value = M.frechet_distance(zero, rotation * s1 @ rotation.T, zero, rotation * s2 @ rotation.T)
    assert value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n, m", [(20, 30), (300, 30), (30, 300), (64, 65)])
def test_frechet_of_rank_deficient_covariances_is_the_nuclear_norm(n, m):
    dim = 64
    x, y = gaussian(n, dim, 8), gaussian(m, dim, 9, scale=1.3, shift=0.1)
    cx, cy = (x - x.mean(0)) / (n - 1) ** 0.5, (y - y.mean(0)) / (m - 1) ** 0.5
    nuclear = torch.linalg.matrix_norm(cx @ cy.T, "nuc")
    expected = (x.mean(0) - y.mean(0)).square().sum() + cx.square().sum() + cy.square().sum() - 2 * nuclear
    assert M.frechet_distance(*moments(x), *moments(y)) == pytest.approx(expected.item(), rel=1e-9)
    assert M.frechet_distance_of_factors(x.mean(0), cx.T, y.mean(0), cy.T) == pytest.approx(
        expected.item(), rel=1e-9
    )


def test_frechet_of_a_set_with_itself_is_zero_also_with_dead_features():
    x = gaussian(40, 16, 10)
    x[:, 3] = 0
    assert M.frechet_distance(*moments(x), *moments(x)) == pytest.approx(0, abs=1e-10)


def test_frechet_agrees_with_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = moments(gaussian(300, 40, 11)), moments(gaussian(300, 40, 12, scale=2))
    root = torch.from_numpy(linalg.sqrtm((a[1] @ b[1]).numpy()).real)
    expected = (a[0] - b[0]).square().sum() + (a[1] + b[1] - 2 * root).trace()
    assert M.frechet_distance(*a, *b) == pytest.approx(expected.item(), rel=1e-8)


# Kernel distance


def brute_force_kid(x, y):
    def kernel(a, b):
        return (sum(float(u) * float(v) for u, v in zip(a, b)) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_kid_and_its_jackknife_error_equal_brute_force(monkeypatch):
    monkeypatch.setattr(M, "BLOCK", 3)  # several blocks of rows, the last one short
    x, y = gaussian(7, 5, 13), gaussian(8, 5, 14, shift=0.5)
    value, error = M.kid(x, y)
    assert value == pytest.approx(brute_force_kid(x, y), rel=1e-5)
    without_x = torch.tensor([brute_force_kid(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(7)])
    without_y = torch.tensor([brute_force_kid(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(8)])
    variance = 6 * without_x.var(correction=0) + 7 * without_y.var(correction=0)
    assert error == pytest.approx(variance.sqrt().item(), rel=1e-4)


def test_kid_is_unbiased_and_its_error_is_the_spread_of_repetitions():
    values, errors = zip(*(M.kid(gaussian(40, 8, 100 + i), gaussian(50, 8, 500 + i)) for i in range(120)))
    values, errors = torch.tensor(values), torch.tensor(errors)
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    shifted = torch.tensor(
        [M.kid(gaussian(40, 8, i), gaussian(50, 8, 900 + i, shift=0.7)) for i in range(100)]
    )
    assert shifted[:, 1].mean() == pytest.approx(shifted[:, 0].std().item(), rel=0.25)
    assert shifted[:, 0].mean() > 10 * values.std()


def test_kid_needs_three_images():
    with pytest.raises(ValueError, match="at least 3"):
        M.kid(torch.zeros(2, 4), torch.zeros(5, 4))


# Retrieval, diversity, manifolds


def test_retrieval_of_a_known_case():
    reference = torch.eye(4)
    fake = torch.tensor([[5.0, 0.1, 0, 0], [0, 1, 0.9, 0], [0, 0, 0.2, 0.1], [0, 3, 0, 0]])
    assert M.retrieval_accuracy(fake, torch.tensor([0, 1, 2, 3]), reference) == 0.75
    assert M.retrieval_accuracy(fake, torch.tensor([0, 2, 2, 3]), reference) == 0.5
    assert M.retrieval_accuracy(fake, torch.tensor([0, 2, 2, 1]), reference, top=2) == 1.0


def test_retrieval_forgives_confusion_of_identical_images():
    images = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    images[1] = 7
    groups = M.duplicate_groups(images)
    assert groups.tolist() == [0, 1, 0]
    reference = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    fake = torch.tensor([[1.0, 0.1], [1.0, 0.1]])
    assert M.retrieval_accuracy(fake, torch.tensor([0, 2]), reference, groups) == 1.0
    assert M.retrieval_accuracy(fake, torch.tensor([0, 2]), reference) == 0.5


def test_retrieval_ignores_the_length_of_features():
    reference = torch.tensor([[1.0, 1.0], [100.0, 0.0]])
    assert M.retrieval_accuracy(torch.tensor([[2.0, 2.0]]), torch.tensor([0]), reference) == 1.0


def test_vendi_counts_clusters_on_both_sides_of_the_matrix():
    few = torch.eye(5).repeat(4, 1)  # 20 images, 5 different, 5 dimensions
    assert M.vendi(few) == pytest.approx(5, rel=1e-6)
    assert M.vendi(torch.eye(9)[:3]) == pytest.approx(3, rel=1e-6)  # fewer images than dimensions
    assert M.vendi(torch.ones(10, 4)) == pytest.approx(1, rel=1e-6)
    weights = torch.tensor([3.0, 1.0]) / 4
    expected = math.exp(-(weights * weights.log()).sum())
    assert M.vendi(torch.eye(2)[[0, 0, 0, 1]]) == pytest.approx(expected, rel=1e-6)


def brute_force_prdc(real, fake, k, k_density):
    def radii(points, k):
        return [
            sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1]
            for i, p in enumerate(points)
        ]

    real, fake = real.tolist(), fake.tolist()
    wide, wide_density, wide_fake = radii(real, k), radii(real, k_density), radii(fake, k)
    inside = [[math.dist(f, r) for r in real] for f in fake]
    return {
        "precision": sum(any(d <= w for d, w in zip(row, wide)) for row in inside) / len(fake),
        "recall": sum(any(row[j] <= w for row, w in zip(inside, wide_fake)) for j in range(len(real)))
        / len(real),
        "density": sum(d <= w for row in inside for d, w in zip(row, wide_density)) / (k_density * len(fake)),
        "coverage": sum(min(row[j] for row in inside) <= w for j, w in enumerate(wide_density)) / len(real),
    }


def test_precision_recall_density_coverage_equal_brute_force(monkeypatch):
    monkeypatch.setattr(M, "BLOCK", 7)
    real, fake = gaussian(25, 3, 15), gaussian(20, 3, 16, scale=0.6, shift=1.1)
    expected = brute_force_prdc(real, fake, 3, 5)
    assert min(expected.values()) > 0.05 and max(expected.values()) < 0.95  # a case that could go wrong
    result = M.precision_recall_density_coverage(real, fake)
    assert {name: value for name, (value, _) in result.items()} == pytest.approx(expected)
    p, error = result["precision"]
    assert error == pytest.approx((p * (1 - p) / 19) ** 0.5) and 0 < result["density"][1] < 1


def test_copies_and_new_images_by_their_distance_to_the_training_set(monkeypatch):
    """On a line: gaps between neighbours 1, 1, 2, 2, 10 make r = 1, 1, 1, 2, 2, 10 of median 1.5."""
    monkeypatch.setattr(M, "BLOCK", 2)
    real = torch.tensor([[0.0], [1], [2], [4], [6], [16], [16]])  # the last is a duplicate, which counts once
    fake = torch.tensor([[0.25], [3.0], [6.0], [16.5], [-30.0]])  # d = 0.25, 1, 0, 0.5, 30
    found = M.nearest_to_training(real, fake, low=0.5)
    assert found["ratio"][0] == pytest.approx(0.5 / 1.5) and found["ratio"][1] > 0
    assert found["copies"] == (0.8, pytest.approx((0.8 * 0.2 / 5) ** 0.5))
    assert M.nearest_to_training(real, fake, low=0.01)["copies"][0] == 0.8  # at or below 1, the smallest
    assert M.nearest_to_training(real, fake + 100)["copies"][0] == 0
    with pytest.raises(ValueError, match="at least 3 different real images, got 2"):
        M.nearest_to_training(real[[0, 1, 1]], fake)


def test_a_copyist_is_seen_and_fresh_samples_of_the_same_law_are_not():
    real = gaussian(400, 6, 21)
    fresh, copied = gaussian(300, 6, 22), real[:300] + 0.01 * gaussian(300, 6, 23)
    new, old = M.nearest_to_training(real, fresh), M.nearest_to_training(real, copied)
    assert new["ratio"][0] == pytest.approx(1, abs=0.1) and new["copies"][0] == pytest.approx(0.05, abs=0.04)
    assert old["ratio"][0] < 0.1 and old["copies"][0] > 0.95


def test_collapse_lowers_recall_and_coverage_but_not_precision():
    real = gaussian(200, 4, 17)
    fake = real[:1] + 0.01 * gaussian(200, 4, 18)
    result = M.precision_recall_density_coverage(real, fake)
    assert result["precision"][0] > 0.95
    assert result["recall"][0] < 0.05
    assert result["coverage"][0] < 0.2


def test_diversity_of_known_groups():
    a, b, c = torch.eye(3)
    features = torch.stack([a, 2 * a, b, c, a, b])
    groups = torch.tensor([7, 7, 1, 1, 1, 9])  # equal, all orthogonal, alone
    value, error = M.intra_group_diversity(features, groups)
    assert value == pytest.approx(0.5) and error == pytest.approx(0.5)
    half = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    value, _ = M.intra_group_diversity(torch.cat([half, half]), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least 2 prompts"):
        M.intra_group_diversity(features[:2], groups[:2])


def test_the_difference_of_diversities_is_paired():
    """Groups differ much, the two models by little: only the pairs see it."""
    spread = torch.linspace(0.2, 1.2, 40)
    groups = torch.arange(40).repeat_interleave(2)

    def pairs_at(angles):  # two unit vectors a group, that far apart
        turned = torch.stack([angles.cos(), angles.sin()], 1)
        return torch.stack([torch.tensor([1.0, 0.0]).expand(40, 2), turned], 1).flatten(0, 1)

    near, far = pairs_at(spread), pairs_at(spread + 0.02)
    value, error, (low, high) = M.diversity_difference(far, near, groups)
    expected = (spread.cos() - (spread + 0.02).cos()).double()
    assert value == pytest.approx(expected.mean().item(), rel=1e-4)
    assert error == pytest.approx(expected.std().item() / 40**0.5, rel=1e-3)
    assert low == pytest.approx(value - 1.96 * error, rel=0.02) and high == pytest.approx(
        value + 1.96 * error, rel=0.02
    )
    unpaired = M.intra_group_diversity(near, groups)[1]
    assert low > 0 and value < 0.5 * unpaired  # each alone has an error above the difference
    assert M.diversity_difference(near, far, groups)[0] == -value


def test_frechet_infinity_removes_the_bias_of_small_samples():
    dim, shift = 12, 0.3
    mu, sigma = torch.zeros(dim), torch.eye(dim)
    samples = [gaussian(150, dim, 1000 + i, shift=shift) for i in range(30)]
    plain = torch.tensor([M.frechet_distance(mu, sigma, *moments(x)) for x in samples]) - dim * shift**2
    fitted = torch.tensor([M.frechet_infinity(mu, sigma, x) for x in samples])
    bias = fitted[:, 0].mean() - dim * shift**2
    assert plain.mean() > 5 * plain.std() / 30**0.5  # there is something to remove
    assert abs(bias) < 0.4 * plain.mean()
    assert fitted[:, 1].min() > 0
    again = M.frechet_infinity(mu, sigma, samples[0])
    assert again == pytest.approx(fitted[0].tolist(), rel=1e-6)  # the subsets have a fixed seed
    with pytest.raises(ValueError, match="at least 8"):
        M.frechet_infinity(mu, sigma, samples[0][:7])


def test_vendi_error_is_about_the_spread_over_samples():
    values, errors = [], []
    for seed in range(30):
        x = gaussian(60, 12, 100 + seed) + 1
        values.append(M.vendi(x))
        errors.append(M.vendi_error(x))
    assert 0.4 * np.std(values) < np.mean(errors) < 2.5 * np.std(values)


def test_paired_distance():
    x = gaussian(50, 6, 5)
    assert M.paired_distance(x, 3 * x) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))
    assert M.paired_distance(x, -x)[0] == pytest.approx(2)
    assert M.paired_distance(x, x + 0.1)[0] < M.paired_distance(x, x + 1)[0]
