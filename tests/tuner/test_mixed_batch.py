"""One batch, another adapter for each sample: every sample comes out as if it were alone with its adapter."""

import copy
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from support.tiny_networks import network, tiny_nafnet

from colora_peft import CoLoRAConfig

pytestmark = pytest.mark.usefixtures("grad_mode")

RAIN = {"conv": 2, "up": 1000, "head": 0, "blocks.0.conv": 1000}


def adapted(**rain):
    bare, x = network()
    settings = {"init_weights": False}
    model = get_peft_model(
        copy.deepcopy(bare), CoLoRAConfig(ranks=1, exclude_modules=["up", "gate"], **settings), "haze"
    )
    model.add_adapter("rain", CoLoRAConfig(ranks=dict(RAIN), **settings, **rain))
    return bare.eval(), model.eval(), torch.rand(5, *x.shape[1:])


def alone(bare, model, x, names):
    outputs = []
    for sample, name in zip(x, names, strict=True):
        if name == "__base__":
            outputs.append(bare(sample[None]))
        else:
            model.set_adapter(name)
            outputs.append(model(sample[None]))
    return torch.cat(outputs)


NAMES = [
    ["haze", "rain", "__base__", "rain", "haze"],
    ["rain"] * 5,
    ["__base__"] * 5,
    ["__base__", "__base__", "haze", "haze", "haze"],
]


@pytest.mark.parametrize("names", NAMES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_each_sample_gets_its_adapter(names, channels_last):
    bare, model, x = adapted()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    expected = alone(bare, model, x, names)
    for active in ("haze", "rain"):  # whichever is active does not matter
        model.set_adapter(active)
        torch.testing.assert_close(model(x, adapter_names=names), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x), alone(bare, model, x, ["rain"] * 5), rtol=0, atol=1e-5)


def test_nafnet_with_keyword_arguments():
    bare = tiny_nafnet()
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(parameter_budget=0.3, init_weights=False), "haze").eval()
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        mixed = model(pixel_values=x, adapter_names=["__base__", "haze"]).reconstruction
        torch.testing.assert_close(mixed[:1], bare(x[:1]).reconstruction, rtol=0, atol=1e-5)
        torch.testing.assert_close(mixed[1:], model(x[1:]).reconstruction, rtol=0, atol=1e-5)


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="this PEFT runs whole modules of inactive adapters as the base"
)
def test_whole_modules_of_each_adapter():
    bare, model, x = adapted(modules_to_save=["gate"])
    model.base_model.model.gate.modules_to_save["rain"].weight.data.add_(1.0)
    names = NAMES[0]
    expected = alone(bare, model, x, names)
    torch.testing.assert_close(model(x, adapter_names=names), expected, rtol=0, atol=1e-5)


def test_none_is_the_active_adapter_and_disabled_is_the_base():
    bare, model, x = adapted()
    assert torch.equal(model(x, adapter_names=None), model(x))
    names = ["haze", "rain", "haze", "haze", "haze"]
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=names), bare(x))
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(x, adapter_names=names), bare(x))


def test_a_forward_pass_that_fails_leaves_no_hook_behind():
    _, model, x = adapted()
    with pytest.raises(RuntimeError):
        model(torch.rand(5, 4, 8, 8), adapter_names=["haze"] * 5)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (lambda m: None, ["haze"] * 4, "4 but layer 'conv' receives 5 samples"),
        (lambda m: None, ["haze", "fog", "snow", "rain", "rain"], "fog, snow.*haze, rain"),
        (lambda m: m.train(), ["haze"] * 5, "model.eval"),
        (lambda m: m.merge_adapter(), ["haze"] * 5, "unmerge_adapter"),
    ],
)
def test_what_cannot_be_mixed_is_said(change, names, message):
    _, model, x = adapted()
    change(model)
    with pytest.raises(ValueError, match=message):
        model(x, adapter_names=names)


@pytest.mark.parametrize("adapter_names", ["haze", []])
def test_names_must_be_a_list_of_some(adapter_names):
    bare, x = network()
    model = get_peft_model(bare, CoLoRAConfig(ranks=1), "haze").eval()
    with pytest.raises(ValueError, match="give a list with one name for each sample"):
        model(x, adapter_names=adapter_names)


def test_each_thread_has_the_names_of_its_own_batch():
    bare, model, x = adapted()
    batches = [["haze", "rain", "__base__", "rain", "haze"], ["rain", "haze"], None]
    samples = [x, x[:2], x[:3]]
    model.set_adapter("rain")
    expected = [
        model(each, **({"adapter_names": names} if names else {}))
        for each, names in zip(samples, batches, strict=True)
    ]
    others = []
    with ThreadPoolExecutor(1) as pool:

        def call_in_the_middle(*_):
            handle.remove()
            others.append(pool.submit(lambda: model(samples[1], adapter_names=batches[1])).result())
            others.append(pool.submit(lambda: model(samples[2])).result())

        handle = model.get_base_model().blocks[0].norm.register_forward_hook(call_in_the_middle)
        output = model(samples[0], adapter_names=batches[0])
    for each, alone_output in zip([output, *others], expected, strict=True):
        assert torch.equal(each, alone_output)
