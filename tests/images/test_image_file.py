"""An image read and written without a change is what it was: pixels to the bit, and all that describes it."""

import io
import threading
import warnings

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from support.exif import block, read
from support.formats import pixels
from support.icc import profile, srgb
from support.reading import png_bytes

from colora_peft.images import image_file
from colora_peft.images.image_file import read_image_file, write_image_file
from colora_peft.images.reading import read_image

HEIGHT, WIDTH = 13, 17
TURNED = 6  # the orientation of test_exif's blocks: height and width change places


def write_source(path, dtype=np.uint8, channels=3, **metadata):
    """A file of another writer's: Pillow's, or tifffile's and a PNG by hand for 16 bits."""
    values = pixels(dtype, channels, HEIGHT, WIDTH)
    if dtype == np.uint8:
        mode = Image.fromarray(values[..., 0] if channels == 1 else values)
        mode.save(path, **metadata)
    elif path.suffix == ".png":
        path.write_bytes(png_bytes(values, {1: 0, 2: 4, 3: 2, 4: 6}[channels]))
    else:
        extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
        photometric = "rgb" if channels > 2 else "minisblack"
        tifffile.imwrite(path, values.squeeze(), photometric=photometric, metadata=None, **extra)
    return path


def rewritten(path, suffix=None, change=None, **settings):
    """The file that comes out where the network is `change`, by default the identity, and the notes."""
    image = read_image_file(path)
    result = path.with_name(f"result{suffix or path.suffix}")
    restored = image.colour if change is None else change(image.colour)
    return result, write_image_file(result, restored, image, **settings)


# Pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_identity_gives_the_same_file_to_the_bit(tmp_path, dtype, channels, suffix):
    if channels == 2 and (suffix == ".tif" and dtype == np.uint16):
        return  # a kind of file that Pillow does not read
    path = write_source(tmp_path / f"a{suffix}", dtype, channels)
    result, notes = rewritten(path)
    before, after = read_image_file(path), read_image_file(result)
    assert torch.equal(after.colour, before.colour) and notes == ()
    assert (after.opacity is None) == (before.opacity is None) == (channels in (1, 3))
    assert after.opacity is None or torch.equal(after.opacity, before.opacity)
    assert after.bits == before.bits == dtype().itemsize * 8
    assert after.is_grey == before.is_grey == (channels < 3)
    levels = before.colour.double().mul(2**after.bits - 1).round().permute(1, 2, 0).numpy()
    expected = pixels(dtype, channels, HEIGHT, WIDTH)
    np.testing.assert_array_equal(levels[..., : channels - (channels % 2 == 0)][..., 0], expected[..., 0])


def test_an_exact_webp_stays_exact_and_another_does_not_become_one(tmp_path):
    for exact in (True, False):
        path = write_source(tmp_path / "a.webp", channels=4, lossless=exact, exact=True)
        result, notes = rewritten(path, quality=30)
        assert torch.equal(read_image_file(result).colour, read_image_file(path).colour) == exact
        assert read_image_file(result).is_lossless_webp == exact and notes == ()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_come_out_upright(tmp_path, orientation):
    path = write_source(tmp_path / "a.png", exif=block(orientation=orientation))
    result, _ = rewritten(path)
    assert torch.equal(read_image(result), read_image(path))
    assert read(read_image_file(result).exif)[0][0x0112] == 1


def test_the_opacity_is_put_back_and_colours_below_it_are_restored(tmp_path):
    path = write_source(tmp_path / "a.png", channels=4)
    result, _ = rewritten(path, change=lambda colour: 1 - colour)
    expected = pixels(np.uint8, 4, HEIGHT, WIDTH)
    expected[..., :3] = 255 - expected[..., :3]
    np.testing.assert_array_equal(np.array(Image.open(result)), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_multiplied_in_opacity_is_divided_out(tmp_path, dtype):
    straight = pixels(dtype, 4, HEIGHT, WIDTH)
    straight[..., 3] |= 1 << (dtype().itemsize * 8 - 1)  # at least half opaque, or rounding decides
    limit = np.iinfo(dtype).max
    multiplied = straight.copy()
    multiplied[..., :3] = np.round(straight[..., :3].astype(float) * straight[..., 3:] / limit)
    tifffile.imwrite(tmp_path / "a.tif", multiplied, photometric="rgb", extrasamples=["assocalpha"])
    colour = read_image_file(tmp_path / "a.tif").colour.permute(1, 2, 0).numpy() * limit
    np.testing.assert_allclose(colour, straight[..., :3], atol=2.1)


def test_grey_is_the_mean_of_the_channels_or_on_demand_rgb(tmp_path):
    path = write_source(tmp_path / "a.png", channels=1)

    def tint(colour):
        return torch.stack([colour[0] * 0.5, colour[1] * 0.5, colour[2] * 0.8])

    grey, _ = rewritten(path, ".tif", change=tint)
    expected = np.round(pixels(np.uint8, 1, HEIGHT, WIDTH)[..., 0] * 0.6)
    np.testing.assert_allclose(np.array(Image.open(grey)).astype(float), expected, atol=1)
    colour, _ = rewritten(path, change=tint, grey_as_rgb=True)
    assert Image.open(grey).mode == "L" and Image.open(colour).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_images_of_any_shape(tmp_path, size):
    Image.fromarray(pixels(np.uint8, 3, *size)).save(tmp_path / "a.png")
    for suffix in (".png", ".tif", ".jpg"):
        result, _ = rewritten(tmp_path / "a.png", suffix)
        assert read_image_file(result).colour.shape[1:] == size


# What describes the pixels


@pytest.mark.parametrize("source", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_exif_profile_and_resolution_survive_from_every_format_to_every_other(tmp_path, source, suffix):
    metadata = {"exif": b"Exif\0\0" + block(), "icc_profile": srgb()} | (
        {"dpi": (300, 300)} if source != ".webp" else {}
    )
    path = write_source(tmp_path / f"a{source}", **metadata)
    result, notes = rewritten(path, suffix)
    assert notes == ()
    with Image.open(result) as opened:
        opened.load()
        assert opened.info["icc_profile"] == srgb() and opened.size == (HEIGHT, WIDTH)
        if ".webp" not in (source, suffix):
            assert opened.info["dpi"] == pytest.approx((300, 300), abs=0.02)
    own, below, position = read(read_image_file(result).exif)
    before = read(block())
    assert (own[271], own[315], own.get(0x0112, 1)) == ("Canon", "Ann", 1) and position == before[2]
    assert below == before[1] | {40962: HEIGHT, 40963: WIDTH}


def test_a_tiff_without_a_resolution_gets_none(tmp_path):
    assert read_image_file(write_source(tmp_path / "a.tif")).dpi is None


def test_old_exif_of_imagemagick_is_read(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    text, info = (b"Exif\0\0" + block()).hex(), PngInfo()
    lines = "\n".join(text[start : start + 72] for start in range(0, len(text), 72))
    info.add_text("Raw profile type exif", f"\nexif\n{len(text) // 2:8d}\n{lines}\n")
    path = write_source(tmp_path / "a.png", pnginfo=info)
    assert read_image_file(path).colour.shape[1:] == (WIDTH, HEIGHT)
    assert read(read_image_file(path).exif)[0][271] == "Canon"


# What does not survive is said


@pytest.mark.parametrize(
    ("source", "suffix", "said"),
    [
        ({"dtype": np.uint16}, ".jpg", "16 bits became 8: JPEG"),
        ({"dtype": np.uint16}, ".webp", "16 bits became 8: WebP"),
        ({"channels": 4}, ".jpg", "transparency was laid on white: JPEG"),
        ({"channels": 1}, ".webp", "grey was written as RGB: WebP"),
        ({"dtype": np.uint16, "channels": 2}, ".tif", "grey was written as RGB: TIFF"),
        ({"icc_profile": srgb()[:-1]}, ".png", "profile is damaged"),
        ({"icc_profile": profile(b"GRAY")}, ".png", "profile describes GRAY, not the RGB"),
        ({"exif": b"garbage"}, ".png", "EXIF is damaged"),
        ({"exif": block()}, ".bmp", "EXIF was left out: BMP"),
    ],
)
def test_losses_are_said(tmp_path, source, suffix, said):
    _, notes = rewritten(write_source(tmp_path / "a.png", **source), suffix)
    assert len(notes) == 1 and said in notes[0]


def test_too_much_exif_for_a_jpeg_is_left_out(tmp_path):
    exif = Image.Exif()
    exif[315] = "a" * 70_000
    result, notes = rewritten(write_source(tmp_path / "a.png", exif=exif), ".jpg")
    assert notes == ("the EXIF was left out: JPEG holds none of its size",) and "exif" not in Image.open(result).info


def test_cmyk_becomes_rgb_without_its_profile(tmp_path):
    inks = Image.fromarray(pixels(np.uint8, 4, HEIGHT, WIDTH), "CMYK")
    inks.save(tmp_path / "a.jpg", icc_profile=profile(b"CMYK"))
    result, notes = rewritten(tmp_path / "a.jpg")
    assert notes[0] == "CMYK became RGB, without colour management" and "describes CMYK" in notes[1]
    assert Image.open(result).mode == "RGB" and "icc_profile" not in Image.open(result).info


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_of_several_images_the_first_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    lossless = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **lossless)
    result, notes = rewritten(tmp_path / f"a{suffix}")
    assert notes == ("only the first image of several in the file was restored",)
    assert Image.open(result).convert("RGB").getpixel((3, 3)) == (255, 0, 0)
    assert getattr(Image.open(result), "n_frames", 1) == 1


# Refusals


def test_the_limit_on_pixels_can_be_raised_and_pillow_s_is_left_alone(tmp_path, monkeypatch):
    path = write_source(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image_file(path, max_pixels=HEIGHT * WIDTH).bits == 8
    with pytest.raises(ValueError, match=r"a\.png cannot be read.*17 x 13 pixels are more than the limit of 220"):
        read_image_file(path, max_pixels=HEIGHT * WIDTH - 1)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_half_a_file_is_named(tmp_path, suffix):
    path = write_source(tmp_path / f"a{suffix}")
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])
    with pytest.raises(ValueError, match=rf"a\{suffix} cannot be read as an image"):
        read_image_file(path)


def test_a_refused_image_leaves_the_old_file_and_nothing_else(tmp_path):
    image = read_image_file(write_source(tmp_path / "a.png"))
    long = tmp_path / "long.png"
    Image.new("RGB", (20_000, 1)).save(long)
    result = tmp_path / "results" / "a.webp"
    result.parent.mkdir()
    result.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"a\.webp cannot be written as WebP.*choose another format"):
        write_image_file(result, read_image_file(long).colour, read_image_file(long))
    with pytest.raises(ValueError, match=r"shape \(3, 2, 2\), its source \(3, 13, 17\)"):
        write_image_file(result, torch.zeros(3, 2, 2), image)
    assert result.read_bytes() == b"old" and [path.name for path in result.parent.iterdir()] == ["a.webp"]


def test_damaged_metadata_warns_in_a_note_and_not_on_the_screen(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image_file(tmp_path / "a.jpg").notes == ("the EXIF is damaged and was left out",)


def test_two_threads_leave_the_settings_of_the_process_as_they_were(tmp_path, monkeypatch):
    """The second begins while the first reads, and ends after it."""
    path, decode = write_source(tmp_path / "a.png"), image_file.decode_straight
    turns = {"first": (threading.Event(), threading.Event()), "second": (threading.Event(), threading.Event())}

    def decode_later(opened, data):
        begun, may_end = turns[threading.current_thread().name]
        begun.set()
        may_end.wait(10)
        return decode(opened, data)

    monkeypatch.setattr(image_file, "decode_straight", decode_later)
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    threads = [threading.Thread(target=read_image_file, args=(path,), name=name) for name in turns]
    for thread in threads:
        thread.start()
        turns[thread.name][0].wait(10)
    for thread in threads:
        turns[thread.name][1].set()
        thread.join()
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before
