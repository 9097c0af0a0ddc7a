"""The image processor: any image to `pixel_values` and back, and the lines by which users of transformers load it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.backbones import BACKBONES, tiny_backbone
from support.examples import EXAMPLES
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageToImage
from transformers.modeling_outputs import ImageSuperResolutionOutput
from transformers.pipelines import SUPPORTED_TASKS, pipeline

import colora_peft
from colora_peft.images.reading import on_white, read_image
from colora_peft.models import RestorationImageProcessor

PROCESSOR = RestorationImageProcessor()
RGB_BACKBONES = [name for name in BACKBONES if "dual" not in name]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def from_pil(image):
    """(3, H, W) of an RGB or grey image, by the shortest way."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


def pixels_of(image):
    """(3, H, W) of one image."""
    (pixels,) = PROCESSOR(image, return_tensors="pt").pixel_values
    return pixels


# --- images to pixel_values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"])
def test_a_file_of_8_bits_gives_what_read_image_gives(mode, tmp_path):
    image = Image.fromarray(noise(20, 30, 4), "RGBA").convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    with Image.open(path) as opened:
        pixels = pixels_of(opened)
    assert pixels.dtype == torch.float32 and torch.equal(pixels, read_image(path))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "image.png", exif=exif)
    with Image.open(tmp_path / "image.png") as opened:
        assert torch.equal(pixels_of(opened), read_image(tmp_path / "image.png"))


def test_damaged_exif_refuses_no_image(tmp_path):
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "image.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with Image.open(tmp_path / "image.png") as opened:
        assert torch.equal(pixels_of(opened), read_image(tmp_path / "image.png"))


def test_grey_of_16_bits_keeps_them(tmp_path):
    values = noise(20, 30).astype(np.uint16) * 257 + 3
    image = Image.fromarray(values)
    assert image.mode.startswith("I;16")
    image.save(tmp_path / "image.png")
    assert torch.equal(pixels_of(image), read_image(tmp_path / "image.png"))


def test_arrays_and_tensors_give_what_the_image_gives():
    rgb = noise(20, 30, 3)
    expected = pixels_of(Image.fromarray(rgb))
    chw = torch.from_numpy(rgb).permute(2, 0, 1)
    for same in (rgb, chw, rgb.astype(np.float32) / 255, chw / 255, rgb.transpose(2, 0, 1), chw.permute(1, 2, 0)):
        assert torch.equal(pixels_of(same), expected)
    fine = pixels_of(rgb.astype(np.uint16) * 257)
    torch.testing.assert_close(fine, expected, rtol=0, atol=1e-7)
    grey = rgb[..., 0]
    for same in (grey, grey[..., None], torch.from_numpy(grey)):
        assert torch.equal(pixels_of(same), from_pil(Image.fromarray(grey)))
    half = torch.rand(3, 8, 9).half()
    assert torch.equal(pixels_of(half), half.float())


def test_transparency_of_an_array_is_laid_on_white():
    rgba = torch.rand(4, 20, 30)
    assert torch.equal(pixels_of(rgba), on_white(rgba[:3], rgba[3:]))


def test_a_list_and_a_batch_are_one_batch():
    batch = noise(2, 20, 30, 3)
    expected = torch.stack([pixels_of(image) for image in batch])
    for same in (batch, list(batch), tuple(Image.fromarray(image) for image in batch)):
        assert torch.equal(PROCESSOR(same).pixel_values, expected)
    as_array = PROCESSOR(batch, return_tensors="np").pixel_values
    assert isinstance(as_array, np.ndarray) and np.array_equal(as_array, expected.numpy())


def test_an_image_is_not_changed():
    image = torch.rand(3, 8, 9)
    before = image.clone()
    PROCESSOR(image).pixel_values.add_(1)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([noise(20, 30, 3), noise(24, 30, 3)], ValueError, "must have one size, got 30 x 20, 30 x 24"),
        ([], ValueError, "list of images is empty"),
        ("photo.jpg", TypeError, "An image is a str: give Pillow images.*PIL.Image.open"),
        (noise(20, 30, 3).astype(np.float32), ValueError, "values up to 255: divide it so that white is 1"),
        (noise(20, 30, 3).astype(np.int64), TypeError, "holds torch.int64 values: give uint8, uint16, or floats"),
        (noise(20, 30, 5), ValueError, r"has the shape \(20, 30, 5\): give arrays"),
        (noise(0, 30, 3), ValueError, "has the shape"),
        (Image.fromarray(noise(20, 30).astype(np.float32)), ValueError, "mode F has no agreed white"),
    ],
    ids=["sizes", "empty", "path", "range", "dtype", "channels", "no pixels", "mode F"],
)
def test_bad_images_are_refused_with_the_remedy(images, error, message):
    with pytest.raises(error, match=message):
        PROCESSOR(images)


# --- and back -------------------------------------------------------------------------------------------------------


def test_there_and_back_is_the_same_bit_for_bit():
    images = [Image.fromarray(pixels) for pixels in noise(3, 20, 30, 3)]
    batch = PROCESSOR(images).pixel_values
    for outputs in (batch, ImageSuperResolutionOutput(reconstruction=batch)):
        back = PROCESSOR.post_process_image_restoration(outputs)
        assert [image.tobytes() for image in back] == [image.tobytes() for image in images]
        assert {(image.mode, image.size) for image in back} == {("RGB", (30, 20))}
    arrays = PROCESSOR.post_process_image_restoration(batch, "np")
    assert torch.equal(PROCESSOR(arrays).pixel_values, batch)


def test_restored_images_are_clamped():
    wide = torch.randn(1, 3, 8, 9, requires_grad=True) * 2
    (array,) = PROCESSOR.post_process_image_restoration(wide, output_type="np")
    assert array.dtype == np.float32 and array.shape == (8, 9, 3) and array.min() == 0 and array.max() == 1
    with pytest.raises(ValueError, match='must be "pil" or "np", got \'pt\''):
        PROCESSOR.post_process_image_restoration(wide, output_type="pt")


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_a_network_saves_its_processor_and_auto_loads_it(name, tmp_path):
    model = tiny_backbone(name)
    model.save_pretrained(tmp_path)
    model.save_image_processor(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    assert file.is_file() == (name in RGB_BACKBONES)
    if name in RGB_BACKBONES:
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is RestorationImageProcessor
        assert json.loads(file.read_text()) == {"image_processor_type": "RestorationImageProcessor"}
        for shipped in EXAMPLES.glob("*/*/preprocessor_config.json"):
            assert shipped.read_text() == file.read_text()


@pytest.mark.parametrize("name", RGB_BACKBONES)
def test_the_model_type_alone_names_the_processor(name, tmp_path):
    """As for a folder of an earlier version, whose file another tool wrote without the class."""
    tiny_backbone(name).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is RestorationImageProcessor
    assert AutoConfig.from_pretrained(tmp_path).model_type == name


@torch.no_grad()
@pytest.mark.parametrize("name", RGB_BACKBONES)
def test_a_batch_runs_through_the_network(name):
    model = tiny_backbone(name)
    images = [Image.fromarray(pixels) for pixels in noise(2, 21, 30, 3)]
    restored = PROCESSOR.post_process_image_restoration(model(**PROCESSOR(images, return_tensors="pt")))
    for image, result in zip(images, restored, strict=True):
        assert torch.equal(
            from_pil(result), (model(from_pil(image)[None]).reconstruction[0]).clamp(0, 1).mul(255).round() / 255
        )


# --- lines that a user of transformers would guess -------------------------------------------------------------------

FOLDERS = ["checkpoints/nafnet-small-prod", "checkpoints/restormer-small-prod-4k", "adapters/rain", "adapters/noise"]


@torch.no_grad()
@pytest.mark.parametrize("folder", [*FOLDERS, "adapters/underwater"])
def test_shipped_networks_and_adapters_load_as_any_other(folder, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)  # adapters name their base relative to it
    name, image = f"examples/{folder}", Image.fromarray(noise(24, 32, 3))

    processor = AutoImageProcessor.from_pretrained(name)
    model = AutoModelForImageToImage.from_pretrained(name)
    restored = processor.post_process_image_restoration(model(**processor(image, return_tensors="pt")))[0]

    expected = colora_peft.load(name)(from_pil(image)[None]).reconstruction
    assert np.array_equal(restored, PROCESSOR.post_process_image_restoration(expected)[0])


@pytest.mark.skipif("image-to-image" not in SUPPORTED_TASKS, reason="transformers 5 has no such pipeline")
def test_the_pipeline_restores(monkeypatch):
    image = Image.fromarray(noise(24, 32, 3))
    restorer = pipeline("image-to-image", model=str(EXAMPLES / FOLDERS[0]))
    model = colora_peft.load(EXAMPLES / FOLDERS[0])
    with torch.no_grad():
        (expected,) = PROCESSOR.post_process_image_restoration(model(from_pil(image)[None]))
    assert np.array_equal(restorer(image), expected)
