"""Each label runs its own adapter and no other; digests change with whatever changes the result."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.reading_networks import Cached, reading_network
from torch import nn

from colora_peft import CoLoRAConfig
from colora_peft.restore import AdapterSet, adapter_labels, adapters_in
from colora_peft.utils import writing_folder

WEIGHTS = "adapter_model.safetensors"


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)).eval()


def save_adapter(folder, seed, kind="colora"):
    config = CoLoRAConfig(ranks=2) if kind == "colora" else LoraConfig(r=2, target_modules=["0", "2"])
    model = get_peft_model(network(), config)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapters(tmp_path):
    folders = {"haze.v1": save_adapter(tmp_path / "haze.v1", 1), "rain": save_adapter(tmp_path / "rain", 2, "lora")}
    return {"none": "none", **folders}


def test_each_label_runs_its_own_adapter_in_any_order(adapters):
    loaded, x = AdapterSet(network(), adapters), torch.rand(1, 3, 9, 9)
    assert loaded.labels == ["none", "haze.v1", "rain"] and len({loaded.digest_of(one) for one in loaded.labels}) == 3
    expected = {"none": network()(x)}
    expected |= {label: PeftModel.from_pretrained(network(), adapters[label])(x) for label in ("haze.v1", "rain")}
    for label in ("rain", "none", "haze.v1", "none", "rain"):
        with torch.no_grad():
            torch.testing.assert_close(loaded.activate(label)(x), expected[label])
    assert not torch.allclose(expected["rain"], expected["haze.v1"])


def test_without_adapters_the_network_is_bare():
    bare = network()
    for adapters in ({"none": "none"}, {}):
        assert AdapterSet(bare, adapters).activate("none") is bare


def test_digests_follow_weights_and_settings_and_not_the_place(adapters, tmp_path):
    def digest(folder, base=None):
        return AdapterSet(base or network(), {"a": str(folder)}).digest_of("a")

    first = digest(adapters["rain"])
    (tmp_path / "rain").rename(tmp_path / "moved")
    assert digest(tmp_path / "moved") == first
    other = network()
    with torch.no_grad():
        other[0].bias += 1
    assert digest(tmp_path / "moved", other) != first
    file = tmp_path / "moved" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 99}))
    assert digest(tmp_path / "moved") != first
    assert digest(save_adapter(tmp_path / "again", 2, "lora")) == first


def test_an_adapter_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^There is no folder .*nothing with an adapter"):
        AdapterSet(network(), {"nothing": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match=rf"^The adapter {tmp_path} cannot be loaded: .*adapter_config\.json"):
        AdapterSet(network(), {"empty": str(tmp_path)})
    other = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    for kind in ("colora", "lora"):
        with pytest.raises(ValueError, match=rf"^The adapter .*{kind} cannot be loaded: "):
            AdapterSet(other, {"a": save_adapter(tmp_path / kind, 0, kind)})


@pytest.mark.parametrize("first", [[], ["mine"]])
def test_an_adapter_of_another_network_of_the_same_shape_is_refused(tmp_path, first):
    other, mine, theirs = network(), network(), tmp_path / "theirs"
    with torch.no_grad():
        other[0].weight += 0.1
    model = get_peft_model(other, CoLoRAConfig(ranks=2))
    model.save_pretrained(theirs)
    adapters = {label: save_adapter(tmp_path / label, 1) for label in first} | {"theirs": str(theirs)}
    with pytest.raises(ValueError, match=rf"^The adapter {theirs} cannot be loaded: .*trained on another network"):
        AdapterSet(mine, adapters)


@pytest.mark.parametrize("kind", ["colora", "lora"])
def test_an_adapter_whose_weights_do_not_fit_leaves_nothing(tmp_path, kind):
    loaded = AdapterSet(network(), {"good": save_adapter(tmp_path / "good", 0, kind)})
    before, keys = run(loaded, "good"), list(loaded.activate("good").state_dict())
    bad = Path(save_adapter(tmp_path / "bad", 1, kind))
    weights = {name: torch.cat([tensor, tensor]) for name, tensor in load_file(bad / WEIGHTS).items()}
    save_file(weights, bad / WEIGHTS)
    with pytest.raises(ValueError, match=rf"^The adapter {bad} cannot be loaded: "):
        loaded.add("bad", bad)
    model = loaded.activate("good")
    assert (
        loaded.labels == ["good"] and list(model.peft_config) == model.active_adapters and len(model.peft_config) == 1
    )
    assert list(model.state_dict()) == keys and torch.equal(run(loaded, "good"), before)


def test_methods_are_refused_that_load_more_than_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    folder = save_adapter(tmp_path / "mixture", 0, "lora")
    file = tmp_path / "mixture" / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "XLORA", "adapters": {"one": "somebody/else"}}))
    with pytest.raises(
        ValueError, match="mixture cannot be loaded: its method, XLORA, loads further adapters by itself"
    ):
        AdapterSet(network(), {"a": folder})


@pytest.mark.parametrize("kind", ["colora", "lora"])
def test_a_pickle_is_not_opened(tmp_path, kind):
    folder = tmp_path / kind
    save_adapter(folder, 0, kind)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"would be opened")
    with pytest.raises(ValueError, match=r"adapter_model\.bin only, a pickle"):
        AdapterSet(network(), {"a": str(folder)})


def test_labels_are_as_short_as_they_can_be():
    assert adapter_labels(["outputs/haze", "none", "me/rain/"]) == ["haze", "none", "rain"]
    assert adapter_labels(["outputs/haze", "me/haze", "rain"]) == ["outputs-haze", "me-haze", "rain"]
    with pytest.raises(ValueError, match="called outputs-haze; give each once"):
        adapter_labels(["outputs/haze", "outputs/haze"])


def test_folders_without_adapters_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no adapters"):
        adapters_in(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        adapters_in(tmp_path / "nowhere")


def test_an_adapter_that_is_being_written_is_not_there_yet(tmp_path):
    with writing_folder(tmp_path / "rain") as folder:
        save_adapter(folder, 0)
        with pytest.raises(ValueError, match="holds no adapters"):
            adapters_in(tmp_path)
    assert list(adapters_in(tmp_path)) == ["rain"]


# ------------------------------------------------------------------------------------ strengths, blends and removals


@pytest.fixture
def two(tmp_path):
    return AdapterSet(network(), {name: save_adapter(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))})


@torch.no_grad()
def run(adapters, label, strength=1.0):
    return adapters.activate(label, strength)(torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0)))


def test_a_strength_runs_from_the_bare_network_through_the_adapter_and_leaves_no_trace(two):
    bare, once, other = run(two, "none"), run(two, "a"), run(two, "b")
    assert torch.equal(run(two, "a", 0.0), bare)
    assert (run(two, "a", 1.5) - bare).abs().mean() > (once - bare).abs().mean()
    for label, expected in (("b", other), ("none", bare), ("a", once), ("b", other)):
        assert torch.equal(run(two, label), expected), label
        run(two, "b", 0.3)


@pytest.mark.parametrize("strength", [-0.1, 1.6, float("nan")])
def test_impossible_strengths_are_refused(two, strength):
    with pytest.raises(ValueError, match="must be between 0 and 1.5"):
        two.activate("a", strength)


def test_another_method_has_no_strength(adapters):
    with pytest.raises(ValueError, match="strength of rain is fixed"):
        AdapterSet(network(), adapters).activate("rain", 0.5)


def test_a_blend_is_the_weighted_sum(two):
    two.blend(["a", "b"], [1.0, 0.0], "one")
    two.blend(["a", "b"], [0.5, 0.5], "mean")
    assert torch.allclose(run(two, "one"), run(two, "a"), atol=1e-6)
    mean, a, b = (model.base_model.model[0].get_delta_weight(model.active_adapter) for model in
                  (two.activate(label) for label in ("mean", "a", "b")))  # fmt: skip
    assert torch.allclose(mean, (a + b) / 2, atol=1e-6)


def test_what_is_removed_is_gone_and_the_others_work(two):
    kept = run(two, "a")
    two.remove("b")
    assert two.labels == ["a"] and torch.equal(run(two, "a"), kept)
    with pytest.raises(ValueError, match="no adapter 'b'; choose one of a, none"):
        two.activate("b")


def test_a_label_can_be_used_again_after_its_adapter_was_removed(two, tmp_path):
    first, digest = run(two, "b", 0.5), two.digest_of("b")
    two.remove("b")
    two.add("b", tmp_path / "a")
    assert torch.equal(run(two, "b"), run(two, "a")) and two.digest_of("b") != digest
    assert not torch.equal(run(two, "b", 0.5), first)


def test_a_network_that_keeps_weights_at_eval_follows_adapters_and_strengths(tmp_path):
    for seed, name in enumerate(("haze", "rain")):
        torch.manual_seed(seed)
        model = get_peft_model(reading_network(Cached), CoLoRAConfig(ranks=2, init_weights=False))
        model.save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in ("haze", "rain")}
    loaded, x = AdapterSet(reading_network(Cached), folders), torch.rand(1, 3, 9, 9)
    expected = {name: PeftModel.from_pretrained(reading_network(Cached), folders[name]).eval()(x) for name in folders}
    for name in ("rain", "haze", "rain"):
        torch.testing.assert_close(loaded.activate(name)(x), expected[name])
    torch.testing.assert_close(loaded.activate("rain", 0.0)(x), reading_network(Cached)(x))
    torch.testing.assert_close(loaded.activate("rain")(x), expected["rain"])
