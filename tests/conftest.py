"""Small images and a small pre-trained network on disk, made once for all tests."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from colora_peft.images.reading import to_pil

EXAMPLES = Path(__file__).parent.parent / "examples"
# The scripts import their neighbours.
sys.path.append(str(EXAMPLES))

# Nothing in the tests may ask the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def write_pairs(folder: Path, count: int, size: int = 48) -> Path:
    """`count` pairs whose target is the input with red and blue exchanged, in input/ and target/."""
    generator = torch.Generator().manual_seed(count)
    for side in ("input", "target"):
        (folder / side).mkdir(parents=True)
    for index in range(count):
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[0]
        to_pil(image).save(folder / "input" / f"scene{index}.png")
        to_pil(image.flip(0)).save(folder / "target" / f"scene{index}.png")
    return folder


@pytest.fixture(scope="session")
def train_dir(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("train") / "pairs", 5)


@pytest.fixture(scope="session")
def eval_dir(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("eval") / "pairs", 2)


@pytest.fixture(scope="session")
def tiny_nafnet(tmp_path_factory) -> Path:
    """A folder with a NAFNet of a few thousand parameters whose blocks are not the identity."""
    from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration

    torch.manual_seed(0)
    config = NAFNetConfig(width=8, encoder_blocks=(1, 1), middle_blocks=1, decoder_blocks=(1, 1))
    model = NAFNetForImageRestoration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("beta", "gamma")):
                parameter.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("nafnet") / "tiny"
    model.save_pretrained(folder)
    return folder


def load_example(name: str):
    """One of the scripts under examples/ as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(autouse=True)
def factored_gradients_for_any_size(request, monkeypatch):
    """Let the tiny networks of the tests train their factors as large ones do, unless marked `real_sizes`."""
    if "real_sizes" not in request.keywords:
        monkeypatch.setattr("colora_peft.tuner.functional.MINIMUM_MULTIPLICATIONS", 0)


@pytest.fixture(params=[True, False], ids=["grad", "no_grad"])
def grad_mode(request):
    """Without gradients, layers keep their weight between calls: it must not outlive a change."""
    with torch.set_grad_enabled(request.param):
        yield
