"""examples/example_photos.py: fair examples, the same for everybody."""

import numpy as np
import torch
from PIL import Image
from support.examples import EXAMPLES, load_example

module = load_example("example_photos")
DATA = EXAMPLES / "data"


def test_examples_are_test_photos_that_no_training_pair_shows():
    trained_on = {path.stem for path in (DATA / "underwater" / "train" / "input").iterdir()}
    assert not trained_on & {name.removesuffix(".jpg") for name in (*module.UNDERWATER, module.CLEAN)}


def test_examples_are_pairs_in_range_and_rain_adds_light_alone():
    photos = module.example_photos(DATA)
    assert [photo.adapter for photo in photos] == ["underwater"] * 3 + ["rain"]
    for photo in photos:
        assert photo.degraded.shape == photo.clean.shape and not torch.equal(photo.degraded, photo.clean)
        assert 0 <= photo.degraded.min() and photo.degraded.max() <= 1
    rain = photos[-1]
    assert (rain.degraded >= rain.clean).all()
    assert torch.equal(module.add_rain(rain.clean), rain.degraded)


def test_written_examples_are_the_degraded_photos(tmp_path):
    photos = module.example_photos(DATA)[2:]
    for (path, adapter), photo in zip(module.write_examples(photos, tmp_path), photos, strict=True):
        assert adapter == photo.adapter
        written = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) / 255
        assert (written - photo.degraded).abs().max() <= 0.5 / 255 + 1e-6
