"""NAFNet: the published sizes, and the same function as a few independent lines."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny_networks import tiny_nafnet

from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration
from colora_peft.models.nafnet.modeling_nafnet import NAFBlock


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
        ({"middle_blocks": -1}, "middle_blocks"),
        ({"encoder_blocks": (1, -1), "decoder_blocks": (1, 1)}, "encoder_blocks"),
    ],
)
def test_impossible_configuration_is_refused(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        NAFNetConfig(**settings)


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


def test_padding_is_by_zeros():
    padded = tiny_nafnet().pad(torch.ones(1, 3, 5, 7))
    assert padded.shape == (1, 3, 8, 8) and padded.sum() == 3 * 5 * 7


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
