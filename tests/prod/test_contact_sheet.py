"""The contact sheet shows what it says, and `python -m colora_peft.prod` writes it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from colora_peft.images.reading import to_pil
from colora_peft.prod import RandomOrderDegradation, default_degradations
from colora_peft.prod.contact_sheet import STRENGTHS, draw_contact_sheet, recipe_caption, setting

NAMES = ("blur", "stretched blur", "noise", "rain", "jpeg", "motion")


def photo(size=64):
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2


@pytest.mark.parametrize("name", NAMES)
def test_stronger_settings_change_the_image_more(name):
    (degradation,) = (each for each in default_degradations() if each.name == name.split()[-1])
    changes = [
        (degradation.apply(photo(), **setting(name, strength, seed=1)) - photo()).square().mean().item()
        for strength in STRENGTHS.values()
    ]
    assert 0 < changes[0] < changes[1] < changes[2]


def test_settings_are_what_the_degradations_draw():
    for degradation in default_degradations():
        drawn = degradation.draw(torch.Generator())
        assert setting(degradation.name, 0.5, seed=1).keys() == drawn.keys()
    with pytest.raises(ValueError, match="no degradation 'fog'; choose one of blur, .*motion"):
        setting("fog", 0.5, seed=1)


def test_the_sheet_shows_clean_images_first_and_the_recipes_last():
    recipe = RandomOrderDegradation().draw(torch.Generator().manual_seed(3))
    sheet = np.asarray(draw_contact_sheet(photo(), [recipe, []]))
    clean = np.asarray(to_pil(photo()))
    step_y = 64 + 40
    for row in range(len(NAMES)):
        np.testing.assert_array_equal(sheet[8 + row * step_y :, 8:][:64, :64], clean)
    last = sheet[8 + len(NAMES) * step_y :]
    np.testing.assert_array_equal(last[:64, 8:72], np.asarray(to_pil(RandomOrderDegradation().apply(photo(), recipe))))
    np.testing.assert_array_equal(last[:64, 80:144], clean)


def test_captions_name_the_steps_in_order():
    steps = [{"degradation": name} for name in "abcde"]
    assert recipe_caption(steps) == "a > b > c >\nd > e"
    assert recipe_caption(steps[:2]) == "a > b"
    assert recipe_caption([]) == "nothing"


def run(*flags):
    return subprocess.run([sys.executable, "-m", "colora_peft.prod", *map(str, flags)], capture_output=True, text=True)


def test_the_command_writes_a_sheet_and_refuses_what_it_cannot_draw(tmp_path):
    to_pil(photo(40)).save(tmp_path / "photo.png")
    flags = ("--photo", tmp_path / "photo.png", "--recipes", 1)
    done = run(*flags, "--output_file", tmp_path / "new" / "sheet.jpg", "--resolution", 32)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "new" / "sheet.jpg").width == 4 * 40 + 8
    done = run(*flags, "--output_file", tmp_path / "sheet.jpg", "--resolution", 41)
    assert done.returncode == 1
    assert "photo.png is 40x40 pixels; choose a --resolution between 1 and 40." in done.stderr
    done = run(*flags, "--output_file", tmp_path / "sheet.xyz", "--resolution", 32)
    assert done.returncode == 1 and "must end in .jpg or .png" in done.stderr
