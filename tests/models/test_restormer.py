"""Restormer: official names, and the same function as a few independent lines; traced, and with adapters."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from support.examples import EXAMPLES
from support.official_shapes import PUBLISHED_RESTORMERS, random_weights, restormer_shapes
from support.padding import check_reflection
from support.tiny_networks import TINY_RESTORMER, tiny_restormer
from transformers import AutoModelForImageToImage

from colora_peft.data.pairs import PairedImageFolder
from colora_peft.evaluation.evaluate import evaluate
from colora_peft.export import ExportSettings, export_network
from colora_peft.models import RestormerConfig, RestormerForImageRestoration
from colora_peft.models.restormer.modeling_restormer import GatedGelu, LayerNorm

VARIANTS = {
    "norms with bias": {},
    "norms without": {"norm_bias": False},
    "biases": {"bias": True},
    "grey": {"norm_bias": False, "num_channels": 1, "num_output_channels": 1},
    "dual pixel": {"num_channels": 6, "num_output_channels": 3, "dual_pixel": True, "bias": True},
}
TINY_SHAPES = {"width": 8, "blocks": (1, 1, 1, 1), "refinement": 1}

variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


# --- names and sizes ----------------------------------------------------------------------------------------------


@variants
def test_names_and_shapes_are_the_official_ones(settings):
    weights = random_weights(restormer_shapes(**TINY_SHAPES, **settings))
    model = tiny_restormer(**settings)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    model.load_state_dict(weights, strict=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("settings", "parameters"), PUBLISHED_RESTORMERS.values(), ids=PUBLISHED_RESTORMERS.keys())
def test_published_networks_have_their_size(settings, parameters):
    with torch.device("meta"):
        model = RestormerForImageRestoration(RestormerConfig(**settings))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == restormer_shapes(**settings)


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"num_channels": 0}, "num_channels"),
        ({"width": 7}, "width"),
        ({"num_blocks": (1, 1, 1)}, "num_blocks"),
        ({"num_blocks": (1, 1, 1, -1)}, "num_blocks"),
        ({"num_heads": (1, 2)}, "num_heads"),
        ({"num_heads": (1, 2, 4, 5)}, "5 heads at level 4"),
        ({"ffn_expansion": 0.01}, "ffn_expansion"),
        ({"num_channels": 6, "num_output_channels": 3}, "dual_pixel"),
    ],
)
def test_impossible_configuration_is_refused(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        RestormerConfig(**settings)


def test_dual_pixel_images_have_two_views():
    assert RestormerConfig(num_channels=6, dual_pixel=True).num_output_channels == 3
    assert tiny_restormer().skip_conv is None


# --- the function ---------------------------------------------------------------------------------------------------


def reference_block(x, w, heads):
    """The block as the paper draws it, written out from the weights `w`."""

    def conv(x, name):
        weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
        groups = len(weight) if weight.shape[2] == 3 else 1
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=groups)

    def norm(x, name):
        variance, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
        bias = w.get(f"{name}.body.bias")
        centred = x if bias is None else x - mean
        y = centred / (variance + 1e-5).sqrt() * w[f"{name}.body.weight"][:, None, None]
        return y if bias is None else y + bias[:, None, None]

    shape, (batch, channels) = x.shape, x.shape[:2]
    qkv = conv(conv(norm(x, "norm1"), "attn.qkv"), "attn.qkv_dwconv")
    q, k, v = qkv.reshape(batch, 3, heads, channels // heads, -1).unbind(1)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * w["attn.temperature"]
    x = x + conv((scores.softmax(-1) @ v).reshape(shape), "attn.project_out")
    left, right = conv(conv(norm(x, "norm2"), "ffn.project_in"), "ffn.dwconv").chunk(2, 1)
    return x + conv(F.gelu(left) * right, "ffn.project_out")


def reference_network(x, weights):
    """For images whose sides are multiples of 8."""

    def stage(x, name):
        for i in range(sum(key.startswith(f"{name}.") and key.endswith("temperature") for key in weights)):
            own = {k.removeprefix(f"{name}.{i}."): v for k, v in weights.items() if k.startswith(f"{name}.{i}.")}
            x = reference_block(x, own, len(own["attn.temperature"]))
        return x

    def conv(x, name):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[2] // 2)

    first = conv(x, "patch_embed.proj")
    skips = [stage(first, "encoder_level1")]
    for level in (1, 2):
        down = F.pixel_unshuffle(conv(skips[-1], f"down{level}_{level + 1}.body.0"), 2)
        skips.append(stage(down, f"encoder_level{level + 1}"))
    y = stage(F.pixel_unshuffle(conv(skips[-1], "down3_4.body.0"), 2), "latent")
    for level in (3, 2):
        y = torch.cat([F.pixel_shuffle(conv(y, f"up{level + 1}_{level}.body.0"), 2), skips[level - 1]], 1)
        y = stage(conv(y, f"reduce_chan_level{level}"), f"decoder_level{level}")
    y = torch.cat([F.pixel_shuffle(conv(y, "up2_1.body.0"), 2), skips[0]], 1)
    y = stage(stage(y, "decoder_level1"), "refinement")
    if "skip_conv.weight" in weights:
        return conv(y + conv(first, "skip_conv"), "output")
    return conv(y, "output") + x


@torch.no_grad()
@variants
@pytest.mark.parametrize("size", [(8, 8), (40, 24)])
def test_equals_an_independent_implementation(settings, size):
    model = tiny_restormer(**settings)
    x = torch.rand(2, model.config.num_channels, *size)
    torch.testing.assert_close(model(x).reconstruction, reference_network(x, model.state_dict()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"norm_bias": False, "bias": True}], ids=["defaults", "other norm, biases"])
def test_gradients_equal_those_of_an_independent_implementation(settings):
    model = tiny_restormer(**settings).double()
    x, labels = torch.rand(2, 3, 24, 16).double(), torch.rand(2, 3, 24, 16).double()
    model(x, labels=labels).loss.backward()
    own = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    F.l1_loss(reference_network(x, own), labels).backward()
    for name, parameter in model.named_parameters():
        assert own[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-8, atol=1e-12, msg=name)


def test_the_gate_has_its_gradient():
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GatedGelu.apply, x)
    left, right = x.chunk(2, 1)
    torch.testing.assert_close(GatedGelu.apply(x), F.gelu(left) * right)


def test_the_norm_without_bias_keeps_the_mean():
    x = torch.randn(1, 5, 2, 3) + 3
    normed = LayerNorm(5, bias=False)(x)
    torch.testing.assert_close(normed.var(1, correction=0), torch.ones(1, 2, 3), rtol=1e-3, atol=0)
    torch.testing.assert_close(normed.mean(1), x.mean(1) / x.std(1, correction=0), rtol=1e-3, atol=0)
    assert LayerNorm(5, bias=True)(x).mean(1).abs().max() < 1e-5


@pytest.mark.parametrize(("height", "width"), [(1, 2), (5, 16), (20, 9)])
def test_padding_is_by_reflection(height, width):
    check_reflection(lambda x, _: tiny_restormer().pad(x), height, width)


def gradients(model, x, labels):
    model.zero_grad()
    model(x, labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_modules_are_registered_in_the_order_in_which_they_run():
    model, ran = tiny_restormer(num_channels=6, dual_pixel=True), []
    leaves = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    for name, module in leaves.items():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(torch.rand(1, 6, 8, 8))
    assert ran == list(leaves)


# --- traced ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch_export", "onnx"])
def test_exported_once_it_restores_images_of_any_size(form, tmp_path):
    """One file for all sizes that `export_network` checks; some are fewer pixels than channels at the last level."""
    suffix = ".onnx" if form == "onnx" else ".pt2"
    model = tiny_restormer(num_blocks=(1, 0, 0, 1), num_refinement_blocks=0)  # tracing takes its time
    checks = export_network(model, tmp_path / f"restormer{suffix}", ExportSettings(form))
    assert len(checks) > 3 and max(check.max_difference for check in checks) < 1e-5


@pytest.mark.slow
def test_traced_as_one_graph_its_gradients_are_the_same():
    model, x, labels = tiny_restormer().train(), torch.rand(1, 3, 16, 24), torch.rand(1, 3, 16, 24)
    expected = gradients(model, x, labels)
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-6)


# --- with adapters ---------------------------------------------------------------------------------------------------


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
