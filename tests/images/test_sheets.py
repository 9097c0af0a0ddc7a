"""Images stand side by side in their order, with their captions, in a file of bounded size."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.icc import srgb

from colora_peft.images.sheets import save_comparison


def plain(height, width, *colour):
    return torch.tensor(colour).float().view(3, 1, 1).expand(3, height, width)


def test_images_stand_in_their_order_under_their_captions(tmp_path):
    path = tmp_path / "below" / "a.jpg"
    save_comparison([plain(200, 300, 1, 0, 0), plain(200, 300, 0, 0, 1)], ["input", "restored"], path, srgb())
    with Image.open(path) as opened:
        pixels = np.array(opened).astype(int)
        assert opened.info["icc_profile"] == srgb()
    middle = pixels[pixels.shape[0] // 2]
    is_red, is_blue = middle[:, 0] - middle[:, 2] > 200, middle[:, 2] - middle[:, 0] > 200
    assert is_red.sum() == pytest.approx(300, abs=2) and is_blue.sum() == pytest.approx(300, abs=2)
    assert np.flatnonzero(is_red).max() < np.flatnonzero(is_blue).min()
    darkest = pixels[:28].min(axis=(0, 2))  # where the captions are
    assert darkest[: len(darkest) // 2].min() < 60 and darkest[len(darkest) // 2 :].min() < 60


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (1700, 900)])
def test_any_shape_gives_a_sheet_of_bounded_size(tmp_path, size):
    save_comparison(
        [torch.rand(3, *size)] * 2, ["input", "a caption that is far too long for it " * 9], tmp_path / "a.jpg"
    )
    width, height = Image.open(tmp_path / "a.jpg").size
    assert width <= 2 * 1600 + 3 * 8 and height <= 1600 + 3 * 20 + 2 * 8


def test_the_sheet_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError):
        save_comparison([plain(9, 9, 0, 0, 0)], ["one", "too many"], tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []
