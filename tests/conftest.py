"""Small images and a small pre-trained network on disk, made once for all tests."""

import os
from pathlib import Path

import pytest
import torch
from support.examples import write_pairs
from support.skipped_files import pytest_addoption, pytest_configure  # noqa: F401 - hooks of pytest

# Nothing in the tests may ask the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"


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


@pytest.fixture(autouse=True)
def factored_gradients_for_any_size(request, monkeypatch):
    """Lets the tiny networks of the tests train their factors as large ones do, unless marked `real_sizes`."""
    if "real_sizes" not in request.keywords:
        monkeypatch.setattr("colora_peft.tuner.functional.MINIMUM_MULTIPLICATIONS", 0)


@pytest.fixture(params=[True, False], ids=["grad", "no_grad"])
def grad_mode(request):
    """Without gradients, layers keep their weight between calls: it must not outlive a change."""
    with torch.set_grad_enabled(request.param):
        yield
