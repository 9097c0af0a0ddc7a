"""examples/compare_magnitude.py: the laws of its layer, then the script launched on tiny pairs."""

import json
import math
import runpy
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from support.examples import EXAMPLES, load_example, write_pairs
from support.layer import STORAGES, make_case, shake

from colora_peft import adaptable_layers
from colora_peft.training.methods import trained_parameters

SCRIPT = EXAMPLES / "compare_magnitude.py"
compare_magnitude = load_example("compare_magnitude")
MagnitudeLayer = load_example("magnitude_layer").MagnitudeLayer

# The magnitude depends on the kind of weight alone, not on how the layer pads or strides.
KINDS = ("linear", "conv2d", "conv2d_depthwise", "conv3d", "conv_transpose2d", "conv_transpose2d_grouped")
QUICK = ["--learning_rates", "1e-3", "--seeds", "1", "--max_train_steps", "2", "--resolution", "32"]
QUICK += ["--per_device_train_batch_size", "2", "--probe_steps", "1", "--train_pairs", "3", "--validation_pairs", "2"]


@pytest.fixture(params=[(case, storage) for case in KINDS for storage in STORAGES], ids="-".join)
def case(request):
    """(bare layer, the same with adapter and magnitude, input); the adapter is the identity."""
    bare, layer, x = make_case(*request.param)
    return bare, MagnitudeLayer.convert(layer), x


def test_new_magnitude_is_the_identity(case):
    bare, layer, x = case
    torch.testing.assert_close(layer(x), bare(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.eval()(x), bare(x), rtol=0, atol=1e-6)


def test_weight_has_the_direction_of_the_delta_and_the_length_of_the_magnitude(case):
    bare, layer, _ = case
    shake(layer)
    with torch.no_grad():
        layer.colora_magnitude.abs_()
    weight = layer.effective_weight()
    torch.testing.assert_close(layer.channel_norms(weight).flatten(), layer.colora_magnitude.detach())
    moved = bare.weight + layer.get_delta_weight("default")
    rows = 1 if isinstance(bare, torch.nn.ConvTranspose2d) else 0
    cosine = torch.cosine_similarity(weight.movedim(rows, 0).flatten(1), moved.movedim(rows, 0).flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_gradient_reaches_magnitude_and_adapter_and_nothing_else(case):
    _, layer, x = case
    shake(layer)
    layer.train()(x).square().sum().backward()
    assert "colora_magnitude" in dict(layer.named_parameters())
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == name.startswith("colora_"), name


def test_a_changed_magnitude_is_seen_at_inference(case):
    _, layer, x = case
    layer.eval().requires_grad_(False)
    before = layer(x)
    layer.colora_magnitude.mul_(2)
    assert not torch.allclose(layer(x), before)


def test_both_variants_start_from_the_same_adapters_and_the_magnitudes_are_counted():
    accelerator = Accelerator()
    layers = adaptable_layers(compare_magnitude.load_network(accelerator))
    scores = {name: 1.0 if name.startswith("decoders") else 1e-6 for name in layers}
    task = compare_magnitude.MagnitudeArguments(["task/train"]).of_task("task/train")
    drawn = compare_magnitude.Draw(task, 0, None, None, scores)
    plain, other = (compare_magnitude.adapted_network(drawn, name, accelerator) for name in compare_magnitude.VARIANTS)
    added = dict(other.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(added.pop(name), parameter), name
    assert added and all(name.endswith("colora_magnitude") for name in added)
    sizes = [trained_parameters(model)["trainable_parameters"] for model in (plain, other)]
    adapted_layers = [layer for layer in other.modules() if isinstance(layer, MagnitudeLayer)]
    assert sizes[1] - sizes[0] == sum(layer.out_features for layer in adapted_layers)


def test_launched_run_writes_its_cells_and_a_second_call_runs_none(tmp_path, monkeypatch, capsys):
    folder, results = write_pairs(tmp_path / "swapped" / "train", 6), tmp_path / "out" / "magnitude.json"
    flags = ["--train_dirs", str(folder), "--results", str(results), *QUICK]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = json.loads(results.read_text())
    assert [(cell["seed"], cell["variant"]) for cell in cells] == [(1, "plain"), (1, "magnitude")]
    assert all(math.isfinite(cell["psnr"]) and cell["seconds"] > 0 and cell["task"] == "swapped" for cell in cells)
    assert cells[0]["trainable_parameters"] < cells[1]["trainable_parameters"]
    report = results.with_suffix(".md").read_text()
    assert report.startswith("No verdict") and report in done.stdout

    monkeypatch.setattr(compare_magnitude, "run_cell", None)
    monkeypatch.setattr(compare_magnitude, "draw", None)
    parser = compare_magnitude.HfArgumentParser(compare_magnitude.MagnitudeArguments)
    compare_magnitude.main(parser.parse_args_into_dataclasses(flags)[0])
    assert json.loads(results.read_text()) == cells and results.with_suffix(".md").read_text() == report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "holds 5 pairs, too few to train on 16"),
        (["--train_pairs", "3", "--validation_pairs", "2"], "smaller than the 128 of the training patch"),
        (["--seeds", "0", "0"], "--seeds must list at least one value and none twice"),
        (["--learning_rates", "-1"], "--learning_rate must be a positive number"),
        (["--validation_pairs", "0"], "--validation_pairs must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_sentence(train_dir, tmp_path, monkeypatch, flags, message):
    results = tmp_path / "magnitude.json"
    argv = [str(SCRIPT), "--train_dirs", str(train_dir), "--results", str(results), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not results.exists()


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.5, 0.6, 0.7], "helps"),
        ([0.04, 0.05, 0.06], "does not measurably help"),
        ([2.0, -1.5, 1.0], "does not measurably help"),
        ([0.5], "No verdict"),
        ([math.nan, math.nan], "No verdict"),
    ],
)
def test_verdict_follows_from_the_numbers(differences, expected):
    assert expected in compare_magnitude.verdict({"task": compare_magnitude.Comparison({}, differences)})
