"""Files of every kind become the same kind of tensor, exactly; what cannot is refused by name."""

import errno
import os
import struct
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps
from support.reading import png_bytes

from colora_peft.images.image_file import read_image_file
from colora_peft.images.kinds import IMAGE_FORMATS
from colora_peft.images.limits import DEFAULT_MAX_PIXELS
from colora_peft.images.listing import list_images
from colora_peft.images.reading import (
    _oriented,
    as_float,
    decode_stored,
    read_image,
    to_pil,
)

ORIENTATION = 0x0112
HEIGHT, WIDTH = 5, 7


def random_pixels(dtype, *channels, seed=0):
    limit = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, limit, (HEIGHT, WIDTH, *channels), dtype=dtype)


def as_tensor(pixels):
    """(H, W[, C]) integers to (3, H, W) in [0, 1], grey repeated."""
    values = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    values = values if values.ndim == 3 else values[..., None].repeat(3, axis=2)
    return torch.from_numpy(values).permute(2, 0, 1)


def on_white(pixels, alpha):
    colour, opacity = as_tensor(pixels), as_tensor(alpha)
    return colour * opacity + 1 - opacity


def check_is_image(image):
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert image.min() >= 0 and image.max() <= 1


def assert_reads_as(path, expected, within=1e-6):
    image = read_image(path)
    check_is_image(image)
    torch.testing.assert_close(image, expected, atol=within, rtol=0)


def exif_bytes(orientation):
    return b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">H", orientation) + b"\0" * 6


# Kinds of files


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICNS"])
def test_only_the_kinds_that_are_named_are_opened_whatever_a_file_is_called(tmp_path, kind):
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "a.png", kind)  # of EPS Pillow would start Ghostscript
    for read in (read_image, read_image_file):
        with pytest.raises(ValueError, match=r"a\.png cannot be read as an image \(unknown format\)"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("kind", [*IMAGE_FORMATS, "MPO"])
def test_all_kinds_that_are_named_are_opened(tmp_path, kind):
    first = Image.new("RGB", (32, 32), "teal")
    more = {"save_all": True, "append_images": [Image.new("RGB", (32, 32), "red")]} if kind == "MPO" else {}
    first.save(tmp_path / "a.png", kind, **more)
    for image in (read_image(tmp_path / "a.png"), read_image_file(tmp_path / "a.png").colour):
        torch.testing.assert_close(
            image, torch.tensor([0, 128, 128])[:, None, None].expand(3, 32, 32) / 255, atol=0.02, rtol=0
        )


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_of_8_bit_files_are_pillow_s(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels = random_pixels(np.uint8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    tifffile.imwrite(tmp_path / "a.tif", pixels[..., 0], extratags=[(ORIENTATION, "H", 1, orientation, True)])
    for name in ("a.png", "a.jpg"):
        with Image.open(tmp_path / name) as opened:
            expected = np.array(ImageOps.exif_transpose(opened))
        assert_reads_as(tmp_path / name, as_tensor(expected))
    assert_reads_as(tmp_path / "a.tif", as_tensor(_oriented(pixels[..., 0], orientation)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "colour"])
def test_orientations_of_16_bit_files(tmp_path, orientation, channels):
    pixels = random_pixels(np.uint16, *channels)
    expected = as_tensor(_oriented(pixels, orientation))
    (tmp_path / "a.png").write_bytes(png_bytes(pixels, 2 if channels else 0, (b"eXIf", exif_bytes(orientation))))
    photometric = "rgb" if channels else "minisblack"
    tag = [(ORIENTATION, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric=photometric, extratags=tag)
    for name in ("a.png", "a.tif"):
        assert_reads_as(tmp_path / name, expected)


@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\xff\xff\xff\0", b"II*\0\x08\0\0\0\x05\0\x12\x01"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_damaged_exif_is_no_reason_to_refuse_an_image(tmp_path, dtype, exif):
    pixels = random_pixels(dtype, 3)
    (tmp_path / "a.png").write_bytes(png_bytes(pixels, 2, (b"eXIf", exif)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_reads_as(tmp_path / "a.png", as_tensor(pixels))


# Kinds of files


def test_8_bit_colour_and_grey_are_exact(tmp_path):
    for suffix in ("png", "tif", "bmp"):
        for channels in ((), (3,)):
            pixels = random_pixels(np.uint8, *channels)
            Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
            assert torch.equal(read_image(tmp_path / f"a.{suffix}"), as_tensor(pixels))


@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "colour"])
def test_16_bits_are_kept(tmp_path, channels):
    pixels = random_pixels(np.uint16, *channels)
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., ::-1] if channels else pixels)
    photometric = "rgb" if channels else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric=photometric)
    tifffile.imwrite(tmp_path / "b.tif", pixels, photometric=photometric, byteorder=">", compression="deflate")
    for name in ("a.png", "a.tif", "b.tif"):
        assert_reads_as(tmp_path / name, as_tensor(pixels))
        back = (read_image(tmp_path / name).double() * 65535).round()
        assert torch.equal(
            back.permute(1, 2, 0)[..., 0], torch.from_numpy(pixels.reshape(HEIGHT, WIDTH, -1)[..., 0]).double()
        )


def test_transparency_is_laid_on_white(tmp_path):
    for dtype, within in ((np.uint8, 1 / 255), (np.uint16, 1e-6)):
        rgba, la = random_pixels(dtype, 4), random_pixels(dtype, 2)
        (tmp_path / "rgba.png").write_bytes(png_bytes(rgba, 6))
        (tmp_path / "la.png").write_bytes(png_bytes(la, 4))
        assert_reads_as(tmp_path / "rgba.png", on_white(rgba[..., :3], rgba[..., 3]), within)
        assert_reads_as(tmp_path / "la.png", on_white(la[..., 0], la[..., 1]), within)
        tifffile.imwrite(tmp_path / "rgba.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
        assert_reads_as(tmp_path / "rgba.tif", on_white(rgba[..., :3], rgba[..., 3]), within)


def test_colours_that_opacity_is_multiplied_into_are_not_multiplied_again(tmp_path):
    straight = random_pixels(np.uint16, 4)
    multiplied = straight.copy()
    multiplied[..., :3] = np.round(straight[..., :3].astype(float) * straight[..., 3:] / 65535)
    tifffile.imwrite(tmp_path / "a.tif", multiplied, photometric="rgb", extrasamples=["assocalpha"])
    assert_reads_as(tmp_path / "a.tif", on_white(straight[..., :3], straight[..., 3]), within=1e-5)


def test_one_transparent_colour_becomes_white(tmp_path):
    pixels = random_pixels(np.uint8, 3)
    expected = as_tensor(pixels).clone()
    expected[:, 2, 3] = 1
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=tuple(int(v) for v in pixels[2, 3]))
    assert_reads_as(tmp_path / "a.png", expected)


def test_palettes_with_and_without_transparency(tmp_path):
    colours = np.array([[255, 0, 0], [10, 200, 30], [0, 0, 250], [90, 90, 90]], np.uint8)
    indices = random_pixels(np.uint8) % 4
    image = Image.fromarray(indices, mode="L").convert("P")
    image.putdata(indices.flatten().tolist())
    image.putpalette(colours.flatten().tolist())
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "holes.png", transparency=1)
    expected = as_tensor(colours[indices])
    assert_reads_as(tmp_path / "plain.png", expected)
    assert_reads_as(tmp_path / "holes.png", torch.where(torch.from_numpy(indices == 1), 1.0, expected))


def test_cmyk_and_one_bit(tmp_path):
    inks = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    inks[:, 3:, 1] = 255  # magenta on the right, bare paper on the left
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    expected = torch.ones(3, HEIGHT, WIDTH)
    expected[1, :, 3:] = 0
    assert_reads_as(tmp_path / "a.tif", expected)
    bits = random_pixels(np.uint8) > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert_reads_as(tmp_path / "bits.png", as_tensor(bits.astype(np.uint8) * 255))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_may_be_zero(tmp_path, dtype):
    pixels = random_pixels(dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    assert_reads_as(tmp_path / "a.tif", as_tensor(np.iinfo(dtype).max - pixels))


def test_8_bits_survive_the_way_to_pillow_and_back(tmp_path):
    levels = torch.arange(256).float().div(255).view(1, 16, 16)
    image = torch.cat([levels, levels.flip(1), levels.flip(2)])
    to_pil(image).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), image)
    to_pil(image * 3 - 1).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), (image * 3 - 1).clamp(0, 1).mul(255).round().div(255))


# What is refused


def write_truncated(path, pixels):
    """The first two thirds of a file."""
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, photometric="rgb")
    else:
        cv2.imwrite(str(path), pixels)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((f"a.{suffix}", np.uint8) for suffix in ("png", "jpg", "tif", "webp")),
        ("a.png", np.uint16),
        ("a.tif", np.uint16),
    ],
)
def test_a_truncated_file_is_refused_by_name(tmp_path, name, dtype):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (64, 64, 3), dtype=dtype)
    write_truncated(tmp_path / name, pixels)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as an image.*replace or remove it"):
        read_image(tmp_path / name)


def test_damaged_bytes_give_an_image_or_a_value_error_and_nothing_else():
    refused = 0
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for suffix, image in (
        (".png", pixels),
        (".png", pixels.astype(np.uint16) * 257),
        (".tif", pixels),
        (".jpg", pixels),
    ):
        good = np.frombuffer(cv2.imencode(suffix, image)[1].tobytes(), np.uint8)
        for _ in range(60):
            bad = good.copy()
            places = random.integers(0, min(len(bad), 200), 3)
            bad[places] = random.integers(0, 256, 3)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    check_is_image(as_float(decode_stored(bad.tobytes(), "row 8")))
            except ValueError as error:
                refused += 1
                assert str(error).startswith("row 8 cannot be read")
    assert 20 < refused < 220


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"<html>not found</html>", "unknown format"), (b"", "unknown format")],
    ids=["html", "empty"],
)
def test_what_is_not_an_image_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"photo\.jpg cannot be read as an image \({reason}\)"):
        read_image(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png cannot be read \(No such file"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_an_agreed_white_are_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", random_pixels(np.uint16).astype(dtype))
    with pytest.raises(ValueError, match=r"a\.tif.*no agreed white.*8 or 16 bits"):
        read_image(tmp_path / "a.tif")


def test_16_bits_in_other_files_are_refused_and_not_cut(tmp_path):
    (tmp_path / "a.png").write_bytes(b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + random_pixels(np.uint16).tobytes())
    with pytest.raises(ValueError, match=r"a\.png.*unknown format"):  # a PGM
        read_image(tmp_path / "a.png")


def test_16_bit_layouts_that_would_come_out_wrong_are_refused(tmp_path):
    planes = random_pixels(np.uint16, 3).transpose(2, 0, 1).copy()
    tifffile.imwrite(tmp_path / "planes.tif", planes, photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "inks.tif", random_pixels(np.uint16, 4), photometric="separated")
    for name in ("planes.tif", "inks.tif"):
        with pytest.raises(ValueError, match=rf"{name}.*colours interleaved"):
            read_image(tmp_path / name)


def test_an_image_too_large_to_be_true_is_refused_by_name(tmp_path, monkeypatch):
    Image.new("RGB", (50, 50)).save(tmp_path / "bomb.png")
    monkeypatch.setattr("colora_peft.images.reading.DEFAULT_MAX_PIXELS", 2499)
    limit = r"bomb\.png cannot be read.*50 x 50 pixels are more than the limit of 2,499: cut it into smaller"
    with pytest.raises(ValueError, match=limit):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("limit", [1700, 850])
def test_pillow_s_limit_counts_no_more(tmp_path, monkeypatch, recwarn, limit):
    """It is lower than ours: Pillow warns from it on, and refuses twice as much. Phones have 200 million pixels."""
    Image.new("RGB", (50, 50)).save(tmp_path / "phone.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert read_image(tmp_path / "phone.png").shape == (3, 50, 50)
    assert not recwarn.list and Image.MAX_IMAGE_PIXELS == limit
    assert 16320 * 12240 <= DEFAULT_MAX_PIXELS


# Folders


def test_images_are_listed_by_name_and_nothing_else_is(tmp_path):
    for name in ("b.png", "a.JPG", "c.tiff", "notes.txt", "._a.jpg", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "b.png", "c.tiff"]
    assert list_images(str(tmp_path)) == list_images(tmp_path)


def test_a_missing_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*elsewhere"):
        list_images(tmp_path / "elsewhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no images.*\.png.*not searched\.$"):
        list_images(tmp_path)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOENT, ValueError), (errno.EIO, OSError), (errno.EMFILE, OSError)]
)
def test_a_disk_that_fails_makes_no_bad_image(tmp_path, monkeypatch, number, kind):
    """A bad image is replaced by another; what may be read again tomorrow must not be, or no run resumes exactly."""

    def fail(_path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(kind, match=f"a.png cannot be read .{os.strerror(number)}"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_below_that_cannot_be_read_is_not_left_out_silently(tmp_path, monkeypatch, number):
    (tmp_path / "closed").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "closed":
            raise OSError(number, os.strerror(number), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match="closed"):
            list_images(tmp_path, nested=True)
    else:
        with pytest.warns(UserWarning, match="The folder .*closed is left out"):
            assert list_images(tmp_path, nested=True) == [tmp_path / "a.png"]
