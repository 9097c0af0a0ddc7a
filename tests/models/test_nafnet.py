"""NAFNet: official names, any image size, and the same function as a few independent lines."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.tiny_networks import TINY_NAFNET, tiny_nafnet
from transformers import AutoConfig, AutoModel, AutoModelForImageToImage

import colora_peft.models  # noqa: F401 - registers the backbones
from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration
from colora_peft.models.nafnet.modeling_nafnet import NAFBlock


def official_block(prefix, channels):
    """Shapes of one block in the state dict of github.com/megvii-research/NAFNet."""
    c = channels
    shapes = {"beta": (1, c, 1, 1), "gamma": (1, c, 1, 1)}
    for norm in ("norm1", "norm2"):
        shapes |= {f"{norm}.weight": (c,), f"{norm}.bias": (c,)}
    convolutions = {
        "conv1": (2 * c, c, 1, 1), "conv2": (2 * c, 1, 3, 3), "conv3": (c, c, 1, 1),
        "sca.1": (c, c, 1, 1), "conv4": (2 * c, c, 1, 1), "conv5": (c, c, 1, 1),
    }  # fmt: skip
    for name, shape in convolutions.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def official_state_dict():
    """Of the tiny network: width 8, enc_blk_nums [1, 1], middle_blk_num 1, dec_blk_nums [1, 1]."""
    shapes = {
        "intro.weight": (8, 3, 3, 3), "intro.bias": (8,), "ending.weight": (3, 8, 3, 3), "ending.bias": (3,),
        "downs.0.weight": (16, 8, 2, 2), "downs.0.bias": (16,), "downs.1.weight": (32, 16, 2, 2),
        "downs.1.bias": (32,), "ups.0.0.weight": (64, 32, 1, 1), "ups.1.0.weight": (32, 16, 1, 1),
    }  # fmt: skip
    blocks = {"encoders.0.0": 8, "encoders.1.0": 16, "middle_blks.0": 32, "decoders.0.0": 16, "decoders.1.0": 8}
    for prefix, channels in blocks.items():
        shapes |= official_block(prefix, channels)
    return shapes


# --- names and sizes ----------------------------------------------------------------------------------------------


def test_names_and_shapes_are_the_official_ones():
    assert {name: tuple(tensor.shape) for name, tensor in tiny_nafnet().state_dict().items()} == official_state_dict()


def test_official_weights_load_strictly():
    weights = {name: torch.rand(shape) for name, shape in official_state_dict().items()}
    model = tiny_nafnet()
    model.load_state_dict(weights, strict=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    del weights["ups.1.0.weight"]
    with pytest.raises(RuntimeError, match=r"ups\.1\.0\.weight"):
        model.load_state_dict(weights, strict=True)


def test_default_configuration_is_the_published_width_32_network():
    with torch.device("meta"):
        model = NAFNetForImageRestoration(NAFNetConfig())
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 17.1


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"width": 0}, "width"),
        ({"num_channels": 0}, "num_channels"),
        ({"encoder_blocks": (1,), "decoder_blocks": (1, 1)}, "stages"),
        ({"middle_blocks": -1}, "negative"),
    ],
)
def test_impossible_configuration_is_refused(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        NAFNetConfig(**settings)


# --- the function ---------------------------------------------------------------------------------------------------


def layer_norm(x, weight, bias):
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    return weight[:, None, None] * (x - mean) / (variance + 1e-6).sqrt() + bias[:, None, None]


def reference_block(x, w):
    """The block as the paper draws it, written out from the weights `w`."""
    y = F.conv2d(layer_norm(x, w["norm1.weight"], w["norm1.bias"]), w["conv1.weight"], w["conv1.bias"])
    y = F.conv2d(y, w["conv2.weight"], w["conv2.bias"], padding=1, groups=y.shape[1])
    half = y.shape[1] // 2
    y = y[:, :half] * y[:, half:]
    attention = torch.einsum("oi,bi->bo", w["sca.1.weight"][:, :, 0, 0], y.mean((2, 3))) + w["sca.1.bias"]
    y = F.conv2d(y * attention[:, :, None, None], w["conv3.weight"], w["conv3.bias"])
    x = x + w["beta"] * y
    y = F.conv2d(layer_norm(x, w["norm2.weight"], w["norm2.bias"]), w["conv4.weight"], w["conv4.bias"])
    return x + w["gamma"] * F.conv2d(y[:, :half] * y[:, half:], w["conv5.weight"], w["conv5.bias"])


def reference_network(x, weights):
    def block(x, prefix):
        return reference_block(x, {k[len(prefix) + 1 :]: v for k, v in weights.items() if k.startswith(f"{prefix}.")})

    def down(x, i):
        return F.conv2d(x, weights[f"downs.{i}.weight"], weights[f"downs.{i}.bias"], stride=2)

    def up(x, i):
        return F.pixel_shuffle(F.conv2d(x, weights[f"ups.{i}.0.weight"]), 2)

    first = block(F.conv2d(x, weights["intro.weight"], weights["intro.bias"], padding=1), "encoders.0.0")
    second = block(down(first, 0), "encoders.1.0")
    y = block(down(second, 1), "middle_blks.0")
    y = block(up(y, 0) + second, "decoders.0.0")
    y = block(up(y, 1) + first, "decoders.1.0")
    return x + F.conv2d(y, weights["ending.weight"], weights["ending.bias"], padding=1)


@torch.no_grad()
def test_equals_an_independent_implementation():
    model, x = tiny_nafnet(), torch.rand(2, 3, 8, 12)
    torch.testing.assert_close(model(x).reconstruction, reference_network(x, model.state_dict()), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (4, 9), (8, 4)])
def test_any_size_equals_the_zero_padded_multiple(height, width):
    model, x = tiny_nafnet(), torch.rand(1, 3, height, width)
    padded = torch.zeros(1, 3, math.ceil(height / 4) * 4, math.ceil(width / 4) * 4)
    padded[..., :height, :width] = x
    restored = model(x).reconstruction
    assert restored.shape == x.shape
    torch.testing.assert_close(restored, model(padded).reconstruction[..., :height, :width], rtol=0, atol=1e-6)


@torch.no_grad()
def test_labels_give_the_mean_absolute_error():
    model, x, labels = tiny_nafnet(), torch.rand(2, 3, 5, 6), torch.rand(2, 3, 5, 6)
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, (output.reconstruction - labels).abs().mean())
    assert model(x).loss is None
    loss, restored = model(x, labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(restored, output.reconstruction)
    (alone,) = model(x, return_dict=False)
    assert torch.equal(alone, output.reconstruction)


def test_wrong_shapes_are_refused():
    model = tiny_nafnet()
    for shape in [(1, 4, 8, 8), (3, 8, 8)]:
        with pytest.raises(ValueError, match="pixel_values"):
            model(torch.rand(shape))
    with pytest.raises(ValueError, match="labels"):
        model(torch.rand(1, 3, 8, 8), labels=torch.rand(1, 3, 8, 9))


def gradients(model, x, labels):
    model.zero_grad()
    loss = model(x, labels=labels).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # the name that 4.57 has, too
def test_gradient_checkpointing_changes_no_number():
    model, x, labels = tiny_nafnet().train(), torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    calls = []
    for module in model.modules():
        if isinstance(module, NAFBlock):
            module.conv3.register_forward_hook(lambda *_: calls.append(1))
    expected_loss, expected = gradients(model, x, labels)
    assert len(calls) == 5
    model.gradient_checkpointing_enable()
    loss, checkpointed = gradients(model, x, labels)
    assert len(calls) == 5 + 10  # each of the five blocks ran twice
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-7)


@torch.no_grad()
def test_channels_last_changes_no_number():
    model, x = tiny_nafnet(), torch.rand(2, 3, 9, 8)
    expected = model(x).reconstruction
    restored = model.to(memory_format=torch.channels_last)(x).reconstruction
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-5)


# --- initial weights ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_block_starts_as_the_identity():
    x = torch.rand(1, 3, 4, 4)
    model = tiny_nafnet(trained=False)
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, NAFBlock)}
    assert len(blocks) == 5
    for block in blocks.values():
        features = torch.rand(1, block.beta.shape[1], 4, 4)
        assert torch.equal(block(features), features)
        block.beta.fill_(1)
        assert not torch.equal(block(features), features)
    assert model(x).reconstruction.isfinite().all()


def test_initial_weights_are_pytorchs_own():
    torch.manual_seed(0)
    model = AutoModelForImageToImage.from_config(NAFNetConfig(**{**TINY_NAFNET, "width": 32}))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())  # kaiming_uniform(a=sqrt(5))
            largest = module.weight.abs().max().item()
            assert 0.9 * bound < largest <= bound, name
            # Uniform in [-bound, bound]: standard deviation bound / sqrt(3).
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2), name


def test_same_seed_same_weights():
    first, same, other = tiny_nafnet(0).state_dict(), tiny_nafnet(0).state_dict(), tiny_nafnet(1).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not torch.equal(first["intro.weight"], other["intro.weight"])


# --- Hugging Face ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageToImage])
def test_saved_network_loads_through_the_auto_classes(auto, tmp_path):
    model, x = tiny_nafnet(), torch.rand(1, 3, 8, 8)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, NAFNetConfig)
    assert (config.width, config.encoder_blocks, config.pads_to_multiple) == (8, [1, 1], 4)
    torch.manual_seed(1)
    loaded = auto.from_pretrained(tmp_path)
    assert isinstance(loaded, NAFNetForImageRestoration)
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(loaded(x).reconstruction, model(x).reconstruction, rtol=0, atol=1e-6)


def test_half_precision_weights_load_as_the_float32_their_config_says(tmp_path):
    model = tiny_nafnet()
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(half))  # which it empties
    loaded = AutoModelForImageToImage.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, half[name].float()), name


def test_importing_the_backbones_alone_is_enough(tmp_path):
    tiny_nafnet().save_pretrained(tmp_path)
    code = (
        "import sys, colora_peft.models; from transformers import AutoModelForImageToImage; "
        f"model = AutoModelForImageToImage.from_pretrained({str(tmp_path)!r}); print(type(model).__module__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "colora_peft.models.nafnet.modeling_nafnet"
