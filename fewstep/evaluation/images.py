"""Reading images for evaluation: a folder, an npz file or an array, all checked before the expensive part."""

import hashlib
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fewstep.errors import FewstepError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BLOCK = 64  # images in a row that go to one process
KEYS = ("images", "arr_0")  # names of the image array in an npz file; ADM's sample files use the second


class ImageSource:
    """Images in a fixed order.

    Attributes:
        name: path, or "array".
        sizes: the (height, width) that occur, before any rotation that EXIF asks for.
        skipped: names of files that could not be read and were left out, as the caller allowed.
    """

    name: str
    skipped: tuple[str, ...] = ()
    sizes: set[tuple[int, int]]

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 RGB tensors (B, H, W, 3), B <= size. A change of image size starts a new batch."""
        raise NotImplementedError

    def shard(self, rank: int, world: int) -> "ImageSource":
        """The images that process `rank` of `world` looks after."""
        return self if world == 1 else ShardImages(self, rank, world)

    @cached_property
    def sha256(self) -> str:
        """Hash of the images in their order: of the pixels, or of the files of a folder."""
        digest = hashlib.sha256()
        for batch in self.batches(256):
            digest.update(repr(tuple(batch.shape)).encode())
            digest.update(batch.contiguous().numpy())
        return digest.hexdigest()


def open_images(
    images: "str | Path | np.ndarray | Tensor | ImageSource", at_least: int = 1, skip_bad: int = 0
) -> ImageSource:
    """Opens images and checks them all, so that errors come before expensive work.

    Args:
        images: folder with png, jpg, jpeg, webp or bmp files (sorted by name, subfolders not entered), npz
            file with a uint8 array `images` or `arr_0` (N, H, W, 3), or such an array or tensor.
        at_least: smallest number of images that is useful to the caller.
        skip_bad: how many unreadable files of a folder may be left out; more are an error.

    Raises:
        FewstepError: missing path, no images, unreadable images, wrong shape or type, too few images.
    """
    if isinstance(images, ImageSource):
        source = images
    elif isinstance(images, np.ndarray | Tensor):
        source = ArrayImages(images)
    else:
        path = Path(images)
        if not path.exists():
            raise FewstepError(f"{path} does not exist: expected a folder of images or an npz file")
        source = FolderImages(path, skip_bad) if path.is_dir() else NpzImages(path)
    if len(source) < at_least:
        raise FewstepError(f"{source.name} has {len(source)} images, but at least {at_least} are needed")
    return source


class ArrayImages(ImageSource):
    """Images in memory."""

    def __init__(self, images: np.ndarray | Tensor, name: str = "array"):
        self.name = name
        self.images = torch.as_tensor(images).cpu()
        _check_array(name, tuple(self.images.shape), str(self.images.dtype).removeprefix("torch."))
        self.sizes = {tuple(self.images.shape[1:3])}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        yield from self.images.split(size)


class NpzImages(ImageSource):
    """Images of an npz file, read in a stream: the array may be larger than memory."""

    def __init__(self, path: Path):
        self.name, self.path = str(path), path
        try:
            with zipfile.ZipFile(path) as archive:
                _check_members(path, archive.namelist())
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                keys = [key for key in KEYS if key in names]
                if not keys:
                    raise FewstepError(
                        f"{path} has the arrays {sorted(names)}, expected one called images or arr_0"
                    )
                self.member = keys[0] + ".npy"
                with archive.open(self.member) as file:
                    self.shape, fortran, dtype = _read_header(file)
                    stored = archive.getinfo(self.member).file_size - file.tell()
                _check_array(self.name, self.shape, str(dtype))
                if fortran:
                    raise FewstepError(
                        f"{path}: the array is in Fortran order: save np.ascontiguousarray(images)"
                    )
                if stored != int(np.prod(self.shape)):
                    raise FewstepError(
                        f"{path}: {stored} bytes are stored for an array of shape {self.shape}"
                    )
                damaged = archive.testzip()
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            if isinstance(error, FewstepError):
                raise
            raise FewstepError(
                f"{path} is neither a folder of images nor a readable npz file: {error}"
            ) from None
        self.sizes = {self.shape[1:3]}
        if damaged:
            raise FewstepError(f"{path}: {damaged} is damaged (wrong checksum): write the file again")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        bytes_per_image = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            _read_header(file)
            for start in range(0, len(self), size):
                data = file.read(min(size, len(self) - start) * bytes_per_image)
                yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, *self.shape[1:])


class FolderImages(ImageSource):
    """Image files of one folder, sorted by name."""

    def __init__(self, folder: Path, skip_bad: int = 0):
        self.name = str(folder)
        # Hidden files are leftovers of interrupted writers, or of file browsers.
        self.files = sorted(
            p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and p.name[0] != "." and p.is_file()
        )
        if not self.files:
            raise FewstepError(f"{folder} has no images: looked for {', '.join(EXTENSIONS)}")
        _check_names(folder, self.files)
        self.sizes = set()
        broken, readable = [], []
        for file in self.files:
            try:
                self.sizes.add(check_file(file))
                readable.append(file)
            except Exception as error:  # Pillow's decoders raise many kinds, SyntaxError among them
                broken.append(f"{file.name}: {error or type(error).__name__}")
        if len(broken) <= skip_bad and readable:
            self.files, self.skipped = readable, tuple(line.partition(":")[0] for line in broken)
        else:
            more = f"\n  and {len(broken) - 10} more" if len(broken) > 10 else ""
            raise FewstepError(
                f"{folder}: {len(broken)} of {len(self.files)} images cannot be read: remove or replace "
                f"them, or allow some with --skip-bad\n  " + "\n  ".join(broken[:10]) + more
            )

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int) -> Iterator[Tensor]:
        yield from self.read(self.files, size)

    @staticmethod
    def read(files: list[Path], size: int) -> Iterator[Tensor]:
        """The images of some files, in batches of one size."""
        batch: list[np.ndarray] = []
        for file in files:
            image = read_image(file)
            if batch and (len(batch) == size or image.shape != batch[0].shape):
                yield torch.from_numpy(np.stack(batch))
                batch = []
            batch.append(image)
        if batch:
            yield torch.from_numpy(np.stack(batch))

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()


class ShardImages(ImageSource):
    """One process's part of another source: whole blocks in turn, so that batches are those of a single process."""

    def __init__(self, source: ImageSource, rank: int, world: int):
        self.name, self.source = source.name, source
        self.sizes, self.skipped = source.sizes, source.skipped
        self.mine = torch.arange(len(source)) // BLOCK % world == rank  # (N,)

    def __len__(self) -> int:
        return int(self.mine.sum())

    def batches(self, size: int) -> Iterator[Tensor]:
        if isinstance(self.source, FolderImages):  # files of others are not opened
            yield from self.source.read([f for f, mine in zip(self.source.files, self.mine) if mine], size)
            return
        done = 0
        for batch in self.source.batches(size):
            part = batch[self.mine[done : done + len(batch)]]
            done += len(batch)
            if len(part):
                yield part


class FirstImages(ImageSource):
    """The first n images of another source."""

    def __init__(self, source: ImageSource, n: int):
        if not 0 < n <= len(source):
            raise FewstepError(f"{source.name} has {len(source)} images, but {n} are asked for")
        self.name, self.source, self.n = source.name, source, n
        self.sizes, self.skipped = source.sizes, source.skipped

    def __len__(self) -> int:
        return self.n

    def batches(self, size: int) -> Iterator[Tensor]:
        left = self.n
        for batch in self.source.batches(size):
            yield batch[:left]
            left -= len(batch)
            if left <= 0:
                return

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(f"first {self.n} of {self.source.sha256}".encode()).hexdigest()


def read_image(path: Path) -> np.ndarray:
    """Decodes to uint8 RGB (H, W, 3): upright as EXIF says, transparency over white, 16 bits scaled."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16-bit grayscale; Pillow's own conversion would clip it at 255
            grey = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


def _check_names(folder: Path, files: list[Path]) -> None:
    """Refuses two files of one name, such as a.png beside a.jpg: captions would shift by one."""
    seen: dict[str, Path] = {}
    twice = [(seen[f.stem], f) for f in files if f.stem in seen or seen.setdefault(f.stem, f) is not f]
    if twice:
        first, second = twice[0]
        raise FewstepError(
            f"{folder}: {len(twice)} names occur more than once, such as {first.name} and {second.name}: expected "
            "one image of a name; remove the others"
        )


def check_file(path: Path) -> tuple[int, int]:
    """Height and width as stored; raises what Pillow raises on a file that cannot be decoded."""
    with Image.open(path) as image:
        width, height = image.size
        if image.format == "PNG":
            image.verify()  # checksums of every chunk, without decoding
        else:
            image.draft("RGB", (1, 1))  # lets JPEG decode at an eighth of the size
            image.load()
    return height, width


def _check_members(path: Path, names: list[str]) -> None:
    """Nothing is ever extracted, but a file with such names was made to do harm."""
    for name in names:
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            raise FewstepError(
                f"{path}: the member {name!r} leaves the archive: expected plain names; not read"
            )


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of the npy file, which is left at its first byte of data."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _check_array(name: str, shape: tuple[int, ...], dtype: str) -> None:
    if dtype != "uint8" or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise FewstepError(
            f"{name}: the images have type {dtype} and shape {shape}, expected uint8 (N, H, W, 3) in 0..255, "
            "channels last"
        )
