"""Restormer: official names, any image size, and the same function as a few independent lines."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.official_shapes import PUBLISHED_RESTORMERS, random_weights, restormer_shapes
from support.padding import check_reflection
from support.tiny_networks import TINY_RESTORMER, tiny_restormer
from transformers import AutoConfig, AutoModel, AutoModelForImageToImage

from colora_peft.export import ExportSettings, export_network
from colora_peft.models import RestormerConfig, RestormerForImageRestoration
from colora_peft.models.restormer.modeling_restormer import GatedGelu, LayerNorm, RestormerBlock, pad_by_reflection

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
        ({"num_blocks": (1, 1, 1, -1)}, "negative"),
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
    check_reflection(pad_by_reflection, height, width)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (16, 9)])
def test_any_size_equals_the_padded_multiple(height, width):
    model, x = tiny_restormer(), torch.rand(1, 3, height, width)
    restored = model(x).reconstruction
    assert restored.shape == x.shape
    whole = model(pad_by_reflection(x, model.config.pads_to_multiple)).reconstruction
    torch.testing.assert_close(restored, whole[..., :height, :width], rtol=0, atol=1e-6)


@torch.no_grad()
def test_labels_give_the_mean_absolute_error():
    model = tiny_restormer(num_channels=6, dual_pixel=True)
    x, labels = torch.rand(2, 6, 9, 8), torch.rand(2, 3, 9, 8)
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, (output.reconstruction - labels).abs().mean())
    assert model(x).loss is None
    loss, restored = model(x, labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(restored, output.reconstruction)
    assert len(model(x, return_dict=False)) == 1


def test_wrong_shapes_are_refused():
    model = tiny_restormer(num_channels=6, dual_pixel=True)
    for shape in [(1, 3, 8, 8), (6, 8, 8)]:
        with pytest.raises(ValueError, match="pixel_values"):
            model(torch.rand(shape))
    with pytest.raises(ValueError, match="labels"):
        model(torch.rand(1, 6, 8, 8), labels=torch.rand(1, 6, 8, 8))


def gradients(model, x, labels):
    model.zero_grad()
    model(x, labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # the name that 4.57 has, too
def test_gradient_checkpointing_changes_no_number():
    model, x, labels = tiny_restormer().train(), torch.rand(1, 3, 16, 8), torch.rand(1, 3, 16, 8)
    calls = []
    for module in model.modules():
        if isinstance(module, RestormerBlock):
            module.norm1.register_forward_hook(lambda *_: calls.append(1))
    expected = gradients(model, x, labels)
    assert len(calls) == 8
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, x, labels)
    assert len(calls) == 8 + 16  # each of the eight blocks ran twice
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-7)


@torch.no_grad()
def test_channels_last_changes_no_number():
    model, x = tiny_restormer(), torch.rand(2, 3, 9, 8)
    expected = model(x).reconstruction
    restored = model.to(memory_format=torch.channels_last)(x).reconstruction
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-5)


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


# --- initial weights, Hugging Face ----------------------------------------------------------------------------------


def test_initial_weights_are_pytorchs_own():
    torch.manual_seed(0)
    model = AutoModelForImageToImage.from_config(RestormerConfig(**TINY_RESTORMER))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())  # kaiming_uniform(a=sqrt(5))
            assert 0.8 * bound < module.weight.abs().max().item() <= bound, name
        elif isinstance(module, LayerNorm):
            assert (module.body.weight == 1).all() and (module.body.bias == 0).all(), name
    assert all((p == 1).all() for name, p in model.named_parameters() if name.endswith("temperature"))


@torch.no_grad()
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageToImage])
def test_saved_network_loads_through_the_auto_classes(auto, tmp_path):
    model, x = tiny_restormer(norm_bias=False), torch.rand(1, 3, 8, 8)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, RestormerConfig)
    assert (config.width, config.num_blocks, config.norm_bias, config.pads_to_multiple) == (8, [1, 1, 1, 1], False, 8)
    torch.manual_seed(1)
    loaded = auto.from_pretrained(tmp_path)
    assert isinstance(loaded, RestormerForImageRestoration)
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(loaded(x).reconstruction, model(x).reconstruction, rtol=0, atol=1e-6)
