"""Ways to begin an adaptation: all begin as the network itself, within the budget; the report compares them."""

import json

import pytest
import torch
from accelerate import Accelerator
from support.examples import write_pairs
from support.experiments import launch

from colora_peft import CoLoRALayer, adaptable_layers
from colora_peft.hub import load_backbone
from colora_peft.ranks import MatrixShape
from colora_peft.training import trained_parameters
from examples.experiments.methods.plan import PEFT_LORA
from examples.experiments.start import run, ways

BATCHES = [
    {name: torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed + i))
     for i, name in enumerate(("pixel_values", "labels"))}
    for seed in (0, 10)
]  # fmt: skip
BUDGET = 0.2


def layers_of(model):
    return {
        name.removeprefix(ways.PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, CoLoRALayer) and "default" in module.rank
    }


@pytest.mark.parametrize("name", ways.WAYS)
def test_every_way_begins_as_the_network_and_keeps_the_budget(name, tiny_nafnet):
    network, x = load_backbone(str(tiny_nafnet)).eval(), BATCHES[0]["pixel_values"]
    with torch.no_grad():
        before = network(x).reconstruction
    torch.manual_seed(0)
    model = ways.begin(network, name, BATCHES, BUDGET).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x).reconstruction, before, rtol=0, atol=1e-6)
    figures = trained_parameters(model)
    rest = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim != 2)
    weights = figures["trainable_parameters"] / figures["trainable_ratio"]
    assert 0 < figures["trainable_parameters"] - (rest if name == "rest" else 0) <= BUDGET * weights
    bare = sum(layer.weight.requires_grad for layer in adaptable_layers(network).values())
    assert bare == 0 and (rest > 0) == (name in ("rest", PEFT_LORA))  # PEFT's factors have four dimensions


def test_an_aligned_first_step_lowers_the_loss_as_much_as_its_rank_can(tiny_nafnet):
    """B begins at 0, so its gradient is G A^T: no other A of orthogonal rows has a longer one."""
    network = load_backbone(str(tiny_nafnet))
    gradients = ways.mean_gradients(network, BATCHES)
    torch.manual_seed(0)
    model = ways.begin(network, "aligned", BATCHES, BUDGET)
    checked = 0
    for name, layer in layers_of(model).items():
        if "default" not in layer.colora_A:
            continue
        factor, gradient = layer.colora_A["default"].detach(), gradients[name]
        rank = min(len(factor), *gradient.shape)
        rows = torch.nn.functional.normalize(factor[:rank], dim=1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(rank), rtol=0, atol=1e-4)
        found, best = (gradient @ rows.T).norm(), torch.linalg.svdvals(gradient)[:rank].norm()
        torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-12)
        checked += 1
    assert checked > 3


def test_the_mean_gradient_is_that_of_the_mean_loss(tiny_nafnet):
    network = load_backbone(str(tiny_nafnet)).eval()
    found = ways.mean_gradients(network, BATCHES)
    whole = [{name: torch.cat([batch[name] for batch in BATCHES]) for name in BATCHES[0]}]
    for name, gradient in ways.mean_gradients(network, whole).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert found.keys() == adaptable_layers(network).keys()


def test_gain_buys_the_larger_singular_values_and_no_more_than_the_budget():
    torch.manual_seed(0)
    gradients = {"strong": torch.randn(8, 18), "weak": 0.01 * torch.randn(8, 18), "none": torch.zeros(8, 18)}
    for budget in (0.1, 0.3, 0.5):
        ranks = ways.ranks_by_gain(gradients, budget)
        assert ranks["strong"] >= ranks["weak"] >= ranks["none"]
        spent = sum(MatrixShape(8, 18).parameters(rank) for rank in ranks.values())
        assert spent <= budget * 3 * 8 * 18
        assert spent + min(MatrixShape(8, 18).parameters(1), 8 * 18) > budget * 3 * 8 * 18 or set(ranks.values()) == {
            8
        }
    assert ways.ranks_by_gain(gradients, 1.0) == dict.fromkeys(gradients, 8)


def depthwise_layers(path):
    layers = adaptable_layers(load_backbone(str(path)))
    return {name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1}


@pytest.mark.parametrize("name", ["lora_ranks", "colora_lora_ranks", "one_rank"])
def test_ranks_of_lora_are_the_same_in_every_layer_that_it_takes(name, tiny_nafnet):
    model = ways.begin(load_backbone(str(tiny_nafnet)), name, BATCHES, BUDGET)
    ranks = {name: layer.rank["default"] for name, layer in layers_of(model).items()}
    depthwise = depthwise_layers(tiny_nafnet)
    assert depthwise and (depthwise <= ranks.keys() if name == "one_rank" else not depthwise & ranks.keys())
    shapes = {name: layer.matrix_shape for name, layer in layers_of(model).items()}
    assert len({rank for name, rank in ranks.items() if not shapes[name].is_dense(rank)}) == 1


def test_without_depthwise_layers_the_others_share_the_budget(tiny_nafnet):
    model = ways.begin(load_backbone(str(tiny_nafnet)), "no_depthwise", BATCHES, BUDGET)
    assert layers_of(model) and not depthwise_layers(tiny_nafnet) & layers_of(model).keys()
    layers = adaptable_layers(load_backbone(str(tiny_nafnet))).items()
    weights = sum(layer.weight.numel() for name, layer in layers if name not in depthwise_layers(tiny_nafnet))
    assert 0.8 * BUDGET * weights < trained_parameters(model)["trainable_parameters"] <= BUDGET * weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_batches": 0}, "--gradient_batches"),
        ({"validation_pairs": -3}, "--validation_pairs"),
        ({"parameter_budget": 7.0}, "--parameter_budget is 7"),
        ({"validation": "blocks"}, "--validation is 'blocks': choose of drawn, block"),
        ({"seeds": []}, "--seeds must list"),
    ],
)
def test_bad_numbers_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        run.StartArguments(data_dir="x", **settings)


def test_a_folder_with_no_pairs_besides_those_held_out_is_named(tmp_path):
    write_pairs(tmp_path / "a" / "train", 3)
    args = run.StartArguments(data_dir=str(tmp_path), validation_pairs=3)
    with pytest.raises(ValueError, match="holds 3 pairs: lower --validation_pairs 3"):
        run.run_cell(args, {"task": "a", "seed": 0}, None)


@pytest.mark.parametrize("validation", run.VALIDATIONS)
def test_the_pairs_held_out_are_neighbours_on_request(validation, tmp_path, tiny_nafnet, monkeypatch):
    write_pairs(tmp_path / "a" / "train", 8)
    args = run.StartArguments(
        data_dir=str(tmp_path), model_name_or_path=str(tiny_nafnet), validation=validation, validation_pairs=2,
        train_pairs=2, resolution=32, per_device_train_batch_size=1, gradient_batches=1, parameter_budget=BUDGET,
    )  # fmt: skip
    held_out = []
    monkeypatch.setattr(run, "train_and_validate", lambda model, patches, pairs, *rest: held_out.append(pairs) or {})
    for seed in (1, 2, 3):
        run.run_cell(args, {"task": "a", "way": "colora", "learning_rate": 1e-3, "seed": seed}, Accelerator())
    names = [sorted(pairs.names) for pairs in held_out]
    blocks = [["scene2", "scene3"], ["scene4", "scene5"], ["scene6", "scene7"]]
    assert (names == blocks) == (validation == "block")


def test_an_unknown_way_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no way 'strait'; choose of peft_lora, colora,"):
        run.StartArguments(data_dir="x", ways=["strait"])


@pytest.mark.slow
def test_launched_comparison_runs_every_cell_once(tiny_nafnet, tmp_path):
    write_pairs(tmp_path / "data" / "a" / "train", 6)
    command = ["start.run", "--data_dir", tmp_path / "data", "--tasks", "a", "--model_name_or_path", tiny_nafnet,
               "--learning_rates", "1e-3", "--seeds", 0, "--train_pairs", 3, "--validation_pairs", 2,
               "--max_train_steps", 1, "--resolution", 32, "--per_device_train_batch_size", 1,
               "--gradient_batches", 1, "--parameter_budget", BUDGET, "--output_dir", tmp_path / "out"]  # fmt: skip
    for _ in range(2):
        done = launch(*command)
        assert done.returncode == 0, done.stderr
        cells = json.loads((tmp_path / "out" / "cells.json").read_text())
        assert [c["way"] for c in cells] == list(ways.WAYS)
    assert (tmp_path / "out" / "report.md").read_text() == run.report(cells)
    other = launch(*command, "--max_train_steps", 2)
    assert other.returncode == 1 and "has cells with max_train_steps 1, not 2" in other.stderr
