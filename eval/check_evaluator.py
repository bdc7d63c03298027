"""Measures the evaluator itself and prints Markdown: `python eval/check_evaluator.py`, or with names of parts.

Agreement with other libraries on one random Inception state dict, the Fréchet step against scipy's matrix square
root, memory against the number of images, and decoding by worker processes. What is not installed is left out:
pip install clean-fid torch-fidelity torchmetrics pytorch-fid scipy (with a torchvision that fits torch).
"""

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from fewstep.evaluation import metrics as M
from fewstep.evaluation import protocols
from fewstep.evaluation.evaluate import evaluate_images
from fewstep.evaluation.statistics import table
from fewstep.vision import inception
from fewstep.vision.extractor import file_sha256
from fewstep.vision.extractors import Inception2015

LIBRARIES = (
    "torch",
    "numpy",
    "scipy",
    "pillow",
    "clean-fid",
    "torch-fidelity",
    "torchmetrics",
    "pytorch-fid",
)


def random_weights(file: Path) -> Path:
    """A He-initialised state dict of Inception under the published names."""
    torch.manual_seed(0)
    network = inception.Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), file)
    return file


def drawings(folder: Path, count: int, height: int, width: int, seed: int) -> Path:
    """PNG files of smooth random discs on white."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        image = np.full((height, width, 3), 255, np.uint8)
        for _ in range(5):
            centre, radius = rng.uniform(0, 1, 2) * (height, width), rng.uniform(0.1, 0.3) * width
            image[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = rng.integers(0, 256, 3)
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


def files_of(kind: str, folder: Path, count: int, seed: int) -> Path:
    """Image files that evaluators read unlike each other, of one kind; names of `KINDS`."""
    rng = np.random.default_rng(seed)
    plain = drawings(folder.with_name(f"{folder.name}-{kind}-plain"), count, 60, 76, seed)
    folder = folder.with_name(f"{folder.name}-{kind}")
    folder.mkdir()
    for i, file in enumerate(sorted(plain.iterdir())):
        image = Image.open(file)
        mask = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).resize(image.size)
        png, jpg = folder / f"{i:04d}.png", folder / f"{i:04d}.jpg"
        if kind == "alpha":
            image.putalpha(mask)
            image.save(png)
        elif kind == "grey with alpha":
            image = image.convert("L")
            image.putalpha(mask)
            image.save(png)
        elif kind == "palette":
            image.quantize(16).save(png)
        elif kind == "palette with transparency":
            image.quantize(16).save(png, transparency=bytes(rng.integers(0, 256, 16, dtype=np.uint8)))
        elif kind == "16-bit grey":
            bright = np.asarray(image.convert("L")).astype(np.uint16)
            Image.fromarray(bright * 3 + (bright > 128) * np.uint16(60000)).save(png)
        elif kind == "EXIF orientation":
            exif = Image.Exif()
            exif[0x0112] = 2 + i % 7
            image.save(jpg if i % 2 else png, exif=exif, **({"quality": 90} if i % 2 else {}))
        elif kind == "JPEG":
            image.save(jpg, quality=75)
        elif kind == "mixed sizes":
            image.resize((40 + 9 * i, 70 - 3 * i)).save(png)
        else:
            mode = {"CMYK": "CMYK", "grey": "L", "1-bit": "1"}[kind]
            image.convert(mode).save(jpg if mode == "CMYK" else png)
    return folder


KINDS = (
    "alpha",
    "grey with alpha",
    "palette",
    "palette with transparency",
    "16-bit grey",
    "EXIF orientation",
    "CMYK",
    "JPEG",
    "grey",
    "1-bit",
    "mixed sizes",
)


# name: (protocol-like resize and scaling of ours, function of two folders and a weights file)
def _clean_fid(a: Path, b: Path, weights: Path) -> float:
    from cleanfid import fid

    network = Inception2015(weights=weights).features  # takes what clean-fid resized, 0..255, and scales it
    return fid.compute_fid(
        str(a),
        str(b),
        mode="clean",
        num_workers=0,
        device=torch.device("cpu"),
        use_dataparallel=False,
        verbose=False,
        custom_feat_extractor=lambda x: network((x - 128) / 128),
    )


def _torch_fidelity(a: Path, b: Path, weights: Path) -> float:
    import torch_fidelity

    found = torch_fidelity.calculate_metrics(
        input1=str(a),
        input2=str(b),
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        feature_extractor_weights_path=str(weights),
        batch_size=1,  # the one that takes images of unlike sizes
        save_cpu_ram=True,
    )
    return found["frechet_inception_distance"]


def _torchmetrics(a: Path, b: Path, weights: Path) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(antialias=False, feature_extractor_weights_path=str(weights))
    for folder, real in ((a, True), (b, False)):
        for file in sorted(folder.iterdir()):
            metric.update(torch.from_numpy(np.asarray(Image.open(file))).permute(2, 0, 1)[None], real=real)
    return float(metric.compute())


def _pytorch_fid(a: Path, b: Path, weights: Path) -> float:
    from pytorch_fid import fid_score, inception

    state = torch.load(weights, weights_only=True)
    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        return float(fid_score.calculate_fid_given_paths([str(a), str(b)], 1, "cpu", 2048, 0))


ORACLES: dict[str, tuple[str, str, Callable[[Path, Path, Path], float]]] = {
    "clean-fid, mode clean": ("pil-bicubic-float", "128", _clean_fid),
    "torch-fidelity": ("tf1-bilinear", "128", _torch_fidelity),
    "torchmetrics, antialias=False": ("tf1-bilinear", "128", _torchmetrics),
    "pytorch-fid": ("torch-bilinear", "127.5", _pytorch_fid),
}


def agreement(count: int, height: int, width: int) -> Iterator[tuple[str, float, float]]:
    """(library, its distance, ours by the same resize) of two sets of drawings, with one random state dict."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = random_weights(folder / inception.FILES[1])
        a, b = (drawings(folder / name, count, height, width, i) for i, name in enumerate("ab"))
        with mock.patch.object(inception, "SHA256_PREFIX", file_sha256(weights)[:8]):
            ours: dict[str, float] = {}
            for library, (resize, scaling, oracle) in ORACLES.items():
                try:
                    with redirect_stdout(sys.stderr):
                        theirs = oracle(a, b, weights)
                except ImportError:
                    continue
                if resize not in ours:
                    extractor = Inception2015(resize, scaling, weights=weights)
                    found = evaluate_images(a, b, extractor=extractor, metrics=("fd",))["metrics"]
                    (ours[resize],) = (metric["value"] for metric in found.values())
                yield library, theirs, ours[resize]


TOOLS = {  # protocol: library
    "folder-clean": ("clean-fid, mode clean", "cleanfid"),
    "folder-legacy": ("pytorch-fid", "pytorch_fid"),
    "folder-tf1": ("torch-fidelity", "torch_fidelity"),
}


def reading(kind: str, count: int = 6) -> Iterator[tuple[str, float, float, float, list[str]]]:
    """(library, its distance, ours by the protocol named after it, ours by no protocol, what was warned of)."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = random_weights(folder / inception.FILES[1])
        a, b = (files_of(kind, folder / name, count, i) for i, name in enumerate("ab"))
        with mock.patch.object(inception, "SHA256_PREFIX", file_sha256(weights)[:8]):
            for protocol, (library, module) in TOOLS.items():
                if importlib.util.find_spec(module) is None:
                    continue
                with redirect_stdout(sys.stderr):
                    theirs = ORACLES[library][2](a, b, weights)
                asked = {"metrics": ("fd",), "weights": str(weights)}
                result = evaluate_images(a, b, protocol=protocol, **asked)
                extractor = protocols.load(protocol).get_extractor(weights=str(weights))
                shown = evaluate_images(a, b, extractor=extractor, metrics=("fd",))
                ours, ignored = (next(iter(r["metrics"].values()))["value"] for r in (result, shown))
                told = [w for w in result["warnings"] if "read here" in w or "batch size" in w]
                yield library, theirs, ours, ignored, told


def frechet_speed(dim: int = 2048, counts: tuple[int, ...] = (2000, 10_000)) -> Iterator[tuple]:
    """(images, our value, CPU-seconds, scipy's value, CPU-seconds) of ReLU features."""
    from scipy.linalg import sqrtm

    for n in counts:
        generator = torch.Generator().manual_seed(n)
        mix = torch.randn(dim, dim, generator=generator) / dim**0.5
        x, y = (torch.randn(n, dim, generator=generator) @ mix for _ in range(2))
        x, y = x.relu().double(), (1.1 * y + 0.1).relu().double()
        (mu1, sigma1), (mu2, sigma2) = ((z.mean(0), torch.cov(z.T)) for z in (x, y))

        def theirs(mu1=mu1, sigma1=sigma1, mu2=mu2, sigma2=sigma2) -> float:
            root = sqrtm((sigma1 @ sigma2).numpy())
            return float((mu1 - mu2).square().sum() + (sigma1 + sigma2).trace() - 2 * np.trace(root).real)

        row = [n]
        for function in (lambda: M.frechet_distance(mu1, sigma1, mu2, sigma2), theirs):  # noqa: B023
            begin = time.process_time()
            row += [function(), time.process_time() - begin]
        yield tuple(row)


def memory(counts: tuple[int, ...] = (300, 3000)) -> Iterator[tuple[int, float]]:
    """(images, peak MiB) of `fewstep eval stats` on a folder, in a fresh process each."""
    code = (
        "import sys, resource; from fewstep.cli import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024); sys.exit(code)"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for count in counts:
            folder = drawings(Path(scratch) / str(count), count, 64, 64, 0)
            words = ["eval", "stats", folder, "--extractor", "effnet-lite0@64", "-o", folder / "s.npz"]
            command = [sys.executable, "-c", code, *map(str, words), "--device", "cpu"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            yield count, float(done.stdout.split()[-1])


def decoding(count: int = 128, repeats: int = 3) -> Iterator[tuple[int, float]]:
    """(worker processes, seconds) of the features of images 480 x 640, crop and resize of coco2014-30k."""
    from fewstep.evaluation.features import stream_moments
    from fewstep.evaluation.images import open_images

    extractor = protocols.load("coco2014-30k").get_extractor("effnet-lite0@64", "cpu")
    seconds: dict[int, list[float]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = drawings(Path(scratch) / "images", count, 480, 640, 0)
        for _ in range(repeats):
            for workers, found in seconds.items():
                source = open_images(folder, workers=workers)
                begin = time.perf_counter()
                stream_moments(source, extractor)
                found.append(time.perf_counter() - begin)
    yield from ((workers, statistics.median(found)) for workers, found in seconds.items())


def report_agreement() -> None:
    print(
        "## Agreement\n\nFréchet distances of two sets of drawings, with one random Inception state dict.\n"
    )
    rows = []
    for size in ((10, 80, 96), (24, 80, 96), (12, 500, 600)):
        for library, theirs, ours in agreement(*size):
            images = f"{size[0]} + {size[0]} of {size[1]} x {size[2]}"
            rows.append((images, library, f"{theirs:.8g}", f"{ours:.8g}", f"{ours / theirs - 1:.1e}"))
    print(table(("images", "library", "theirs", "ours, same resize", "relative difference"), rows))


def report_reading() -> None:
    print("## Reading of files\n\nThe same, of files that evaluators read unlike each other.\n")
    rows = []
    for kind in KINDS:
        for library, theirs, ours, shown, told in reading(kind):
            numbers = (f"{theirs:.7g}", f"{ours:.7g}", f"{ours / theirs - 1:.1e}", f"{shown:.7g}")
            rows.append((kind, library, *numbers, len(told)))
    header = ("files", "library", "theirs", "ours", "relative difference", "as shown", "warnings")
    print(table(header, rows))


def report_speed() -> None:
    print("## The Fréchet step at 2,048 features\n")
    rows = [
        (n, f"{ours:.12g}", f"{a:.2f}", f"{theirs:.12g}", f"{b:.2f}", f"{b / a:.1f}")
        for n, ours, a, theirs, b in frechet_speed()
    ]
    print(table(("images", "ours", "CPU-s", "scipy.linalg.sqrtm", "CPU-s", "times faster"), rows))


def report_memory() -> None:
    print("## Memory of `fewstep eval stats`\n")
    print(table(("images", "peak MiB"), [(n, f"{peak:.0f}") for n, peak in memory()]))


def report_decoding() -> None:
    print(
        "## Decoding by worker processes\n\n128 PNG files of 480 x 640 with crop and resizes of coco2014-30k,"
    )
    print("features of effnet-lite0@64; median of 3, wall clock.\n")
    print(table(("workers", "seconds"), [(n, f"{s:.2f}") for n, s in decoding()]))


PARTS = {
    "agreement": report_agreement,
    "reading": report_reading,
    "speed": report_speed,
    "memory": report_memory,
    "decoding": report_decoding,
}


def main(names: list[str]) -> int:
    if unknown := set(names) - set(PARTS):
        print(f"error: unknown parts {sorted(unknown)}, expected some of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    versions = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, one thread; Python {platform.python_version()},")
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + "\n")
    for name in names or PARTS:
        PARTS[name]()
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
