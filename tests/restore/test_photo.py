"""A photo in, a restored file of its kind out; whatever is refused leaves all as it was."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from support.adapters import adapter_set
from support.adapters import adapters as adapters  # a fixture
from support.examples import EXAMPLES

from colora_peft import restore_image
from colora_peft.hub import load_backbone
from colora_peft.images import read_image, to_pil
from colora_peft.restore import adapters_in
from colora_peft.restore import photo as module


@pytest.fixture
def restorer(tiny_nafnet, adapters):
    return module.PhotoRestorer(adapter_set(tiny_nafnet, adapters), max_pixels=10_000)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "holiday.png"
    to_pil(torch.rand(3, 24, 40, generator=torch.Generator().manual_seed(0))).save(path)
    return path


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_the_file_holds_what_the_network_makes_of_the_photo(restorer, photo, tiny_nafnet, adapters):
    done = restorer.restore_file(photo, "haze", 0.5)
    expected = restore_image(adapter_set(tiny_nafnet, adapters).activate("haze", 0.5), read_image(photo), tile=None)
    assert np.array_equal(pixels(done.result), np.asarray(to_pil(expected)))
    assert not np.array_equal(pixels(done.result), pixels(photo))
    assert done.result.name == "holiday-haze.png" and (done.width, done.height) == (40, 24) and not done.notes
    assert pixels(done.before).shape == pixels(done.after).shape == (24, 40, 3)


def test_large_photos_go_in_tiles_and_are_shown_smaller(restorer, photo, monkeypatch):
    whole = pixels(restorer.restore_file(photo, "haze", 1.0).result)
    monkeypatch.setattr(module, "_WHOLE_PIXELS", 100)
    monkeypatch.setattr(module, "_PREVIEW_PIXELS", 20)
    seen = []
    monkeypatch.setattr(module, "restore_image", lambda *args, tile, **rest: seen.append(tile) or args[1])
    done = restorer.restore_file(photo, "rain", 1.0)
    assert seen == [512] and pixels(done.after).shape == (12, 20, 3) and pixels(done.result).shape == whole.shape


def test_a_jpeg_stays_one_and_kinds_that_are_not_written_become_png(restorer, photo, tmp_path):
    Image.open(photo).save(tmp_path / "a.JPG", "JPEG")
    assert restorer.restore_file(tmp_path / "a.JPG", "haze", 1.0).result.suffix == ".JPG"
    Image.open(photo).save(tmp_path / "a.gif")
    assert restorer.restore_file(tmp_path / "a.gif", "haze", 1.0).result.suffix == ".png"


def test_the_same_is_not_done_twice_and_old_results_go(restorer, photo, monkeypatch):
    monkeypatch.setattr(module, "_RESULTS_KEPT", 2)
    first = restorer.restore_file(photo, "haze", 1.0)
    assert restorer.restore_file(photo, "haze", 1.0) is first
    for strength in (0.1, 0.2):
        assert restorer.restore_file(photo, "haze", strength).result.is_file()
    assert not first.result.exists() and restorer.restore_file(photo, "haze", 1.0) is not first


@pytest.mark.parametrize(("name", "content"), [("note.txt", b"no image"), ("fake.png", b"no image"), ("x.png", b"")])
def test_what_is_no_image_is_refused_by_name_without_its_folder(restorer, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{name} cannot be read as an image") as caught:
        restorer.restore_file(tmp_path / name, "haze", 1.0)
    assert str(tmp_path) not in str(caught.value)


def test_formats_that_are_not_allowed_are_not_opened(restorer, tmp_path, monkeypatch):
    """Each further decoder of Pillow would be one more that strangers can attack."""
    Image.new("RGB", (20, 20)).save(tmp_path / "icon.png", "ICO")
    monkeypatch.setattr(module, "read_image_file", lambda *_: pytest.fail("its header was read"))
    with pytest.raises(ValueError, match="^icon.png cannot be read as an image: take a JPEG, PNG, WebP or TIFF"):
        restorer.restore_file(tmp_path / "icon.png", "haze", 1.0)


def test_half_an_image_is_refused_without_its_folder(restorer, photo):
    photo.write_bytes(photo.read_bytes()[:1500])
    with pytest.raises(ValueError, match="^holiday.png cannot be read") as caught:
        restorer.restore_file(photo, "haze", 1.0)
    assert str(photo.parent) not in str(caught.value)


def test_too_many_pixels_are_refused_before_they_are_decoded(restorer, tmp_path, monkeypatch):
    Image.new("RGB", (200, 60)).save(tmp_path / "large.png")
    monkeypatch.setattr(module, "read_image_file", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"large.png has 0.0 million pixels \(200 x 60\); this page takes up to 0.01"):
        restorer.restore_file(tmp_path / "large.png", "haze", 1.0)


def test_threads_each_get_what_they_asked_for(restorer, photo):
    asked = [("haze", 1.0), ("rain", 1.0), ("none", 1.0), ("haze", 0.5)] * 2
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda one: restorer.restore_file(photo, *one), asked))
    for (adapter, strength), one in zip(asked, done, strict=True):
        restorer._results.clear()
        assert np.array_equal(pixels(one.result), pixels(restorer.restore_file(photo, adapter, strength).result))


def test_an_added_adapter_is_one_to_choose_and_the_oldest_goes(restorer, photo, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_OTHER_ADAPTERS", 1)
    for name in ("one", "two"):
        shutil.copytree(adapters["haze"], tmp_path / name)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert restorer.add_adapter(f" {one} ") == one and restorer.add_adapter(one) == one
    assert restorer.adapters == ["haze", "rain", one]
    added = pixels(restorer.restore_file(photo, one, 1.0).result)
    assert np.array_equal(added, pixels(restorer.restore_file(photo, "haze", 1.0).result))
    restorer.add_adapter(two)
    assert restorer.adapters == ["haze", "rain", two]
    with pytest.raises(ValueError, match="no adapter"):
        restorer.restore_file(photo, one, 0.9)


def test_an_adapter_that_cannot_be_loaded_leaves_all_as_it_was(restorer, photo, tmp_path):
    before = pixels(restorer.restore_file(photo, "haze", 1.0).result)
    for wrong, message in (("", "Type the id"), (str(tmp_path), "adapter_config.json")):
        with pytest.raises(ValueError, match=message):
            restorer.add_adapter(wrong)
    restorer._results.clear()
    assert restorer.adapters == ["haze", "rain"]
    assert np.array_equal(pixels(restorer.restore_file(photo, "haze", 1.0).result), before)


def test_an_adapter_of_another_method_is_none_that_a_visitor_may_add(restorer, tiny_nafnet, tmp_path, monkeypatch):
    """Other methods are loaded by PEFT, whose configurations can name further repositories and modules."""
    model = get_peft_model(load_backbone(str(tiny_nafnet)), LoraConfig(r=2, target_modules=["intro"]))
    model.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"other cannot be loaded: its method is LORA, and only adapters of CoLoRA"):
        restorer.add_adapter(str(tmp_path / "other"))
    assert restorer.adapters == ["haze", "rain"]


def test_a_shipped_photo_takes_less_than_five_seconds_of_one_processor():
    """From file to file, as the page does it."""
    network = adapter_set(EXAMPLES / "checkpoints" / "nafnet-small-prod", adapters_in(EXAMPLES / "adapters"))
    restorer = module.PhotoRestorer(network, max_pixels=10**7)
    for photo in sorted((EXAMPLES / "data" / "underwater" / "test" / "input").iterdir())[:2]:
        start = time.process_time()
        restorer.restore_file(photo, "underwater", 1.0)
        assert time.process_time() - start < 5
