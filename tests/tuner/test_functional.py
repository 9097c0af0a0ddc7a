"""The gradients of factors that are formed without that of the whole weight: equal to autograd's, for every case."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from colora_peft.tuner.functional import factors_save_time, run_with_factors, run_with_weight
from colora_peft.tuner.layer import CoLoRALayer

CASES = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear_no_bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1, stride=2), (2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 0), stride=(1, 2)), (2, 3, 6, 5)),
    "conv2d_no_bias": (lambda: nn.Conv2d(3, 4, 2, bias=False, stride=2), (2, 3, 6, 5)),
    "conv2d_dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2), (1, 3, 6, 5)),
    "conv2d_reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (1, 3, 4, 5)),
    "conv2d_circular": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), (1, 3, 4, 5)),
    "pointwise": (lambda: nn.Conv2d(4, 5, 1), (2, 4, 3, 5)),
    "pointwise_padded": (lambda: nn.Conv2d(4, 5, 1, padding=1, stride=2), (2, 4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (1, 2, 3, 2, 4)),
}
IMAGES = [name for name, (_, shape) in CASES.items() if len(shape) == 4]
RANK = 2


@pytest.fixture(
    params=[(name, False) for name in CASES] + [(name, True) for name in IMAGES],
    ids=[*CASES, *(f"{name}-channels_last" for name in IMAGES)],
)
def case(request):
    """(layer, up, down, x) in float64, all of which require gradients."""
    name, channels_last = request.param
    make, shape = CASES[name]
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    d = layer.weight.shape[0]
    up = torch.randn(d, RANK, dtype=torch.float64, requires_grad=True)
    down = torch.randn(RANK, layer.weight.numel() // d, dtype=torch.float64, requires_grad=True)
    return layer, up, down, x.requires_grad_()


def plainly(layer, up, down, x):
    return run_with_weight(layer, layer.weight + (up @ down).view(layer.weight.shape), x)


def test_output_is_bitwise_that_of_the_plain_way(case):
    assert torch.equal(run_with_factors(*case), plainly(*case))


def test_every_gradient_equals_autograds(case):
    layer, up, down, x = case
    inputs = [x, up, down, *layer.parameters()]
    direction = torch.randn_like(plainly(*case))
    expected = torch.autograd.grad(plainly(*case), inputs, direction)
    found = torch.autograd.grad(run_with_factors(*case), inputs, direction)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_each_gradient_alone(case):
    layer, up, down, x = case
    tensors = [x, up, down, *layer.parameters()]
    for wanted in tensors:
        for tensor in tensors:
            tensor.requires_grad_(tensor is wanted)
        (found,) = torch.autograd.grad(run_with_factors(*case).square().sum(), wanted)
        (expected,) = torch.autograd.grad(plainly(*case).square().sum(), wanted)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "conv2d", "pointwise"])
def test_numerical_and_second_derivatives(name):
    torch.manual_seed(0)
    make, shape = CASES[name]
    layer = make().double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    d = layer.weight.shape[0]
    up = torch.randn(d, RANK, dtype=torch.float64, requires_grad=True)
    down = torch.randn(RANK, layer.weight.numel() // d, dtype=torch.float64, requires_grad=True)
    inputs = (up, down, x)
    assert gradcheck(lambda *tensors: run_with_factors(layer, *tensors), inputs)
    assert gradgradcheck(lambda *tensors: run_with_factors(layer, *tensors), inputs)


def test_gradients_of_each_sample_by_vmap():
    layer, x = nn.Conv2d(3, 4, 3).requires_grad_(False), torch.randn(5, 3, 6, 6)
    up, down = torch.randn(4, RANK), torch.randn(RANK, 27)

    def loss(up, sample):
        return run_with_factors(layer, up, down, sample[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(up, x)
    for sample, gradient in zip(x, each, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(loss)(up, sample), rtol=1e-4, atol=1e-4)


def adapted(bare, rank):
    layer = CoLoRALayer(copy.deepcopy(bare).requires_grad_(False))
    layer.update_layer("default", rank, 3.0, init_weights=False)
    layer.set_adapter("default")
    return layer


def largest_kept_for_backward(layer, x):
    """Numbers in the largest tensor besides `x` and parameters that autograd keeps for the backward pass."""
    known = {tensor.data_ptr() for tensor in (x, *layer.parameters())}
    sizes = [0]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(t.numel() if t.data_ptr() not in known else 0), t)[1], lambda t: t
    ):
        layer(x)
    return max(sizes)


def test_a_layer_in_training_keeps_no_weight_for_the_backward_pass():
    """The memory law: nothing of the weight's size, and nothing of the image's besides the input."""
    bare, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 16, 16, requires_grad=True)
    layer = adapted(bare, rank=2)
    assert factors_save_time(layer.base_layer, 2, x)
    assert largest_kept_for_backward(layer, x) <= 2 * 64 * 9
    layer.eval()  # the plain way, for comparison
    assert largest_kept_for_backward(layer, x) == 64 * 64 * 9


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class StandardizedConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, (weight - weight.mean()) / weight.std(), bias)


def patched(conv):
    conv._conv_forward = lambda x, weight, bias: 2 * nn.functional.conv2d(x, weight, bias)
    return conv


PLAIN_WAY = {
    "grouped": lambda: nn.Conv2d(64, 64, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(64, 64, 2),
    "subclass": lambda: DoubledConv(64, 64, 3),
    "same": lambda: nn.Conv2d(64, 64, 3, padding="same"),
    "thin": lambda: nn.Conv2d(4, 4, 3),
    "standardized": lambda: StandardizedConv(64, 64, 3),
    "patched": lambda: patched(nn.Conv2d(64, 64, 3)),
    "hooked": lambda: nn.Conv2d(64, 64, 3),
}


@pytest.mark.parametrize("kind", PLAIN_WAY)
def test_layers_that_go_the_plain_way_get_the_same_gradients(kind):
    torch.manual_seed(0)
    bare = PLAIN_WAY[kind]()
    if kind == "hooked":
        bare.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(2, bare.weight.shape[1] * getattr(bare, "groups", 1), 8, 8)
    layer = adapted(bare, rank=1)
    assert not factors_save_time(layer.base_layer, 1, x)
    gradients = []
    for mode in (True, False):
        layer.zero_grad()
        layer.train(mode)(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", PLAIN_WAY)
@pytest.mark.parametrize("training", [False, True])
def test_adapted_layer_computes_as_its_base_would_with_that_weight(kind, training):
    """Also where a class computes with another weight than it stores: a new adapter changes nothing."""
    torch.manual_seed(0)
    bare = PLAIN_WAY[kind]()
    x = torch.randn(2, bare.weight.shape[1] * getattr(bare, "groups", 1), 8, 8)
    layer = adapted(copy.deepcopy(bare), rank=1)
    with torch.no_grad():
        bare.weight.copy_(layer.effective_weight())
    torch.testing.assert_close(layer.train(training)(x), bare(x))


def test_backward_hooks_of_the_base_layer_run():
    calls = []
    bare = nn.Conv2d(64, 64, 3)
    bare.register_full_backward_hook(lambda *_: calls.append(1))
    adapted(bare, rank=1).train()(torch.randn(1, 64, 8, 8, requires_grad=True)).sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("kind", [lambda: nn.Linear(80, 90), lambda: nn.Conv2d(64, 64, 3, padding=1)])
def test_training_and_evaluation_mode_agree(kind):
    """Training takes the factored way, evaluation the plain one."""
    torch.manual_seed(0)
    bare = kind()
    x = torch.randn(2, 5, 80) if isinstance(bare, nn.Linear) else torch.randn(2, 64, 8, 8)
    layer = adapted(bare, rank=2)
    assert factors_save_time(layer.base_layer, 2, x)
    results = []
    for mode in (True, False):
        layer.zero_grad()
        output = layer.train(mode)(x)
        output.square().sum().backward()
        results.append([output.detach(), *[p.grad.clone() for p in layer.parameters() if p.requires_grad]])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.real_sizes
def test_factors_are_trained_alone_only_where_that_pays():
    """Enough work, and few enough multiplications in the factors."""
    wide, thin = nn.Conv2d(256, 512, 1), nn.Conv2d(32, 64, 1)
    patch, image = torch.empty(1, 256, 16, 16), torch.empty(4, 256, 32, 32)
    assert factors_save_time(wide, 12, image) and not factors_save_time(wide, 12, patch)
    assert not factors_save_time(wide, 100, image)
    assert not factors_save_time(thin, 1, torch.empty(2, 32, 256, 256))
    strided = nn.Conv2d(256, 512, 2, stride=2)
    assert factors_save_time(strided, 12, image) and not factors_save_time(strided, 12, patch)
    assert not factors_save_time(wide, 12, image.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not factors_save_time(wide, 12, image)
    linear = nn.Linear(256, 512)
    assert factors_save_time(linear, 12, torch.empty(2, 4096, 256))
    assert not factors_save_time(linear, 12, torch.empty(8, 256)) and not factors_save_time(
        linear, 12, torch.empty(256)
    )


@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d_reflect"])
def test_forward_derivative_is_that_of_the_whole_weight(case):
    make, shape = CASES[case]
    layer = make().double().requires_grad_(False)
    d, k = layer.weight.shape[0], layer.weight[0].numel()
    points = [torch.randn(size, dtype=torch.double) for size in (shape, (d, 2), (2, k))]
    tangents = [torch.randn_like(point) for point in points]

    def factored(x, up, down):
        return run_with_factors(layer, up, down, x)

    def whole(x, up, down):
        return run_with_weight(layer, layer.weight + (up @ down).view_as(layer.weight), x)

    actual, expected = (torch.func.jvp(run, tuple(points), tuple(tangents)) for run in (factored, whole))
    torch.testing.assert_close(actual, expected)
