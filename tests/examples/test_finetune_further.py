"""examples/finetune.py --adapter_name_or_path: what a training begins with, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from support.finetune import QUICK, metrics_of, run

import colora_peft
from colora_peft.hub import load_backbone, load_for_training

X = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data(train_dir, eval_dir):
    return ["--train_dir", train_dir, "--eval_dir", eval_dir, *QUICK]


@pytest.fixture(scope="module")
def adapter(data, tiny_nafnet, tmp_path_factory):
    """The folder of a run with a larger budget, so that its ranks are not those of the default."""
    output_dir = tmp_path_factory.mktemp("runs") / "adapter"
    return run(*data, "--model_name_or_path", tiny_nafnet, "--parameter_budget", 0.2, "--output_dir", output_dir)


@pytest.fixture
def lora(tiny_nafnet, tmp_path):
    """The folder of an adapter of PEFT's LoRA that is not the identity."""
    torch.manual_seed(1)
    layers = r".*(conv1|conv3|conv4|conv5)"
    model = get_peft_model(load_backbone(str(tiny_nafnet)), LoraConfig(r=2, target_modules=layers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def restored(model):
    with torch.inference_mode():
        return model(X).reconstruction


def test_it_begins_bitwise_with_the_output_of_the_adapter_and_trains_that_alone(adapter):
    model = load_for_training(adapter)
    assert torch.equal(restored(model), restored(colora_peft.load(adapter)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(weights(adapter)) and all("colora_" in name for name in trained)


def test_a_step_that_learns_nothing_gives_the_adapter_again(adapter, data, tmp_path):
    flags = ["--max_train_steps", 1, "--learning_rate", 1e-30, "--output_dir", tmp_path / "out"]
    output_dir = run(*data, "--adapter_name_or_path", adapter, *flags)
    before, after = metrics_of(adapter), metrics_of(output_dir)
    assert after["psnr_before"] == after["psnr_after"] == before["psnr_after"]
    assert after["trainable_parameters"] == before["trainable_parameters"] and after["parameter_budget"] is None
    expected, found = weights(adapter), weights(output_dir)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-25)
    one, other = (json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, output_dir))
    assert set(one["target_modules"]) == set(other["target_modules"])
    assert torch.equal(restored(colora_peft.load(adapter)), restored(colora_peft.load(output_dir)))
    for name in ("ranks", "base_fingerprint", "base_model_name_or_path"):
        assert one[name] == other[name]
    card = ModelCard.load(output_dir / "README.md").content
    assert f"beginning with the adapter `{adapter}`" in card and "budget" not in card.split("```")[0]


def test_it_learns_on_and_a_resumed_run_is_bitwise_the_same(adapter, data, tmp_path):
    flags = [*data, "--adapter_name_or_path", adapter]
    whole = run(*flags, "--output_dir", tmp_path / "whole", "--max_train_steps", 40)
    assert metrics_of(whole)["psnr_after"] > metrics_of(whole)["psnr_before"] + 0.5
    shutil.copytree(whole, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-40")
    resume = ["--max_train_steps", 40, "--resume_from_checkpoint", "latest"]
    parts = run(*flags, "--output_dir", tmp_path / "parts", *resume)
    expected, found = weights(whole), weights(parts)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_adapter_of_lora_is_trained_and_its_snippet_loads_it(lora, data, tmp_path):
    with pytest.warns(UserWarning, match="does not say which weights its base has"):
        model = load_for_training(lora)
    assert all(torch.equal(model.get_parameter(name.replace(".weight", ".default.weight")), tensor)
               for name, tensor in weights(lora).items())  # fmt: skip
    with pytest.warns(UserWarning, match="does not say"):
        output_dir = run(*data, "--adapter_name_or_path", lora, "--output_dir", tmp_path / "out")
    metrics, expected, found = metrics_of(output_dir), weights(lora), weights(output_dir)
    assert metrics["method"] == "lora" and metrics["psnr_after"] != metrics["psnr_before"]
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in expected.items()}
    assert PeftConfig.from_pretrained(output_dir).peft_type == "LORA"
    card = ModelCard.load(output_dir / "README.md")
    assert "colora" not in card.data.tags
    Image.new("RGB", (40, 24), "teal").save(tmp_path / "photo.jpg")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "restored.png").size == (40, 24)


# -------------------------------------------------------------------------------------------------------- bad input


def test_another_base_is_refused(adapter, data, tiny_nafnet, tmp_path):
    other = load_backbone(str(tiny_nafnet))
    with torch.no_grad():
        other.ending.weight += 0.1
    other.save_pretrained(tmp_path / "other")
    flags = ["--model_name_or_path", tmp_path / "other", "--output_dir", tmp_path / "out"]
    remedy = f"Leave --model_name_or_path out or give '{tiny_nafnet}'.$"
    with pytest.raises(ValueError, match=f"was trained on another network .* the weights differ. {remedy}"):
        run(*data, "--adapter_name_or_path", adapter, *flags)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_found_is_asked_for_and_then_named_in_the_result(adapter, data, tiny_nafnet, tmp_path):
    shutil.copytree(adapter, tmp_path / "moved")
    file = tmp_path / "moved" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "./gone"}))
    flags = [*data, "--adapter_name_or_path", tmp_path / "moved", "--output_dir", tmp_path / "out"]
    with pytest.raises(OSError, match="gone, is not on this machine: give --model_name_or_path"):
        run(*flags)
    output_dir = run(*flags, "--model_name_or_path", tiny_nafnet)
    named = json.loads((output_dir / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tiny_nafnet)
    assert torch.isfinite(restored(colora_peft.load(output_dir))).all()


def test_an_adapter_of_other_layers_than_the_network_is_refused(lora, tmp_path):
    file = lora / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ".*(conv1|conv3|conv4)"}))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="conv5.* are only in one of the two"):
        load_for_training(lora)


def test_adapters_of_other_methods_are_refused(tiny_nafnet, tmp_path):
    model = get_peft_model(
        load_backbone(str(tiny_nafnet)), IA3Config(target_modules=["conv4"], feedforward_modules=[])
    )
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="'IA3': only adapters of CoLoRA and LoRA are trained further"):
        load_for_training(tmp_path / "ia3")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--method", "full"], "--method"),
        (["--method", "lora"], "--method"),
        (["--parameter_budget", 0.1], "--parameter_budget"),
        (["--contributions", "scores.json"], "--contributions"),
        (["--beta", 1, "--estimator", "probe"], "--beta, --estimator"),
    ],
)
def test_flags_that_the_adapter_has_settled_are_refused(adapter, data, tmp_path, flags, named):
    with pytest.raises(ValueError, match=f"at its own ranks, so that {named} would have no effect"):
        run(*data, "--adapter_name_or_path", adapter, *flags, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_adapter_that_a_run_reads_is_not_deleted(adapter, data):
    with pytest.raises(ValueError, match="--adapter_name_or_path .* lies in --output_dir"):
        run(*data, "--adapter_name_or_path", adapter, "--output_dir", adapter, "--overwrite_output_dir")
    assert metrics_of(adapter)["method"] == "colora"
