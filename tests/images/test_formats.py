"""Other readers read what is encoded here: the pixels exactly, and all metadata."""

import io

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from support.exif import block, read
from support.formats import pixels
from support.icc import srgb

from colora_peft.images.exif import upright
from colora_peft.images.formats import FORMATS, Content, format_of, png_chunks


def by_opencv(data):
    """(H, W, C), red first."""
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return found[..., None] if found.ndim == 2 else found[..., [2, 1, 0, 3][: found.shape[2]]]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(13, 17), (1, 900), (900, 1), (1, 1), (700, 301)])
def test_png_and_tiff_are_exact(dtype, channels, size):
    expected = pixels(dtype, channels, *size)
    png = by_opencv(FORMATS["png"].encode(Content(expected)))
    assert png.dtype == dtype
    np.testing.assert_array_equal(png[..., [0, -1]] if channels == 2 else png, expected)
    tiff = tifffile.imread(io.BytesIO(FORMATS["tiff"].encode(Content(expected))))
    np.testing.assert_array_equal(tiff.reshape(expected.shape), expected)


@pytest.mark.parametrize("key", ["png", "tiff", "bmp", "webp"])
def test_exact_formats_of_8_bits_by_pillow(key):
    for channels in (3, 4) if key in ("png", "tiff", "webp") else (1, 3):
        expected = pixels(np.uint8, channels)
        with Image.open(io.BytesIO(FORMATS[key].encode(Content(expected, exact=True)))) as opened:
            np.testing.assert_array_equal(np.array(opened).reshape(expected.shape), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("key", ["png", "tiff", "jpeg", "webp"])
def test_other_readers_find_all_metadata(key, dtype, order):
    if dtype == np.uint16 and FORMATS[key].bits == 8:
        return
    exif = upright(block(order), 17, 13)
    content = Content(pixels(dtype, 3), exif, srgb(), dpi=(300.0, 150.0))
    with Image.open(io.BytesIO(FORMATS[key].encode(content))) as opened:
        opened.load()
        assert opened.info["icc_profile"] == srgb()
        if key != "webp":
            assert opened.info["dpi"] == pytest.approx((300, 150), abs=0.02)
        found = opened.getexif()
        own, below, position = read(exif)
        assert dict(found.get_ifd(0x8769)) == below and dict(found.get_ifd(0x8825)) == position
        assert found[271] == "Canon" and found[315] == "Ann" and found.get(0x0112, 1) == 1


def test_jpeg_keeps_the_colour_s_resolution_and_follows_quality():
    smooth = np.array(Image.fromarray(pixels(np.uint8, 3, 8, 8)).resize((64, 64)))
    sizes = []
    for quality in (60, 95):
        data = FORMATS["jpeg"].encode(Content(smooth, quality=quality))
        sizes.append(len(data))
        with Image.open(io.BytesIO(data)) as opened:
            assert [component[1:3] for component in opened.layer] == [(1, 1)] * 3
    assert sizes[0] < sizes[1]


def test_colour_chunks_of_a_png_come_back():
    chunks = {b"gAMA": b"\0\0\xb1\x8f", b"sRGB": b"\0"}
    data = FORMATS["png"].encode(Content(pixels(np.uint8, 3), colour_chunks=chunks))
    assert dict(png_chunks(data)).items() >= chunks.items()
    assert b"IDAT" not in dict(png_chunks(data))


def test_suffixes_choose_the_format(tmp_path):
    names = {"a.PNG": "png", "a.tif": "tiff", "a.TIFF": "tiff", "a.jpeg": "jpeg", "a.JPG": "jpeg", "a.webp": "webp"}
    assert {name: format_of(tmp_path / name) for name in names} == names
    with pytest.raises(
        ValueError, match=r"^a\.gif would be of a kind that is not written; choose another format \(\.png"
    ):
        format_of(tmp_path / "a.gif")
