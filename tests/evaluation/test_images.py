"""Reading images, above all those that other evaluators read wrongly."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import FewstepError
from fewstep.evaluation.files import read_image
from fewstep.evaluation.images import FirstImages, open_images


def save(path, array, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options) if mode else Image.fromarray(array).save(
        path, **options
    )
    return path


def everything(source, size=50):
    return torch.cat(list(source.batches(size)))


@pytest.fixture
def folder(tmp_path, pictures):
    path = tmp_path / "images"
    path.mkdir()
    for i, picture in enumerate(pictures[:10]):
        save(path / f"{i:03d}.png", picture)
    return path


def test_folder_npz_and_array_give_the_same_images(folder, tmp_path, pictures):
    expected = torch.from_numpy(pictures[:10])
    np.savez(tmp_path / "plain.npz", arr_0=pictures[:10])
    np.savez_compressed(tmp_path / "packed.npz", images=pictures[:10], captions=np.array(["x"] * 10))
    sources = [open_images(x) for x in (folder, str(folder), tmp_path / "plain.npz", tmp_path / "packed.npz")]
    sources += [open_images(pictures[:10]), open_images(expected)]
    for source in sources:
        assert len(source) == 10
        assert [len(batch) for batch in source.batches(4)] == [4, 4, 2]
        assert torch.equal(everything(source, 3), expected)
    assert len({source.sha256 for source in sources[2:]}) == 1
    assert open_images(pictures[1:11]).sha256 != sources[-1].sha256
    assert sources[0].name == str(folder)


def test_folder_is_sorted_and_leaves_out_other_files(folder, pictures):
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.png").write_text("x")
    save(folder / "aaa.JPG", pictures[11])
    source = open_images(folder)
    assert len(source) == 11
    assert torch.equal(everything(source)[0], torch.from_numpy(pictures[0]))  # digits sort before letters


def test_mixed_sizes_come_in_separate_batches(folder, pictures):
    save(folder / "004b.png", pictures[0].repeat(2, 0))
    shapes = [tuple(batch.shape[:2]) for batch in open_images(folder).batches(100)]
    assert shapes == [(5, 16), (1, 32), (5, 16)]
    assert open_images(folder).sizes == {(16, 16), (32, 16)}


def test_first_images(folder, pictures):
    source = FirstImages(open_images(folder), 7)
    assert len(source) == 7 and torch.equal(everything(source, 3), torch.from_numpy(pictures[:7]))
    assert source.sha256 != source.source.sha256
    rest = FirstImages(open_images(folder), 3, after=7)
    assert torch.equal(everything(rest, 2), torch.from_numpy(pictures[7:10]))
    assert rest.sha256 != FirstImages(open_images(folder), 3).sha256
    with pytest.raises(FewstepError, match="10 images, but 11"):
        FirstImages(open_images(folder), 11)


# Pixel formats


def test_rgba_is_composited_on_white(tmp_path):
    array = np.zeros((2, 2, 4), np.uint8)
    array[..., 0], array[0, 0, 3], array[0, 1, 3] = 200, 255, 51  # opaque, a fifth, transparent
    rgb = read_image(save(tmp_path / "a.png", array))
    assert rgb[0, 0].tolist() == [200, 0, 0]
    assert rgb[0, 1].tolist() == [244, 204, 204]
    assert rgb[1, 1].tolist() == [255, 255, 255]


def test_palette_transparency_is_composited_on_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=1)
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    array = np.array([[0, 257, 200 * 257, 65535]], np.uint16)
    grey = read_image(save(tmp_path / "a.png", array))
    assert grey.shape == (1, 4, 3) and grey[0, :, 1].tolist() == [0, 1, 200, 255]


def test_sixteen_bit_colour_is_scaled(tmp_path):
    row = b"\0" + struct.pack(">6H", 65535, 32768, 0, 257 * 7, 257 * 8, 257 * 9)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(png)
    assert read_image(tmp_path / "a.png").tolist() == [[[255, 128, 0], [7, 8, 9]]]


def test_grayscale_cmyk_and_exif_rotation(tmp_path):
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    assert np.array_equal(read_image(save(tmp_path / "a.png", grey)), grey[..., None].repeat(3, 2))
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "b.jpg")
    assert read_image(tmp_path / "b.jpg").min() >= 254
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "c.jpg", exif=exif)
    assert read_image(tmp_path / "c.jpg").shape == (8, 4, 3)
    assert open_images(tmp_path).sizes == {(2, 2), (8, 8), (4, 8)}


# Refusals, all before the first batch


def test_missing_and_empty(tmp_path):
    with pytest.raises(FewstepError, match=r"nowhere does not exist"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(FewstepError) as error:
        open_images(tmp_path)
    assert str(tmp_path) in str(error.value) and ".png" in str(error.value) and ".webp" in str(error.value)
    with pytest.raises(FewstepError, match="has 1 images, but at least 2"):
        open_images(np.zeros((1, 4, 4, 3), np.uint8), at_least=2)


def test_corrupt_files_are_all_found_and_ten_are_named(folder, pictures):
    whole = (folder / "000.png").read_bytes()
    (folder / "001.png").write_bytes(whole[:-20])  # cut
    (folder / "002.png").write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])  # one bit turned
    (folder / "003.png").write_bytes(b"")
    jpeg = io.BytesIO()
    Image.fromarray(pictures[0].repeat(8, 0).repeat(8, 1)).save(jpeg, "JPEG")
    (folder / "014.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    with pytest.raises(FewstepError) as error:
        open_images(folder)
    assert "4 of 11 images" in str(error.value)
    assert all(name in str(error.value) for name in ("001.png", "002.png", "003.png", "014.jpg"))
    assert "000.png" not in str(error.value)
    for i in range(20, 40):
        (folder / f"{i:03d}.png").write_text("x")
    with pytest.raises(FewstepError, match="and 14 more") as error:
        open_images(folder)
    assert str(error.value).count(".png:") + str(error.value).count(".jpg:") == 10


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 4, 3), np.float32),
        np.zeros((3, 3, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((3, 0, 4, 3), np.uint8),
    ],
    ids=["float", "channels first", "one image", "no pixels"],
)
def test_wrong_arrays(tmp_path, array):
    np.savez(tmp_path / "a.npz", images=array)
    for source in (tmp_path / "a.npz", array):
        with pytest.raises(FewstepError, match=r"expected uint8 \(N, H, W, 3\)"):
            open_images(source)


def test_pickled_npz_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return open, (str(ran), "w")

    np.savez(tmp_path / "a.npz", images=np.array([Trap()], object))
    with pytest.raises(FewstepError, match="type object"):
        open_images(tmp_path / "a.npz")
    assert not ran.exists()


def test_npz_files_that_are_none(tmp_path, pictures):
    np.savez(tmp_path / "names.npz", samples=pictures)
    with pytest.raises(FewstepError, match="'samples'"):
        open_images(tmp_path / "names.npz")
    np.savez(tmp_path / "fortran.npz", images=np.asfortranarray(pictures))
    with pytest.raises(FewstepError, match="Fortran"):
        open_images(tmp_path / "fortran.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(FewstepError, match=r"text\.npz"):
        open_images(tmp_path / "text.npz")
    np.savez(tmp_path / "damaged.npz", images=pictures)
    data = bytearray((tmp_path / "damaged.npz").read_bytes())
    data[5000] ^= 1
    (tmp_path / "damaged.npz").write_bytes(data)
    with pytest.raises(FewstepError, match="damaged"):
        open_images(tmp_path / "damaged.npz")


def test_a_damaged_header_reads_as_one_error(tmp_path, pictures):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, pictures)
    import zipfile

    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("images.npy", buffer.getvalue()[:-100])
    with pytest.raises(FewstepError, match="bytes are stored"):
        open_images(tmp_path / "short.npz")
