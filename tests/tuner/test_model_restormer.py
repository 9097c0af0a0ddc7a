"""CoLoRA on a whole Restormer: scores, ranks, scripts, and other methods of PEFT."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.examples import EXAMPLES
from support.tiny_networks import TINY_RESTORMER, tiny_restormer
from transformers import AutoModelForImageToImage

from colora_peft import (
    CoLoRAConfig,
    FaigSettings,
    ProbeSettings,
    adaptable_layers,
    estimate_contributions,
    restoration_loss,
    weight_matrix_shape,
)
from colora_peft.contribution.estimate import ESTIMATORS
from colora_peft.data.pairs import PairedImageFolder
from colora_peft.evaluation.evaluate import evaluate
from colora_peft.models import RestormerConfig, RestormerForImageRestoration
from colora_peft.training.methods import prepare_for_tuning, trained_parameters


def batches(count=1):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(2, 3, 16, 16, generator=generator) for _ in range(count)]
    return [{"pixel_values": 0.3 + 0.5 * image, "labels": image} for image in images]


@torch.no_grad()
def test_lora_with_biases_merges_too():
    """PEFT's own adapters see `project_out` called on the matrix of attention: that must be the same function."""
    bare, x = tiny_restormer(), torch.rand(1, 3, 24, 16)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=r".*\.project_out", init_lora_weights=False, lora_bias=True)
    config_without = LoraConfig(r=2, target_modules=r".*\.project_out", init_lora_weights=False)
    for settings in (config_without, config):
        if settings.lora_bias:  # merging a bias needs one to merge into
            bare = tiny_restormer(bias=True)
        model = get_peft_model(copy.deepcopy(bare), settings).eval()
        expected = model(x).reconstruction
        assert not torch.allclose(expected, bare(x).reconstruction, atol=1e-3)
        torch.testing.assert_close(model.merge_and_unload()(x).reconstruction, expected, rtol=0, atol=1e-5)


# --- contributions --------------------------------------------------------------------------------------------------


def test_path_attribution_is_complete():
    """Summed over all parameters it is the difference of the losses at the ends of the path."""
    model, task = tiny_restormer().double(), batches()
    task = [{key: value.double() for key, value in batch.items()} for batch in task]
    torch.manual_seed(1)
    end = {name: value + 0.02 * torch.randn_like(value) for name, value in model.state_dict().items()}
    result = estimate_contributions(
        model, task, restoration_loss, "faig", end_state=end, settings=FaigSettings(num_path_steps=16)
    )
    assert set(result.scores) == set(adaptable_layers(model))
    assert result.completeness_error < 0.02


@pytest.mark.filterwarnings("ignore:The loss does not reach", "ignore:The attributions")
@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "faig"])
def test_scores_give_ranks_within_the_budget(estimator):
    model, before = tiny_restormer(), tiny_restormer().state_dict()
    settings = ProbeSettings(num_steps=2, num_path_steps=2) if estimator == "probe" else None
    scores = estimate_contributions(model, batches(), restoration_loss, estimator, settings=settings).scores
    assert list(scores) == list(adaptable_layers(model))
    assert all(score > 0 for score in scores.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    shapes = {name: weight_matrix_shape(layer) for name, layer in adaptable_layers(model).items()}
    tuned = get_peft_model(model, CoLoRAConfig(contributions=scores, parameter_budget=0.1))
    ranks = tuned.peft_config["default"].ranks
    assert len({shapes[name].stored_rank(ranks[name]) for name in shapes}) > 2
    assert 0.08 < trained_parameters(tuned)["trainable_ratio"] <= 0.1


def test_decoder_begins_after_the_bottleneck():
    model = prepare_for_tuning(tiny_restormer(num_channels=6, dual_pixel=True), "decoder", CoLoRAConfig())
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    modules = [name for name, _ in model.named_children()]
    assert trained == set(modules[modules.index("latent") + 1 :])


# --- from a configuration to an adapter, as a user does it ---------------------------------------------------------


def launch(script, *flags):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(EXAMPLES / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_pretrained_then_adapted_by_the_scripts(train_dir, eval_dir, tmp_path):
    RestormerConfig(**TINY_RESTORMER).save_pretrained(tmp_path / "config")
    quick = ["--max_train_steps", 3, "--per_device_train_batch_size", 2, "--resolution", 32]
    launch("pretrain.py", "--train_dir", train_dir / "target", "--config_name", tmp_path / "config", *quick,
           "--output_dir", tmp_path / "network")  # fmt: skip
    flags = ["--train_dir", train_dir, "--eval_dir", eval_dir, "--model_name_or_path", tmp_path / "network", *quick]
    launch("finetune.py", *flags, "--probe_batches", 1, "--output_dir", tmp_path / "adapter")
    metrics = json.loads((tmp_path / "adapter" / "metrics.json").read_text())
    assert 0 < metrics["trainable_ratio"] <= 0.07
    base = AutoModelForImageToImage.from_pretrained(tmp_path / "network")
    assert isinstance(base, RestormerForImageRestoration) and base.config.width == TINY_RESTORMER["width"]
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    evaluated = evaluate(adapted, PairedImageFolder(eval_dir), torch.device("cpu"), "")
    assert evaluated["psnr"] == pytest.approx(metrics["psnr_after"], abs=1e-3)
