"""examples/adapter_switch.py: a switch leaves no trace, strengths and blends are exact, what is wrong is named."""

import pytest
import torch
from peft import PeftModel
from support.adapter_switch import switching

from colora_peft.hub.networks import load_backbone


@pytest.fixture
def switch(tiny_nafnet, adapters):
    return switching.AdapterSwitch(tiny_nafnet, adapters)


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def network(folder):
    """The bare one, with its weights laid out as the switch has them: other layouts round otherwise."""
    return load_backbone(str(folder)).to(memory_format=torch.channels_last)


@torch.no_grad()
def run(model, image):
    return model(image).reconstruction


def at_work(switch, image, name, strength=1.0):
    with switch.at_work(name, strength) as model:
        return run(model, image)


def test_each_adapter_does_what_it_does_alone_whatever_was_at_work_before(switch, adapters, tiny_nafnet, image):
    bare = run(network(tiny_nafnet), image)
    alone = {
        name: run(PeftModel.from_pretrained(network(tiny_nafnet), path).eval(), image)
        for name, path in adapters.items()
    }
    assert not torch.equal(alone["haze"], alone["rain"]) and not torch.equal(alone["haze"], bare)
    for name in ("haze", "rain", "none", "haze", "none", "rain"):
        expected = bare if name == "none" else alone[name]
        assert torch.equal(at_work(switch, image, name), expected), name
        at_work(switch, image, "rain", 0.3)


def test_strength_runs_from_the_bare_network_through_the_adapter(switch, tiny_nafnet, image):
    assert torch.equal(at_work(switch, image, "haze", 0.0), run(network(tiny_nafnet), image))
    strong, once = at_work(switch, image, "haze", 1.5), at_work(switch, image, "haze")
    bare = at_work(switch, image, "none")
    assert (strong - bare).abs().mean() > (once - bare).abs().mean()


def test_a_blend_of_one_whole_and_nothing_is_that_one(switch, image):
    switch.blend(["haze", "rain"], [1.0, 0.0], "one")
    switch.blend(["haze", "rain"], [0.5, 0.5], "mean")
    assert torch.allclose(at_work(switch, image, "one"), at_work(switch, image, "haze"), atol=1e-6)
    layer = next(module for module in switch.model.modules() if isinstance(module, switching.CoLoRALayer))
    mean = layer.get_delta_weight("mean")
    assert torch.allclose(mean, (layer.get_delta_weight("haze") + layer.get_delta_weight("rain")) / 2, atol=1e-6)


def test_what_is_removed_is_gone_and_the_others_work(switch, image):
    haze = at_work(switch, image, "haze")
    switch.remove("rain")
    assert switch.names == ["haze"] and torch.equal(at_work(switch, image, "haze"), haze)
    with pytest.raises(ValueError, match="no adapter 'rain'; choose one of haze, none"):
        switch.activate("rain")


@pytest.mark.parametrize("strength", [-0.1, 1.6, float("nan")])
def test_impossible_strengths_are_refused(switch, strength):
    with pytest.raises(ValueError, match="must be between 0 and 1.5"):
        switch.activate("haze", strength)


def test_a_network_without_adapters_is_the_network(tiny_nafnet, image):
    bare = run(network(tiny_nafnet), image)
    assert torch.equal(at_work(switching.AdapterSwitch(tiny_nafnet, {}), image, "none"), bare)


def test_folders_without_adapters_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no adapters"):
        switching.adapters_in(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        switching.adapters_in(tmp_path / "nowhere")
