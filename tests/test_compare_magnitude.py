"""The experiment on magnitudes compares what it says it does."""

import json

import pytest
import torch
from conftest import load_example, write_pairs
from peft import get_peft_model
from tiny_networks import NETWORKS, network

from colora_peft import CoLoRAConfig


@pytest.fixture(scope="module")
def script():
    # search_learning_rates and finetune are imported by their bare names, as when the script is launched.
    for name in ("finetune", "search_learning_rates"):
        load_example(name)
    return load_example("compare_magnitude")


@pytest.mark.parametrize("ranks", [1, 1000], ids=["factors", "dense"])
@pytest.mark.parametrize("name", NETWORKS)
def test_magnitudes_start_as_the_identity_and_then_are_the_lengths(script, name, ranks):
    bare, x = network(name)
    model = get_peft_model(bare, CoLoRAConfig(ranks=ranks, init_weights=True))
    expected = model(x)
    script.add_magnitudes(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    model.train()
    (model(x) - 1).square().sum().backward()
    layers = [layer for layer in model.modules() if isinstance(layer, script.MagnitudeLayer)]
    assert layers and all(layer.colora_magnitude.grad.abs().sum() > 0 for layer in layers)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            lengths = script._lengths(layer, layer.effective_weight())
            torch.testing.assert_close(lengths, layer.colora_magnitude.abs(), rtol=1e-4, atol=1e-5)


def test_cells_are_run_once_and_reported(script, tmp_path, capsys):
    folder = write_pairs(tmp_path / "task" / "train", 7, size=136)
    settings = {"learning_rates": [1e-3], "seeds": [0], "max_train_steps": 1, "train_pairs": 3, "validation_pairs": 2}
    args = script.MagnitudeArguments([str(folder)], results=str(tmp_path / "cells.json"), **settings)
    script.main(args)
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [cell["variant"] for cell in cells] == ["plain", "magnitude"]
    assert cells[0]["trainable_parameters"] < cells[1]["trainable_parameters"]
    assert "does not measurably help" in (tmp_path / "cells.md").read_text()
    capsys.readouterr()
    script.main(args)
    assert " -> " not in capsys.readouterr().out
    assert json.loads((tmp_path / "cells.json").read_text()) == cells


def test_too_few_pairs_are_named(script, tmp_path):
    folder = write_pairs(tmp_path / "task" / "train", 3)
    with pytest.raises(ValueError, match="holds 3 pairs, too few"):
        script.main(script.MagnitudeArguments([str(folder)], results=str(tmp_path / "cells.json")))
