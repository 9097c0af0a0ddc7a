"""Files that are no input are counted with what can be done, and kinds are read where Pillow can read them."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from colora_peft.images import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    check_kind,
    left_out_in_words,
    list_images,
    read_image,
    read_image_file,
)

PLUGIN = """
from PIL import Image, PngImagePlugin

class HeifImageFile(PngImagePlugin.PngImageFile):
    format = "HEIF"

def register_heif_opener():
    Image.register_open("HEIF", HeifImageFile)
"""
"""Stands for pillow-heif: an opener under its name, which reads what a PNG holds."""


def test_files_that_are_left_out_are_counted_by_kind(tmp_path):
    for name in ("a.png", "b.xyz", "c.XYZ", "d.dng", "README", ".hidden.txt", "below/e.abc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    counts = Counter()
    assert list_images(tmp_path, left_out=counts) == [tmp_path / "a.png"]
    said = "4 files left out: 2 .xyz, 1 without suffix, 1 .dng. Develop raw files to TIFF or PNG first."
    assert left_out_in_words(counts) == said
    list_images(tmp_path, nested=True, left_out=counts)
    assert counts[".abc"] == 1 and counts[".xyz"] == 4
    assert left_out_in_words(Counter()) == "" and left_out_in_words({".txt": 1}) == "1 file left out: 1 .txt."
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="holds no images that are read, but 2 .xyz, .*1 .dng: develop"):
        list_images(tmp_path)


def test_a_folder_of_animations_is_told_from_an_empty_one(tmp_path):
    (tmp_path / "a.gif").touch()
    with pytest.raises(ValueError, match="holds no images that are read, but 1 .gif: convert GIF files to PNG first"):
        list_images(tmp_path)
    check_kind(tmp_path / "a.gif")  # named by itself it is read


def test_a_raw_file_is_refused_whose_preview_pillow_would_read(tmp_path):
    with pytest.raises(ValueError, match="photo.DNG cannot be read: develop raw files to TIFF or PNG first."):
        check_kind(tmp_path / "photo.DNG")
    check_kind(tmp_path / "photo.png")


def test_avif_is_read_where_pillow_reads_it(tmp_path):
    if not features.check("avif"):
        assert "AVIF" not in IMAGE_FORMATS and ".avif" not in IMAGE_SUFFIXES
        pytest.skip("Pillow has no AVIF here")
    pixels = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (48, 1, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.avif", quality=100, exif=exif)
    assert list_images(tmp_path) == [tmp_path / "a.avif"]
    expected = torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1) / 255
    for image in (read_image(tmp_path / "a.avif"), read_image_file(tmp_path / "a.avif").colour):
        torch.testing.assert_close(image, expected, atol=0.03, rtol=0)


def in_a_process(program, *folders):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("installed", [True, False])
def test_heic_is_read_where_the_plugin_is_installed_and_named_where_not(tmp_path, installed):
    (tmp_path / "plugin").mkdir()
    content = PLUGIN if installed else "raise ImportError"
    Path(tmp_path / "plugin/pillow_heif.py").write_text(content)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 7), "teal").save(tmp_path / "photos/a.heic", "PNG")
    Path(tmp_path / "photos/b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    program = f"""
from colora_peft.images import IMAGE_FORMATS, list_images, read_image
folder = {str(tmp_path / "photos")!r}
print("HEIF" in IMAGE_FORMATS, "EPS" in IMAGE_FORMATS)
for act in (lambda: [path.name for path in list_images(folder)], lambda: read_image(folder + "/b.heic")):
    try:
        print(act())
    except ValueError as error:
        print(error)
"""
    first, listed, read = in_a_process(program, tmp_path / "plugin").splitlines()
    if installed:
        assert first == "True False" and listed == "['a.heic', 'b.heic']"
        assert "b.heic cannot be read as an image (unknown format); replace or remove it." in read
    else:
        assert first == "False False"
        assert listed.endswith(
            "no images that are read, but 2 .heic: HEIC files are read after `pip install pillow-heif`."
        )
        assert read.endswith("b.heic cannot be read: HEIC files are read after `pip install pillow-heif`.")


def test_heic_is_read_by_the_plugin_itself(tmp_path):
    plugin = pytest.importorskip("pillow_heif", reason="the plugin is not installed")
    assert plugin is not None and ".heic" in IMAGE_SUFFIXES
    pixels = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (48, 1, 3))
    Image.fromarray(pixels).save(tmp_path / "a.heic", quality=100)
    image = read_image_file(tmp_path / "a.heic").colour
    torch.testing.assert_close(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255, atol=0.05, rtol=0)
