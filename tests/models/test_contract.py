"""The contract of a backbone, for all of them: models/README.md states it in words."""

import copy
import inspect
import json
import math
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import BACKBONES, adapted, batch, images, state_is_equal, tiny_backbone
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageToImage
from transformers.modeling_layers import GradientCheckpointingLayer

import colora_peft.models
from colora_peft import (
    ESTIMATORS,
    CoLoRAConfig,
    CoLoRALayer,
    FaigSettings,
    ProbeSettings,
    adaptable_layers,
    estimate_contributions,
    restore_image,
)
from colora_peft.inference import restoration_loss
from colora_peft.inference.global_pooling import averages_over_pixels
from colora_peft.models import RestorationBackbone
from colora_peft.training.methods import prepare_for_tuning, trained_parameters

every_backbone = pytest.mark.parametrize("name", BACKBONES)
rgb_backbones = pytest.mark.parametrize("name", [name for name in BACKBONES if "dual" not in name])


def test_every_backbone_is_tested_here():
    classes = {found for _, found in inspect.getmembers(colora_peft.models, inspect.isclass)}
    backbones = {found for found in classes if issubclass(found, RestorationBackbone)} - {RestorationBackbone}
    assert backbones == {model_class for model_class, *_ in BACKBONES.values()}


@every_backbone
def test_a_class_keeps_the_name_that_adapters_write_down(name):
    model_class, _, full_name = BACKBONES[name]
    assert f"{model_class.__module__}.{model_class.__name__}" == full_name


# --- files ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_backbone
def test_a_saved_network_is_the_same_bit_for_bit(name, tmp_path):
    model = tiny_backbone(name)
    x, _ = images(model, 9, 8)
    model.config.colora_contributions = {"layer": 1.5}  # what a network brings along for its adapters
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config) and config.to_diff_dict() == model.config.to_diff_dict()
    assert config.pads_to_multiple == model.config.pads_to_multiple and "pads_to_multiple" not in config.to_dict()
    for auto in (AutoModel, AutoModelForImageToImage):
        torch.manual_seed(1)
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is type(model) and state_is_equal(loaded, model)
        # A copy, because weights that are mapped from a file lie at any address, and some kernels round by address.
        assert torch.equal(copy.deepcopy(loaded)(x).reconstruction, model(x).reconstruction)


@every_backbone
def test_half_precision_weights_load_as_the_float32_their_config_says(name, tmp_path):
    model = tiny_backbone(name)
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(half))  # which it empties
    loaded = AutoModelForImageToImage.from_pretrained(tmp_path).state_dict()
    assert all(loaded[name].dtype == torch.float32 and torch.equal(loaded[name], half[name].float()) for name in half)


def test_importing_the_backbones_alone_is_enough(tmp_path):
    for name in BACKBONES:
        tiny_backbone(name).save_pretrained(tmp_path / name)
    code = (
        "import sys, colora_peft.models; from transformers import AutoModelForImageToImage as Auto; "
        f"print(*[type(Auto.from_pretrained({str(tmp_path)!r} + '/' + name)).__name__ for name in {list(BACKBONES)}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [model_class.__name__ for model_class, *_ in BACKBONES.values()]


# --- what goes in and comes out -------------------------------------------------------------------------------------


@torch.no_grad()
@every_backbone
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 9), (8, 16)])
def test_any_size_is_padded_to_the_next_multiple_and_cut(name, size):
    model = tiny_backbone(name)
    x, labels = images(model, *size)
    multiple = model.config.pads_to_multiple
    padded = model.pad(x)
    assert padded.shape[-2:] == tuple(math.ceil(side / multiple) * multiple for side in size)
    assert torch.equal(padded[..., : size[0], : size[1]], x)
    restored = model(x).reconstruction
    assert restored.shape == labels.shape
    assert torch.equal(restored, model.restore(padded)[..., : size[0], : size[1]])


@torch.no_grad()
@every_backbone
def test_labels_give_the_mean_absolute_error(name):
    model = tiny_backbone(name)
    x, labels = images(model, 9, 6)
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, (output.reconstruction - labels).abs().mean())
    assert model(x).loss is None
    loss, restored = model(x, labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(restored, output.reconstruction)
    (alone,) = model(x, return_dict=False)
    assert torch.equal(alone, output.reconstruction)


@every_backbone
def test_wrong_shapes_are_refused(name):
    model = tiny_backbone(name)
    x, labels = images(model, 8, 8)
    for wrong in (x[:, 1:], x[0], torch.cat([x, x], dim=1)):
        with pytest.raises(ValueError, match="pixel_values"):
            model(wrong)
    for wrong in (labels[..., 1:], labels[:1], labels[:, 1:]):
        with pytest.raises(ValueError, match="labels"):
            model(x, labels=wrong)


@torch.no_grad()
@every_backbone
def test_channels_last_changes_no_number(name):
    model = tiny_backbone(name)
    x, _ = images(model, 9, 8)
    expected = model(x).reconstruction
    restored = model.to(memory_format=torch.channels_last)(x).reconstruction
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-5)


# --- its modules ----------------------------------------------------------------------------------------------------


@every_backbone
def test_the_first_module_runs_first_and_the_decoder_last(name):
    model, ran = tiny_backbone(name), []
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    model(images(model, 16, 16)[0])
    (first,) = (path for path, module in model.named_children() if module is model.get_input_embeddings())
    assert ran[0].split(".")[0] == first
    in_decoder = [path.split(".")[0] in model.decoder_modules for path in ran]
    assert in_decoder == sorted(in_decoder) and True in in_decoder and False in in_decoder
    tuned = prepare_for_tuning(model, "decoder", CoLoRAConfig())
    trained = {path.split(".")[0] for path, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained == {path for path, module in model.named_children() if path in model.decoder_modules}


@every_backbone
def test_initial_weights_are_pytorchs_own(name):
    """Weights of convolutions are uniform, all else is constant. Weights that a file lacks get the same."""
    model = tiny_backbone(name, trained=False)
    same, other = tiny_backbone(name, trained=False), tiny_backbone(name, seed=1, trained=False)
    assert state_is_equal(model, same) and not state_is_equal(model, other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(torch.nan)
    other.apply(other._init_weights)
    constants = set(model.state_dict())
    for path, module in other.named_modules():
        if isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())  # kaiming_uniform(a=sqrt(5))
            assert module.weight.abs().max() <= bound, path
            if module.weight.numel() > 200:
                assert module.weight.abs().max() > 0.9 * bound, path
                assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2), path
            assert module.bias is None or module.bias.abs().max() <= bound, path
            constants -= {f"{path}.weight", f"{path}.bias"}
    weights, again = model.state_dict(), other.state_dict()
    assert constants and all(torch.equal(weights[path], again[path]) for path in constants)


@torch.no_grad()
@rgb_backbones
def test_tiles_see_the_means_of_the_whole_image(name):
    model = tiny_backbone(name)
    assert any(averages_over_pixels(module) for module in model.modules())
    noise = torch.rand(3, 64, 112, generator=torch.Generator().manual_seed(0))
    image = (noise + torch.linspace(0, 1, 112)) / 2  # dark at the left and bright at the right
    whole = restore_image(model, image, tile=None)
    errors = {
        pooling: (restore_image(model, image, tile=64, overlap=48, pooling=pooling) - whole).abs().max().item()
        for pooling in ("picture", "tile")
    }
    assert errors["picture"] < errors["tile"] / 2


# --- with adapters --------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_backbone
def test_unmerged_merged_and_reloaded_adapters_agree(name, tmp_path):
    bare = tiny_backbone(name)
    x, _ = images(bare, 24, 19)
    fresh = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=1))
    assert torch.equal(fresh(x).reconstruction, bare(x).reconstruction)
    model = adapted(bare).eval()
    layers = [module for module in model.modules() if isinstance(module, CoLoRALayer)]
    dense = sum(len(layer.colora_dense) for layer in layers)
    assert 0 < dense < len(layers) < len(adaptable_layers(bare))
    expected = model(x).reconstruction
    assert not torch.allclose(expected, bare(x).reconstruction, atol=1e-2)

    model.save_pretrained(tmp_path)
    torch.manual_seed(2)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    assert torch.equal(loaded(x).reconstruction, expected)

    model.merge_adapter()
    assert all(layer.merged for layer in layers)
    torch.testing.assert_close(model(x).reconstruction, expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x).reconstruction, expected, rtol=0, atol=1e-5)
    restored = model.unload().state_dict()
    for path, tensor in bare.state_dict().items():
        torch.testing.assert_close(restored[path], tensor, rtol=0, atol=1e-6)

    merged = loaded.merge_and_unload()
    assert merged.state_dict().keys() == bare.state_dict().keys()
    torch.testing.assert_close(merged(x).reconstruction, expected, rtol=0, atol=1e-5)


@every_backbone
def test_an_adapter_names_the_backbone_as_its_base(name, tmp_path):
    model = adapted(tiny_backbone(name))
    model.save_pretrained(tmp_path)
    base = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    module, _, class_name = BACKBONES[name][2].rpartition(".")
    assert base == {"base_model_class": class_name, "parent_library": module}


@torch.no_grad()
@every_backbone
def test_each_sample_of_a_batch_may_have_its_own_adapter(name):
    bare = tiny_backbone(name)
    x, _ = images(bare, 24, 16, batch=3)
    model = adapted(bare).eval()
    mixed = model(x, adapter_names=["default", "__base__", "default"]).reconstruction
    own, plain = model(x).reconstruction, bare(x).reconstruction
    torch.testing.assert_close(mixed, torch.stack([own[0], plain[1], own[2]]), rtol=0, atol=1e-5)


@every_backbone
def test_contributions_in_the_configuration_decide_the_ranks(name):
    bare = tiny_backbone(name)
    layers = list(adaptable_layers(bare))
    bare.config.colora_contributions = {path: float(i + 1) for i, path in enumerate(layers)}
    ranks = get_peft_model(bare, CoLoRAConfig(parameter_budget=0.2)).peft_config["default"].ranks
    even = get_peft_model(tiny_backbone(name), CoLoRAConfig(parameter_budget=0.2)).peft_config["default"].ranks
    half = layers[len(layers) // 2 :]
    assert ranks != even and sum(ranks[path] for path in half) > sum(even[path] for path in half)


@rgb_backbones
@pytest.mark.filterwarnings("ignore:The loss does not reach", "ignore:The attributions")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_of_every_estimator_give_ranks_within_the_budget(name, estimator):
    model, settings, end = tiny_backbone(name).double(), None, None
    before = copy.deepcopy(model)
    if estimator == "probe":
        settings = ProbeSettings(num_steps=2, num_path_steps=2)
    elif estimator == "faig":
        settings = FaigSettings(num_path_steps=16)
        torch.manual_seed(1)
        end = {path: value + 0.02 * torch.randn_like(value) for path, value in model.state_dict().items()}
    result = estimate_contributions(
        model, [batch(model)], restoration_loss, estimator, end_state=end, settings=settings
    )
    if estimator == "faig":  # summed over all parameters, the difference of the losses at the ends of the path
        assert result.completeness_error < 0.02
    assert list(result.scores) == list(adaptable_layers(model)) and min(result.scores.values()) > 0
    assert state_is_equal(model, before)
    tuned = get_peft_model(model, CoLoRAConfig(contributions=result.scores, parameter_budget=0.1))
    assert len(set(tuned.peft_config["default"].ranks.values())) > 2
    assert 0.08 < trained_parameters(tuned)["trainable_ratio"] <= 0.1


@every_backbone
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # the name that 4.57 has, too
@pytest.mark.parametrize("adapters", ["none", "before", "after"])
def test_gradient_checkpointing_changes_no_gradient(name, adapters):
    """With adapters put on before and after it is enabled, too; each block runs a second time in the backward pass."""
    gradients, calls = [], []
    for checkpointed in (False, True):
        model = tiny_backbone(name)
        x, labels = images(model, 16, 8, batch=1)
        if adapters == "before":
            model = adapted(model)
        if checkpointed:
            model.gradient_checkpointing_enable()
        if adapters == "after":
            model = adapted(model)
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        assert {type(block).__name__ for block in blocks} == set(BACKBONES[name][0]._no_split_modules)
        for block in blocks:
            next(block.children()).register_forward_hook(lambda *_: calls.append(1))
        model.train()(x, labels=labels).loss.backward()
        gradients.append({path: p.grad for path, p in model.named_parameters() if p.requires_grad})
    assert len(calls) == len(blocks) + 2 * len(blocks)
    plain, checkpointed = gradients
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    for path, gradient in plain.items():
        torch.testing.assert_close(checkpointed[path], gradient, rtol=0, atol=1e-7)
