"""The contact sheet shows what it says, and `python -m colora_peft.prod` writes it."""

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from colora_peft.images import to_pil
from colora_peft.prod import RandomOrderDegradation, default_degradations
from colora_peft.prod.contact_sheet import STRENGTHS, draw_contact_sheet, recipe_caption


@dataclass(frozen=True)
class Darken:
    """A degradation of somebody else, which the package has never heard of."""

    name: ClassVar[str] = "darken"

    def draw(self, generator):
        return {"factor": 0.5}

    def setting(self, strength, seed):
        return {"factor": 1 - strength}

    def apply(self, image, factor):
        return image * factor


def photo(size=160):
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2


@pytest.mark.parametrize("degradation", default_degradations(), ids=lambda degradation: degradation.name)
def test_stronger_settings_change_the_image_more_and_are_ones_that_are_drawn(degradation):
    settings = [degradation.setting(strength, seed=1) for strength in STRENGTHS.values()]
    changes = [(degradation.apply(photo(64), **each) - photo(64)).square().mean().item() for each in settings]
    assert 0 < changes[0] < changes[1] < changes[2]
    assert settings[0].keys() == degradation.draw(torch.Generator()).keys()


def cell(sheet, row, column, size=160, line_px=20):
    """The image in that cell, where every caption of the sheet takes one line."""
    top, left = 8 + line_px + row * (size + line_px + 8), 8 + column * (size + 8)
    return sheet[top : top + size, left : left + size]


def test_the_sheet_shows_each_degradation_of_the_pool_and_then_the_recipes():
    pool, recipe = RandomOrderDegradation((Darken(),)), [{"degradation": "darken", "factor": 0.25}]
    sheet = np.asarray(draw_contact_sheet(photo(), [recipe, []], pool))
    shown = [1.0, *(1 - strength for strength in STRENGTHS.values())]
    for column, factor in enumerate(shown):
        np.testing.assert_array_equal(cell(sheet, 0, column), np.asarray(to_pil(photo() * factor)))
    np.testing.assert_array_equal(cell(sheet, 1, 0), np.asarray(to_pil(photo() * 0.25)))
    np.testing.assert_array_equal(cell(sheet, 1, 1), np.asarray(to_pil(photo())))
    assert sheet.shape == (2 * (160 + 20 + 8) + 8, 4 * (160 + 8) + 8, 3)


def test_captions_name_the_steps_in_order():
    assert recipe_caption([{"degradation": name} for name in "abcde"]) == "a > b > c > d > e"
    assert recipe_caption([]) == "nothing"


def run(*flags):
    return subprocess.run([sys.executable, "-m", "colora_peft.prod", *map(str, flags)], capture_output=True, text=True)


def test_the_command_writes_a_sheet_and_refuses_what_it_cannot_draw(tmp_path):
    to_pil(photo(40)).save(tmp_path / "photo.png")
    flags = ("--photo", tmp_path / "photo.png", "--recipes", 1)
    done = run(*flags, "--output_file", tmp_path / "new" / "sheet.jpg", "--resolution", 32)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "new" / "sheet.jpg").width == 4 * (140 + 8) + 8
    done = run(*flags, "--output_file", tmp_path / "sheet.jpg", "--resolution", 41)
    assert done.returncode == 1
    assert done.stderr.startswith("colora_peft.prod: ") and "Traceback" not in done.stderr
    assert "photo.png is 40x40 pixels; choose a --resolution between 1 and 40." in done.stderr
    done = run(*flags, "--output_file", tmp_path / "sheet.xyz", "--resolution", 32)
    assert done.returncode == 1 and "must end in .jpg or .png" in done.stderr
