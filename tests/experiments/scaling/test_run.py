"""The comparison of scalings: its rules and the reading of its curves, then the script launched on tiny pairs."""

import json
import math

import pytest
import torch
from peft import get_peft_model
from support.examples import write_pairs
from support.experiments import launch
from support.tiny_networks import network

from colora_peft import CoLoRAConfig, CoLoRALayer
from colora_peft.ranks import MatrixShape
from colora_peft.tuner.scaling import STD_OF_A, adapter_scaling
from examples.experiments.scaling import run as scaling

RATES = [1e-3, 2e-3, 4e-3, 8e-3]


@pytest.mark.parametrize("top", [1.7e-3, 2e-3, 3.3e-3])
def test_optimum_of_a_parabola_is_its_top(top):
    curve = {rate: 20 - 3 * math.log(rate / top) ** 2 for rate in RATES}
    assert scaling.optimum(curve) == pytest.approx(top)


def test_optimum_at_the_edge_is_outside():
    assert math.isnan(scaling.optimum(dict(zip(RATES, [1, 2, 3, 4], strict=True))))
    assert math.isnan(scaling.optimum({1e-3: 1.0}))


def test_kept_gain_is_that_of_the_best_range():
    curve = dict(zip(RATES, [12.0, 19.0, 20.0, 18.0], strict=True))
    assert scaling.kept_gain(curve, 10.0, factor=4) == pytest.approx(0.8)
    assert scaling.kept_gain(curve, 10.0, factor=2) == pytest.approx(0.9)
    assert scaling.kept_gain(dict.fromkeys(RATES, 20.0), 10.0) == 1


@pytest.mark.parametrize("rule", scaling.RULES)
@pytest.mark.parametrize("ranks", [1, 2, scaling.DENSE])
def test_rule_sets_factor_and_spread_of_every_layer(rule, ranks):
    bare, x = network()
    expected = bare(x)
    model = get_peft_model(bare, CoLoRAConfig(ranks=ranks))
    chosen = scaling.RULES[rule]
    scaling.apply_rule(model, chosen)
    assert torch.equal(model(x), expected)
    for layer in (module for module in model.modules() if isinstance(module, CoLoRALayer)):
        k = layer.weight[0].numel()
        if "default" in layer.colora_dense:
            assert layer.scaling["default"] == chosen.dense(k)
        else:
            assert layer.scaling["default"] == chosen.factors(layer.rank["default"], k)
            spread = layer.colora_A["default"].square().mean().sqrt().item()
            assert 0.6 < spread / chosen.std(k) < 1.4


def test_rule_of_the_package_is_among_them():
    rule = scaling.RULES["linear_unit"]
    for rank, d, k in ((1, 64, 144), (8, 64, 144), (16, 16, 27)):
        expected = rule.dense(k) if MatrixShape(d, k).is_dense(rank) else rule.factors(rank, k)
        assert adapter_scaling(rank, d, k, CoLoRAConfig.colora_alpha) == pytest.approx(expected)
        assert rule.std(k) == STD_OF_A


def test_launched_comparison_runs_its_part_and_nothing_twice(tmp_path, tiny_nafnet):
    folder, results = write_pairs(tmp_path / "swapped" / "train", 6), tmp_path / "scaling.json"
    command = ["scaling.run", "--train_dir", folder, "--results", results, "--train_pairs", 3, "--validation_pairs", 2,
               "--max_train_steps", 2, "--resolution", 32, "--per_device_train_batch_size", 1, "--learning_rates",
               "1e-3", "2e-3", "--ranks", "1", "dense", "mix", "--model_name_or_path", tiny_nafnet]  # fmt: skip
    for part, count in (("1/2", 3), ("0/1", 6)):
        done = launch(*command, "--part", part)
        assert done.returncode == 0, done.stderr
        cells = json.loads(results.read_text())
        assert len(cells) == count and all(math.isfinite(cell["psnr"]) for cell in cells)
    assert {(cell["rank"], cell["learning_rate"]) for cell in cells} == {
        (rank, rate) for rank in ("1", "dense", "mix") for rate in (1e-3, 2e-3)
    }
    table = results.with_name("report.md").read_text()
    assert table in done.stdout and table.count("outside") == 3 * 2 * 2 + 2


def test_unknown_rule_is_named():
    with pytest.raises(ValueError, match="no rule 'cubic'; choose of lora, sqrt"):
        scaling.ScalingArguments(train_dir="train", rules=["cubic"])
