"""The attention between channels: what it keeps in memory, the edges of its numbers, other people's project_out."""

import pytest
import torch
import torch.nn.functional as F

from colora_peft.models.restormer.attention_restormer import ChannelAttention, PixelMeans, cosines


def attention_layer(channels=8, heads=2, bias=False):
    torch.manual_seed(0)
    layer = ChannelAttention(channels, heads, bias)
    torch.nn.init.uniform_(layer.temperature, 0.5, 2)
    return layer


def straightforward(layer, x):
    q, k, v = layer.qkv_dwconv(layer.qkv(x)).reshape(len(x), 3, layer.heads, -1, x[0, 0].numel()).unbind(1)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * layer.temperature
    return layer.project_out((scores.softmax(-1) @ v).reshape(x.shape))


def kept_bytes(run, *inputs):
    """Bytes that autograd keeps for the backward pass, tensors that share memory counted once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(*inputs)
    del output
    return sum(kept.values())


def test_keeps_what_the_convolutions_leave_and_nothing_else_of_the_images_size():
    layer = attention_layer(channels=16, heads=2)
    x = torch.rand(3, 16, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    image = x.nbytes
    # The input, what qkv makes of it, what qkv_dwconv makes of that: 1 + 3 + 3; the rest is weights and C x C.
    assert 7 * image < kept_bytes(layer, x) < 7.2 * image
    # Normalised queries and keys, the copies that a product over heads takes, and the attended values come on top.
    assert kept_bytes(straightforward, layer, x) > 10 * image


@pytest.mark.parametrize("size", [(2, 3), (6, 7)], ids=["fewer pixels than channels", "more"])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_straightforward_way(size, bias):
    layer, x = attention_layer(bias=bias), torch.randn(3, 8, *size)
    torch.testing.assert_close(layer(x), straightforward(layer, x), rtol=0, atol=1e-6)


def test_a_layer_that_adds_a_bias_in_place_of_the_last_convolution_counts():
    """As adapters with biases of their own are."""
    layer, x = attention_layer(), torch.randn(2, 8, 6, 7)
    layer.project_out = torch.nn.Sequential(layer.project_out, torch.nn.Conv2d(8, 8, 1))
    torch.testing.assert_close(layer(x), straightforward(layer, x), rtol=0, atol=1e-6)


def similarity(queries, keys):
    return cosines(PixelMeans()(queries, keys))


def test_channels_of_zeros_have_no_similarity_and_finite_gradients():
    queries, keys = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    queries[:, 1] = 0
    queries.requires_grad_()
    found = similarity(queries, keys)
    assert (found[:, 0, 1] == 0).all() and found.abs().max() <= 1 + 1e-6
    found.square().sum().backward()
    assert queries.grad.isfinite().all()


def test_means_of_parts_of_the_image_average_to_those_of_the_whole():
    parts = torch.randn(4, 2, 3, 6, 8)  # queries and keys of two heads
    whole, left, right = (PixelMeans()(*part) for part in (parts, parts[..., :2], parts[..., 2:]))
    assert whole.shape == (2, 2, 3, 5)
    torch.testing.assert_close((left + 3 * right) / 4, whole)


def test_float16_sums_over_many_pixels_do_not_overflow():
    queries, keys = torch.rand(1, 4, 250, 400) + 1, torch.rand(1, 4, 250, 400) + 1
    assert torch.einsum("bihw,bjhw->bij", queries, keys).min() > torch.finfo(torch.float16).max
    expected = similarity(queries, keys)
    torch.testing.assert_close(similarity(queries.half(), keys.half()), expected, rtol=0, atol=3e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    layer, x = attention_layer(), torch.randn(2, 8, 12, 12)
    with torch.no_grad():
        expected = layer(x)
        restored = layer.to(dtype)(x.to(dtype))
    assert restored.dtype == dtype
    torch.testing.assert_close(restored.float(), expected, rtol=0, atol=0.02)


def test_autocast_stays_close():
    layer, x = attention_layer(), torch.randn(2, 8, 12, 12)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        restored = layer(x)
        restored.float().sum().backward()
    torch.testing.assert_close(restored.float(), expected, rtol=0, atol=0.02)
