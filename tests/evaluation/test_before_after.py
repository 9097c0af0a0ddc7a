"""Images before and after restoration: what the sheet shows, and its size."""

import pytest
import torch
from PIL import Image

from colora_peft.evaluation import save_before_after


def test_before_after_stays_small_even_for_noise(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(torch.rand(3, 300, 400, generator=generator) for _ in range(3)) for _ in range(4)]
    rows[1] = tuple(image[:, :200, :] for image in rows[1])
    save_before_after(rows, tmp_path / "before_after.png")
    assert (tmp_path / "before_after.png").stat().st_size < 1_500_000


def test_before_after_shows_the_images(tmp_path):
    flat = [torch.full((3, 60, 80), level) for level in (0.2, 0.6, 1.0)]
    save_before_after([tuple(flat)], tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        colors = [image.convert("RGB").getpixel((round(image.width * (i + 0.5) / 3), 50)) for i in range(3)]
    assert colors == [(51,) * 3, (153,) * 3, (255,) * 3]


def test_before_after_takes_grey_images(tmp_path):
    image = torch.rand(1, 30, 40, generator=torch.Generator().manual_seed(0))
    save_before_after([(image, image, image)], tmp_path / "grey.png")
    save_before_after([(image.repeat(3, 1, 1),) * 3], tmp_path / "rgb.png")
    with Image.open(tmp_path / "grey.png") as grey, Image.open(tmp_path / "rgb.png") as rgb:
        assert grey.convert("RGB").tobytes() == rgb.convert("RGB").tobytes()


def test_before_after_names_the_bad_row(tmp_path):
    good, short = torch.rand(3, 20, 20), torch.rand(3, 20, 19)
    with pytest.raises(ValueError, match="^Row 1"):
        save_before_after([(good, good, good), (short, good, good)], tmp_path / "x.png")
    with pytest.raises(ValueError, match="empty"):
        save_before_after([], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
