"""Distances between two sets of features: pure functions of tensors, with no files and no networks.

Features are float tensors (N, D). Moments are float64, because the small eigenvalues of a covariance decide
the Fréchet distance and do not survive float32.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CMMD_SIGMA, CMMD_SCALE = 10, 1000
BLOCK = 2048  # rows of a kernel or distance matrix that are in memory at once


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared Wasserstein-2 distance of two Gaussians: `|mu1-mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))`.

    Dowson and Landau 1982; as the "FID" in Heusel et al., arXiv 1706.08500, eq. 6. With `S = F F^T` the last
    trace is the nuclear norm of `F1^T F2`, which is real, symmetric in its arguments and needs no matrix
    square root.

    Args:
        mu1, mu2: means (D,).
        sigma1, sigma2: covariances (D, D), symmetric and positive semi-definite; rank-deficient ones (N <= D)
            are exact too.

    Returns:
        The distance, >= 0, in squared units of the features.
    """
    mu1, sigma1, mu2, sigma2 = (x.double() for x in (mu1, sigma1, mu2, sigma2))
    with one_thread():
        root1 = factor(sigma1)
        if root1.shape[0] == root1.shape[1]:
            values = torch.linalg.eigvalsh(root1.T @ sigma2 @ root1)
            # A square root turns the rounding error e of a zero eigenvalue into sqrt(e): only a
            # well-conditioned product may take this road, which is three to five times faster than the other.
            if values[0] > len(values) * torch.finfo(values.dtype).eps * values[-1]:
                trace = sigma1.trace() + sigma2.trace() - 2 * values.sqrt().sum()
                return max(float((mu1 - mu2).square().sum() + trace), 0.0)
        return frechet_distance_of_factors(mu1, root1, mu2, factor(sigma2))


def frechet_distance_of_factors(mu1: Tensor, factor1: Tensor, mu2: Tensor, factor2: Tensor) -> float:
    """The same from factors F (D, any) with `F F^T = S`, such as centred features over sqrt(N-1)."""
    with one_thread():
        root = torch.linalg.svdvals(factor1.T @ factor2).sum()
    trace = factor1.square().sum() + factor2.square().sum() - 2 * root
    return max(float((mu1 - mu2).square().sum() + trace), 0.0)


def frechet_infinity(
    mu: Tensor, sigma: Tensor, features: Tensor, sizes: int = 10, seed: int = 0
) -> tuple[float, float]:
    """Fréchet distance extrapolated to infinitely many images: the bias is nearly linear in 1/n.

    Chong and Forsyth, arXiv 1911.07023, section 3: distances of random subsets of growing size, and the
    intercept of a straight line in 1/n. They use 15 sizes from 5000 on; we start at n/10, or n/2 below 10,000
    images.

    Args:
        mu, sigma: moments of the reference (D,), (D, D).
        features: (N, D), N >= 8.
        sizes: number of subsets, at least 3.
        seed: of the choice of subsets.

    Returns:
        The intercept and its standard error in the fit. It may be negative for near-perfect images.
    """
    n = len(features)
    if n < 8:
        raise ValueError(f"the fit in 1/n needs at least 8 images, got {n}")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.linspace(max(n // 10, min(5000, n // 2)), n, sizes).long()
    values = []
    for count in counts:
        subset = features[torch.randperm(n, generator=generator)[:count]].double()
        values.append(frechet_distance(mu, sigma, subset.mean(0), torch.cov(subset.T)))
    design = torch.stack([torch.ones(sizes), 1 / counts], 1).double()
    found = torch.tensor(values, dtype=torch.float64)
    coefficients = torch.linalg.lstsq(design, found).solution
    residual = (found - design @ coefficients).square().sum() / (sizes - 2)
    return float(coefficients[0]), float((residual * torch.linalg.inv(design.T @ design)[0, 0]).sqrt())


def factor(sigma: Tensor) -> Tensor:
    """F (D, rank) with `F F^T = sigma`: by Cholesky for full rank, from eigenvectors otherwise."""
    tiny = len(sigma) * torch.finfo(sigma.dtype).eps
    lower, failed = torch.linalg.cholesky_ex(sigma)
    # A singular matrix can pass by luck of rounding: its pivots are then noise.
    if not failed and lower.diagonal().min().square() > tiny * sigma.diagonal().max():
        return lower
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > tiny * values[-1].abs()
    return vectors[:, kept] * values[kept].sqrt()


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK's spectral routines gain little from threads and are ten times slower with them when busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def kid(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Kernel distance: unbiased squared MMD with the kernel `(x.y / D + 1)^3`.

    Bińkowski et al., arXiv 1801.01401, eq. 4. All pairs are used instead of random subsets, so the value has
    no seed. Unbiased: its mean is 0 for equal distributions, and it can be negative.

    Args:
        x: features (M, D), M >= 3.
        y: features (N, D), N >= 3.

    Returns:
        The value and its standard error, by the delete-one jackknife over both sets.
    """
    m, n = len(x), len(y)
    if min(m, n) < 3:
        raise ValueError(f"KID needs at least 3 images on each side, got {m} and {n}")

    def rows(a: Tensor, b: Tensor, skip_self: bool = False) -> Tensor:
        return _kernel_rows(a.float(), b.float(), lambda dots: (dots / x.shape[1] + 1) ** 3, skip_self)

    xx, yy, xy, yx = rows(x, x, True), rows(y, y, True), rows(x, y), rows(y, x)
    within_x, within_y, between = xx.sum() / (m * (m - 1)), yy.sum() / (n * (n - 1)), xy.sum() / (m * n)
    # The same statistic without x_i (or y_j) follows from the sums of one row of each kernel matrix.
    without_x = (xx.sum() - 2 * xx) / ((m - 1) * (m - 2)) + within_y - 2 * (xy.sum() - xy) / ((m - 1) * n)
    without_y = (yy.sum() - 2 * yy) / ((n - 1) * (n - 2)) + within_x - 2 * (yx.sum() - yx) / (m * (n - 1))
    variance = (m - 1) * without_x.var(correction=0) + (n - 1) * without_y.var(correction=0)
    return float(within_x + within_y - 2 * between), float(variance.sqrt())


def cmmd(x: Tensor, y: Tensor) -> tuple[float, float]:
    """CMMD: 1000 times the squared MMD of unit vectors with the kernel `exp(-|x-y|^2 / (2 10^2))`.

    Jayasumana et al., arXiv 2401.09603, section 4, with the estimator of its authors' code: every pair counts, that
    of a point with itself too, so that the value is never negative and has a bias of about 10 (1/M + 1/N).

    Args:
        x: CLIP features (M, D), M >= 2, which are normalised here. y: the same (N, D), N >= 2.

    Returns:
        The value and its standard error, by the delete-one jackknife over both sets.
    """
    m, n = len(x), len(y)
    if min(m, n) < 2:
        raise ValueError(f"CMMD needs at least 2 images on each side, got {m} and {n}")
    x, y = (torch.nn.functional.normalize(z.double(), dim=1) for z in (x, y))

    def rows(a: Tensor, b: Tensor) -> Tensor:
        return _kernel_rows(a, b, lambda dots: ((dots - 1) / CMMD_SIGMA**2).exp())  # |a-b|^2 = 2 - 2 a.b

    xx, yy, xy, yx = rows(x, x), rows(y, y), rows(x, y), rows(y, x)
    within_x, within_y, between = xx.sum() / m**2, yy.sum() / n**2, xy.sum() / (m * n)
    without_x = (xx.sum() - 2 * xx + 1) / (m - 1) ** 2 - 2 * (xy.sum() - xy) / ((m - 1) * n)
    without_y = (yy.sum() - 2 * yy + 1) / (n - 1) ** 2 - 2 * (yx.sum() - yx) / (m * (n - 1))
    variance = (m - 1) * without_x.var(correction=0) + (n - 1) * without_y.var(correction=0)
    value = (within_x + within_y - 2 * between).clamp(min=0)
    return CMMD_SCALE * float(value), CMMD_SCALE * float(variance.sqrt())


def _kernel_rows(
    x: Tensor, y: Tensor, kernel_of: Callable[[Tensor], Tensor], skip_self: bool = False
) -> Tensor:
    """Row sums (M,) in float64 of a kernel, a function of dot products, of x (M, D) and y (N, D)."""
    sums = []
    for start in range(0, len(x), BLOCK):
        kernel = kernel_of(x[start : start + BLOCK] @ y.T)
        if skip_self:
            kernel.diagonal(start).zero_()
        sums.append(kernel.sum(1, dtype=torch.float64))
    return torch.cat(sums)


def retrieval_accuracy(
    fake_features: Tensor,
    prompted_index: Tensor,
    reference_features: Tensor,
    duplicates: Tensor | None = None,
    top: int = 1,
) -> float:
    """Share of generated images whose nearest reference images (cosine similarity) include the prompted one.

    Args:
        fake_features: (N, D).
        prompted_index: (N,) integers, which reference image the prompt of each fake image describes.
        reference_features: (M, D), one image per prompt.
        duplicates: (M,) class of each reference image, equal for images that no method could tell apart; see
            `duplicate_groups`. By default every image is its own class.
        top: how many neighbours may be tried.

    Returns:
        Accuracy in [0, 1]. Guessing gives about `top / M`.
    """
    prompted_index = torch.as_tensor(prompted_index)
    classes = torch.arange(len(reference_features)) if duplicates is None else duplicates
    reference = torch.nn.functional.normalize(reference_features.float(), dim=1)
    hits = 0
    for fake, wanted in zip(fake_features.split(BLOCK), prompted_index.split(BLOCK)):
        similarity = torch.nn.functional.normalize(fake.float(), dim=1) @ reference.T
        found = classes[similarity.topk(top, dim=1).indices.cpu()]
        hits += int((found == classes[wanted][:, None]).any(1).sum())
    return hits / len(fake_features)


def duplicate_groups(images: Iterable[Tensor]) -> Tensor:
    """Class of each image (N,), equal for pixel-identical images (H, W, C), of which one is held at a time; numbered as
    they appear."""
    seen: dict[tuple[tuple[int, ...], bytes], int] = {}
    keys = ((tuple(one.shape), hashlib.sha256(one.contiguous().numpy().data).digest()) for one in images)
    return torch.tensor([seen.setdefault(key, len(seen)) for key in keys])


def vendi(features: Tensor) -> float:
    """Effective number of different images: `exp(-sum w log w)`, w the eigenvalues of the cosine kernel / N.

    Friedman and Dieng, arXiv 2210.02410, eq. 2. From 1 (all alike) to N (all orthogonal). Grows with N:
    compare equal N only.

    Args:
        features: (N, D).
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    # The Gram matrices of rows and of columns have the same nonzero eigenvalues: take the smaller.
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    with one_thread():
        values = torch.linalg.eigvalsh(gram / len(unit)).clamp(min=0)
    return float(torch.exp(torch.special.entr(values).sum()))


def vendi_error(features: Tensor, blocks: int = 10) -> float:
    """Standard error of the Vendi score by the delete-one-block jackknife over the images (N, D), N >= 4."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split(min(blocks, len(order) // 2))
    rest = [torch.cat([p for j, p in enumerate(parts) if j != i]) for i in range(len(parts))]
    values = torch.tensor([vendi(features[kept]) for kept in rest])
    return float((len(parts) - 1) ** 0.5 * values.std(correction=0))


def paired_distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cosine distance of features (N, D) of two images of the same noise and prompt, and its standard error."""
    distances = 1 - torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=1)
    return float(distances.mean()), float(distances.std() / len(x) ** 0.5)


def intra_group_diversity(features: Tensor, groups: Tensor) -> tuple[float, float]:
    """Mean cosine distance between two images of one prompt, averaged over the prompts.

    Args:
        features: (N, D).
        groups: (N,) integers, which prompt an image belongs to; prompts with one image are left out.

    Returns:
        Value in [0, 2], 0 when every prompt gives one image only, and its standard error over the prompts.
    """
    values = _diversities(features, groups)
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def diversity_difference(
    features: Tensor, others: Tensor, groups: Tensor, resamples: int = 10_000
) -> tuple[float, float, tuple[float, float]]:
    """How much more diverse images are than another model's of the same prompts, prompt by prompt.

    Args:
        features, others: (N, D) of both, in the same order. groups: as in :func:`intra_group_diversity`.
        resamples: of the prompts, with replacement.

    Returns:
        The mean difference, its standard error over the prompts, and its 95% interval by the bootstrap.
    """
    values = (_diversities(features, groups) - _diversities(others, groups)).double()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (resamples, len(values)), generator=generator)
    low, high = values[chosen].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.mean()), float(values.std() / len(values) ** 0.5), (low, high)


def _diversities(features: Tensor, groups: Tensor) -> Tensor:
    """Mean cosine distance within each group that has several members, groups in rising order."""
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    distances = []
    for group in groups.unique():
        members = unit[groups == group]
        n = len(members)
        if n > 1:
            distances.append(1 - (members.sum(0).square().sum() - n) / (n * (n - 1)))
    if len(distances) < 2:
        raise ValueError(f"diversity needs at least 2 prompts with several images each, got {len(distances)}")
    return torch.stack(distances)


def precision_recall_density_coverage(
    real: Tensor, fake: Tensor, k: int = 3, k_density: int = 5
) -> dict[str, tuple[float, float]]:
    """How far fake images lie on the real manifold, and how much of it they reach.

    A point is covered by a set if it lies in the ball around one of its points that reaches to that point's
    k-th neighbour in the set. Precision and recall: Kynkäänniemi et al., arXiv 1904.06991, eq. 1-2. Density
    and coverage: Naeem et al., arXiv 2002.09797, eq. 3-5. The order of the arguments matters.

    Args:
        real: features (M, D).
        fake: features (N, D).
        k: neighbour for precision and recall.
        k_density: neighbour for density and coverage.

    Returns:
        `precision`, `recall`, `coverage` in [0, 1] and `density` >= 0 (1 for equal distributions), each with its
        standard error as a mean over points, given the balls.
    """
    if min(len(real), len(fake)) <= max(k, k_density):
        raise ValueError(
            f"needs more than {max(k, k_density)} images on each side, got {len(real)} and {len(fake)}"
        )
    centre = real.mean(0)  # distances come from dot products, which are precise only near the origin
    real, fake = real.float() - centre, fake.float() - centre
    real_radius, real_radius_density = _neighbour_distance(real, (k, k_density))
    (fake_radius,) = _neighbour_distance(fake, (k,))
    precise, dense, recalled, nearest = [], [], [], torch.full((len(real),), torch.inf)
    for block in fake.split(BLOCK):
        distance = torch.cdist(block, real)
        precise.append((distance <= real_radius).any(1))
        dense.append((distance <= real_radius_density).sum(1))
        nearest = torch.minimum(nearest.to(distance), distance.min(0).values)
    for block in real.split(BLOCK):
        recalled.append((torch.cdist(block, fake) <= fake_radius).any(1))
    values = {
        "precision": torch.cat(precise).double(),
        "recall": torch.cat(recalled).double(),
        "density": torch.cat(dense).double() / k_density,
        "coverage": (nearest <= real_radius_density).double(),
    }
    return {name: (float(v.mean()), float(v.std() / len(v) ** 0.5)) for name, v in values.items()}


def nearest_to_training(real: Tensor, fake: Tensor, low: float = 0.05) -> dict[str, tuple[float, float]]:
    """Whether images are new, or those that a model was trained on: distances to the nearest training image.

    Let `d` be the distances of the fake images to their nearest real one, and `r` those of the real ones to their
    nearest other; real images with the same features count once. Both are of Euclidean distances of features.
    `ratio` is the median of `d` over that of `r`: near 0 for copies, about 1 for images as new to the training set as
    its own are to each other, above 1 far from all of them. `copies` is the share of `d` at or below the `low` quantile
    of `r`, which is `low` for the real images among themselves: far above it, a model repeats its training set.

    Args:
        real: features (M, D) of the training images, at least 3 different ones.
        fake: features (N, D).
        low: quantile in (0, 1), linear between order statistics.

    Returns:
        `ratio` with its standard error by the bootstrap over fake images, `copies` with a binomial one.
    """
    real = torch.unique(real.float(), dim=0)
    if len(real) < 3:
        raise ValueError(f"needs at least 3 different real images, got {len(real)}")
    centre = real.mean(0)  # distances come from dot products, which are precise only near the origin
    real, fake = real - centre, fake.float() - centre
    (among,) = _neighbour_distance(real, (1,))
    nearest = torch.cat([torch.cdist(block, real).min(1).values for block in fake.split(BLOCK)])
    among, nearest = among.double(), nearest.double()
    generator = torch.Generator().manual_seed(0)
    again = nearest[torch.randint(len(nearest), (1000, len(nearest)), generator=generator)]
    middle = among.quantile(0.5)
    share = float((nearest <= among.quantile(low)).double().mean())
    return {
        "ratio": (float(nearest.quantile(0.5) / middle), float((again.quantile(0.5, dim=1) / middle).std())),
        "copies": (share, (share * (1 - share) / len(nearest)) ** 0.5),
    }


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """`exp(E KL(p(y|x) | p(y)))` of a classifier, averaged over consecutive parts of the images.

    Salimans et al., arXiv 1606.03498, section 4. From 1 to the number of classes.

    Args:
        logits: (N, classes), N >= 2 splits.
        splits: parts, as in the original 10 of 5000 images.

    Returns:
        The mean over the parts and its standard error (the customary "±" is the standard deviation over 10 parts,
        3.2 times as large).
    """
    if len(logits) < 2 * splits:
        raise ValueError(f"the Inception score needs at least {2 * splits} images, got {len(logits)}")
    scores = []
    for part in logits.double().tensor_split(splits):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - torch.tensor(float(len(part))).log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std() / splits**0.5) if splits > 1 else 0.0


def _neighbour_distance(points: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """For each k the distance (N,) from every point (N, D) to its k-th neighbour, itself not counted."""
    rows = []
    for start in range(0, len(points), BLOCK):
        distance = torch.cdist(points[start : start + BLOCK], points)
        rows.append(distance.topk(max(ks) + 1, largest=False).values)
    nearest = torch.cat(rows)
    return [nearest[:, k] for k in ks]
