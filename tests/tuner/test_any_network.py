"""CoLoRA on networks that this package does not bring: transformers' Swin2SR, with windows of attention, and a plain
`nn.Module` that returns a tensor. Each is scored, adapted, trained, saved, loaded and merged, and goes through
`finetune.py` by `module:function`.
"""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from support.any_network import plain, swin2sr
from support.examples import EXAMPLES, load_example
from transformers import HfArgumentParser

from colora_peft import (
    ESTIMATORS,
    CoLoRAConfig,
    CoLoRALayer,
    FaigSettings,
    ProbeSettings,
    adaptable_layers,
    estimate_contributions,
    load,
)
from colora_peft.hub.networks import load_backbone
from colora_peft.images.reading import read_image, to_pil
from colora_peft.inference.network import reconstruct, restoration_loss
from colora_peft.ranks.adaptable import weight_matrix_shape
from colora_peft.training.methods import prepare_for_tuning, trained_parameters

finetune = load_example("finetune")


both = pytest.mark.parametrize("make", [swin2sr, plain], ids=["swin2sr", "plain"])


def batches(count=2, size=16):
    """Batches of a task that exchanges red and blue, with sides that no stride divides."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(2, 3, size - 1, size + 1, generator=generator) for _ in range(count)]
    return [{"pixel_values": x, "labels": x.flip(1)} for x in inputs]


@both
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_scores_every_layer_and_leaves_the_network_alone(make, estimator):
    model = make()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings, end_state = None, None
    if estimator == "probe":
        settings = ProbeSettings(num_steps=3, num_path_steps=4)
    if estimator == "faig":
        generator = torch.Generator().manual_seed(1)
        moved = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in model.named_parameters()}
        settings, end_state = FaigSettings(num_path_steps=32), moved
    scores = estimate_contributions(
        model, batches(), restoration_loss, estimator, end_state=end_state, settings=settings
    )
    assert scores.scores.keys() == adaptable_layers(model).keys()
    assert all(score > 0 for score in scores.scores.values())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    if estimator == "faig":
        assert scores.completeness_error < 0.2


@both
def test_the_budget_is_kept_and_the_higher_score_gets_no_less(make):
    model = make()
    layers = adaptable_layers(model)
    scores = {name: float(number) for number, name in enumerate(layers)}
    adapted = get_peft_model(model, CoLoRAConfig(contributions=scores, parameter_budget=0.2))
    assert 0.1 < trained_parameters(adapted)["trainable_ratio"] <= 0.2
    ranks = adapted.peft_config["default"].ranks
    of_one_shape = {}
    for name, layer in layers.items():
        of_one_shape.setdefault(weight_matrix_shape(getattr(layer, "base_layer", layer)), []).append(ranks[name])
    assert all(same == sorted(same) for same in of_one_shape.values())


@both
def test_training_saving_loading_and_merging_agree(make, tmp_path):
    model = prepare_for_tuning(make(), "colora", CoLoRAConfig(parameter_budget=0.4))
    (batch,) = batches(1)
    x = batch["pixel_values"]
    with torch.no_grad():
        bare = reconstruct(make(), x)
        assert torch.equal(reconstruct(model, x), bare)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = restoration_loss(model.train(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        expected = reconstruct(model.eval(), x)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
        torch.testing.assert_close(reconstruct(loaded, x), expected, rtol=0, atol=1e-6)
        with loaded.disable_adapter():
            torch.testing.assert_close(reconstruct(loaded, x), bare, rtol=0, atol=1e-6)
        merged = loaded.merge_and_unload()
        assert not any(isinstance(module, CoLoRALayer) for module in merged.modules())
        torch.testing.assert_close(reconstruct(merged, x), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ finetune.py

NETWORKS = """
from support.any_network import plain as make_plain, swin2sr as make_swin2sr
from support.transformers import tiny_swin2sr as enlarging

def swin2sr():
    return make_swin2sr()

def plain():
    return make_plain()

def drawn():
    from torch import nn
    return nn.Conv2d(3, 3, 3, padding=1)

def sixteen():
    import torch

    class Sixteen(torch.nn.Conv2d):
        def forward(self, x):
            assert x.shape[-1] == 16, "16 pixels alone"
            return super().forward(x)

    torch.manual_seed(0)
    return Sixteen(3, 3, 3, padding=1)

def grey():
    from torch import nn
    return nn.Conv2d(1, 1, 3, padding=1)
"""
QUICK = ["--max_train_steps", "3", "--per_device_train_batch_size", "2", "--resolution", "17", "--probe_batches", "1"]


@pytest.fixture
def flags(train_dir, eval_dir, tmp_path, monkeypatch):
    """Flags of a run in a folder that holds the module with the networks."""
    (tmp_path / "some_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield ["--train_dir", str(train_dir), "--eval_dir", str(eval_dir), *QUICK, "--output_dir", "out"]
    sys.modules.pop("some_networks", None)


def run(flags, *more):
    (args,) = HfArgumentParser(finetune.FinetuneArguments).parse_args_into_dataclasses([*flags, *more])
    finetune.main(args)


@pytest.mark.parametrize("name", ["swin2sr", "plain"])
def test_finetune_adapts_what_a_function_returns_and_says_how_to_use_it(
    flags, eval_dir, tmp_path, capsys, recwarn, name
):
    base = f"some_networks:{name}"
    run(flags, "--model_name_or_path", base, "--parameter_budget", "0.4")
    assert not [warning for warning in recwarn if "vocabulary" in str(warning.message)], (
        "PEFT looked for it on the Hub"
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["psnr_after"] != metrics["psnr_before"]
    assert PeftConfig.from_pretrained("out").base_model_name_or_path == base
    # The code that the run prints, on an image of an odd width.
    image = read_image(eval_dir / "input" / "scene0.png")[..., :45]
    to_pil(image).save("photo.jpg", quality=100)
    exec(capsys.readouterr().out.partition("Load it with:\n\n")[2], found := {})
    assert found["restored"].shape == image.shape == read_image("restored.png").shape
    bare = reconstruct(load_backbone(base), read_image("photo.jpg")[None])[0].clamp(0, 1)
    assert not torch.equal(found["restored"], bare)
    with pytest.raises(ValueError, match=f"made by the function {base}"):
        load("out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model_name_or_path", "some_networks:enlarging"], "It enlarges 2 times"),
        (["--model_name_or_path", "some_networks:plain", "--method", "full"], "save_pretrained, which Plain"),
        (["--model_name_or_path", "some_networks:nothing"], "no function nothing"),
        (
            ["--model_name_or_path", "some_networks:grey"],
            r"grey does not restore RGB images of shape \(1, 3, 17, 17\)",
        ),
        (
            ["--model_name_or_path", "some_networks:sixteen", "--resolution", "16", "--parameter_budget", "0.5"],
            "^some_networks:sixteen does not restore the photos to evaluate on: 16 pixels alone \\(if sides must be",
        ),
        (["--model_name_or_path", "some_networks:drawn"], "drawn returns other weights at each call: seed what"),
    ],
)
def test_networks_that_will_not_do_are_refused_before_anything_is_written(flags, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run(flags, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_launched_script_finds_the_module_in_the_folder_it_is_started_from(flags, tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n\ndef network():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", str(EXAMPLES / "finetune.py"), *flags]
    done = subprocess.run(
        [*command, "--model_name_or_path", "own:network", "--parameter_budget", "0.5"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert PeftConfig.from_pretrained(str(tmp_path / "out")).base_model_name_or_path == "own:network"
