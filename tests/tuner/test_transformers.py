"""Adapters as users of transformers have them: the network's own adapter methods, and training with Trainer.

The laws hold for our NAFNet and for transformers' own Swin2SR, for factors and for dense deltas, and whether the
network is wrapped in a PeftModel or carries the adapter by `model.add_adapter`.
"""

import math
from functools import partial

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny_networks import TINY_NAFNET, tiny_nafnet
from support.transformers import tiny_swin2sr
from transformers import AutoModelForImageToImage, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from colora_peft import CoLoRAConfig, CoLoRALayer
from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration

TOO_OLD = Version(peft.__version__) < Version(MIN_PEFT_VERSION)
pytestmark = [
    pytest.mark.skipif(TOO_OLD, reason=f"transformers needs peft>={MIN_PEFT_VERSION} for its own adapter methods"),
    # PEFT asks every network of transformers by this old name,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    # and warns whenever add_adapter or load_adapter of transformers gives a network its second adapter.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


both_networks = pytest.mark.parametrize("make", [tiny_nafnet, tiny_swin2sr], ids=["nafnet", "swin2sr"])
both_storages = pytest.mark.parametrize("ranks", [1, 1000], ids=["factors", "dense"])
both_ways = pytest.mark.parametrize("way", ["peft_model", "own_methods"])

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread_and_no_trace(monkeypatch):
    """One thread, as kernels this small take longer to share than to run; and no trace of Trainer in later tests."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # older versions of transformers write it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def adapted(make, way="own_methods", seed=1, **settings):
    """The network that `make` returns with a new adapter; the seed is that of the adapter alone."""
    network, config = make(), CoLoRAConfig(**settings)
    torch.manual_seed(seed)
    if way == "peft_model":
        return get_peft_model(network, config).eval()
    network.add_adapter(config)
    return network.eval()


@torch.no_grad()
def restored(model):
    return model(IMAGES[:2]).reconstruction


def assert_restores(model, expected):
    torch.testing.assert_close(restored(model), expected, rtol=0, atol=1e-6)


def trained_weights(model):
    """Copies of the weights that require a gradient, by the names that they have without a PeftModel around."""
    named = {name.removeprefix("base_model.model."): weight for name, weight in model.named_parameters()}
    return {name: weight.detach().clone() for name, weight in named.items() if weight.requires_grad}


def base_weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items() if "colora_" not in name}


def assert_same(weights, expected, tolerance=0.0):
    assert weights.keys() == expected.keys() and weights
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance, msg=name)


@both_networks
def test_switching_between_two_adapters_and_none(make, tmp_path):
    model, loaded, bare, outputs = make(), make(), restored(make()), {}
    for name, ranks in {"rain": 1, "haze": 1000}.items():
        model.add_adapter(CoLoRAConfig(ranks=ranks, init_weights=False), name)
        assert model.active_adapters() == [name] and all(name in weight for weight in trained_weights(model))
        outputs[name] = restored(model.eval())
        assert not torch.allclose(outputs[name], bare, atol=1e-4)
        model.save_pretrained(tmp_path / name)
        loaded.load_adapter(tmp_path / name, name)
    assert not torch.allclose(outputs["rain"], outputs["haze"], atol=1e-4)
    for network in (model, loaded):
        network.disable_adapters()
        assert torch.equal(restored(network), bare)
        network.enable_adapters()
        for name in outputs:
            network.set_adapter(name)
            assert network.active_adapters() == [name]
            assert_restores(network, outputs[name])
        network.set_adapter(["rain", "haze"])
        assert not any(torch.allclose(restored(network), output, atol=1e-4) for output in outputs.values())


@pytest.mark.filterwarnings("ignore:Adapter rain was active")
@both_networks
def test_deleting_adapters_one_by_one(make):
    model, bare = make(), restored(make())
    model.add_adapter(CoLoRAConfig(ranks=1000, init_weights=False), "haze")
    haze = restored(model.eval())
    model.add_adapter(CoLoRAConfig(ranks=1, init_weights=False), "rain")
    model.delete_adapter("rain")
    assert model.active_adapters() == ["haze"] and torch.equal(restored(model), haze)
    model.delete_adapter("haze")
    assert torch.equal(restored(model), bare)
    assert not any("colora_" in name for name in model.state_dict())
    model.add_adapter(CoLoRAConfig(ranks=1, init_weights=False), "haze")
    assert model.active_adapters() == ["haze"] and not torch.equal(restored(model), bare)


@both_networks
@both_storages
@both_ways
def test_saved_adapter_loads_either_way(make, ranks, way, tmp_path):
    model = adapted(make, way, ranks=ranks, init_weights=False)
    expected = restored(model)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()} - {"README.md"}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert_restores(PeftModel.from_pretrained(make(), tmp_path).eval(), expected)

    torch.manual_seed(2)
    loaded, copied = make(), make()
    loaded.load_adapter(tmp_path)
    assert_restores(loaded, expected)
    assert not loaded.training and not trained_weights(loaded)
    weights = loaded.get_adapter_state_dict()
    assert all("colora_" in name for name in weights)
    assert_same(weights, {name.removeprefix("base_model.model."): weight for name, weight in stored.items()})
    loaded.disable_adapters()
    assert torch.equal(restored(loaded), restored(make()))
    copied.load_adapter(peft_config=CoLoRAConfig(ranks=ranks), adapter_state_dict=weights, is_trainable=True)
    assert_restores(copied, expected)
    assert len(trained_weights(copied)) == len(stored)


@both_networks
@both_ways
def test_folder_of_an_adapter_finds_its_network(make, way, tmp_path):
    make().save_pretrained(tmp_path / "network")
    network = partial(AutoModelForImageToImage.from_pretrained, tmp_path / "network")
    model = adapted(network, way, ranks=1, init_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    alone, added = AutoModelForImageToImage.from_pretrained(tmp_path / "adapter"), network()
    added.load_adapter(tmp_path / "adapter", "rain")
    assert alone.active_adapters() == ["default"] and added.active_adapters() == ["rain"]
    for loaded in (alone, added):
        assert not loaded.training and not torch.equal(restored(loaded), restored(network()))
        assert_restores(loaded, restored(model))


def test_refused_adapter_leaves_no_trace(tmp_path):
    for name, make in {"nafnet": tiny_nafnet, "swin2sr": tiny_swin2sr}.items():
        adapted(make, ranks=1, init_weights=False).save_pretrained(tmp_path / name)
    model = tiny_swin2sr()
    with pytest.raises(ValueError, match="in `ranks` is not that of a layer that can be adapted here"):
        model.load_adapter(tmp_path / "nafnet")
    assert torch.equal(restored(model), restored(tiny_swin2sr()))
    assert not any(isinstance(module, CoLoRALayer) for module in model.modules())
    model.load_adapter(tmp_path / "swin2sr")
    expected = restored(model)
    assert not torch.equal(expected, restored(tiny_swin2sr()))
    with pytest.raises(ValueError, match="'nowhere' in `ranks`"):
        model.add_adapter(CoLoRAConfig(ranks={"nowhere": 1}), "second")
    assert model.active_adapters() == ["default"] and torch.equal(restored(model), expected)


def test_weights_that_do_not_fit_are_refused_or_reported(tmp_path):
    adapted(tiny_nafnet, ranks=1).save_pretrained(tmp_path)
    wide = NAFNetForImageRestoration(NAFNetConfig(**{**TINY_NAFNET, "width": 16}))
    with pytest.raises(RuntimeError, match="mismatch"):
        wide.load_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    lacking = weights.pop("base_model.model.ending.colora_B")
    save_file({**weights, "base_model.model.nowhere.colora_B": lacking}, file)
    report = tiny_nafnet().load_adapter(tmp_path)
    if report is not None:  # older versions of transformers only log
        assert report.missing_keys == {"ending.colora_B.default"}
        assert report.unexpected_keys == {"nowhere.colora_B.default"}


def mean_difference(outputs, labels, num_items_in_batch=None):
    return (outputs.reconstruction - labels).abs().mean()


def trainer(model, folder, **changes):
    """A Trainer that takes six steps, four to an epoch, and saves in the middle of the first.

    The targets are the images with their colours in reverse order, as much larger as `model` makes them.
    """
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 3}
    settings.update(eval_steps=3, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, **changes)
    scale = getattr(model.config, "upscale", 1)
    targets = IMAGES.flip(1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    pairs = [{"pixel_values": x, "labels": y} for x, y in zip(IMAGES, targets, strict=True)]
    loss = mean_difference if scale > 1 else None  # Swin2SR's own forward pass takes no labels
    arguments = TrainingArguments(folder, **settings)
    return Trainer(model=model, args=arguments, train_dataset=pairs, eval_dataset=pairs, compute_loss_func=loss)


@both_networks
@both_storages
@both_ways
def test_training_moves_and_saves_the_adapter_alone(make, ranks, way, tmp_path):
    model = adapted(make, way, ranks=ranks)
    start, base = trained_weights(model), base_weights(model)
    # Trainer looks through the model for what it takes; telling it must serve as well.
    explicit = {"remove_unused_columns": False, "label_names": ["labels"]} if way == "peft_model" else {}
    run = trainer(model, tmp_path, eval_strategy="steps", **explicit)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert {entry["step"] for entry in run.state.log_history if "eval_loss" in entry} == {3, 6}
    assert run.evaluate()["eval_loss"] < before
    assert_same(base_weights(model), base)
    end = trained_weights(model)
    assert end.keys() == start.keys() and not any(torch.equal(end[name], start[name]) for name in start)

    run.save_model(tmp_path / "final")
    for folder in (tmp_path / "checkpoint-3", tmp_path / "checkpoint-6", tmp_path / "final"):
        assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
        assert len(load_file(folder / "adapter_model.safetensors")) == len(start)
        assert not list(folder.glob("pytorch_model*")) and not (folder / "config.json").exists()
    expected = restored(model.eval())
    assert_restores(PeftModel.from_pretrained(make(), tmp_path / "final").eval(), expected)
    predicted = torch.from_numpy(run.predict(run.eval_dataset).predictions)
    torch.testing.assert_close(predicted[:2], expected, rtol=0, atol=1e-6)


@both_networks
@both_storages
@both_ways
def test_resumed_run_ends_with_the_same_weights(make, ranks, way, tmp_path):
    trainer(model := adapted(make, way, ranks=ranks), tmp_path).train()
    # Trainer resumes, and loads the best checkpoint of, a PeftModel only; the files are the same, so a run that began
    # with add_adapter goes on as a PeftModel. Another seed: every weight must come from the file.
    resumed = adapted(make, "peft_model", seed=2, ranks=ranks)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(trained_weights(resumed), trained_weights(model))


@both_storages
def test_best_checkpoint_is_loaded_at_the_end(ranks, tmp_path):
    model = adapted(tiny_nafnet, "peft_model", ranks=ranks)
    # The loss falls, so that the greatest is that of the first checkpoint.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer(model, tmp_path, eval_strategy="steps", **best).train()
    loaded = PeftModel.from_pretrained(tiny_nafnet(), tmp_path / "checkpoint-3", is_trainable=True)
    assert_same(trained_weights(model), trained_weights(loaded))


def test_only_the_active_adapter_is_trained_and_both_are_resumed(tmp_path):
    ends = []
    for seed, checkpoint in ((1, None), (2, str(tmp_path / "checkpoint-3"))):
        model = adapted(tiny_nafnet, "peft_model", ranks=1)
        other = trained_weights(model)
        torch.manual_seed(seed)
        model.add_adapter("haze", CoLoRAConfig(ranks=2))
        model.set_adapter("haze")
        trainer(model, tmp_path).train(resume_from_checkpoint=checkpoint)
        ends.append(trained_weights(model))
        assert all(".haze" in name for name in ends[-1])
        model.set_adapter("default")
        assert_same(trained_weights(model), other)
    assert_same(ends[1], ends[0])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # the name that transformers 4.57 has, too
# Not Swin2SR with its own methods: transformers then sets requires_grad on the tuple that its embeddings return.
@pytest.mark.parametrize("kind", ["nafnet-peft_model", "nafnet-own_methods", "swin2sr-peft_model"])
def test_gradient_checkpointing_changes_no_weight(kind, tmp_path):
    make, way = (tiny_nafnet if kind.startswith("nafnet") else tiny_swin2sr), kind.split("-")[1]
    ends, calls = [], []
    for checkpointed in (False, True):
        model = adapted(make, way, ranks=1)
        calls.append(0)
        for module in model.modules():
            if isinstance(module, CoLoRALayer):
                module.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        trainer(model, tmp_path, gradient_checkpointing=checkpointed).train()
        ends.append(trained_weights(model))
    assert calls[1] > 1.5 * calls[0]
    assert_same(ends[1], ends[0], tolerance=1e-6)


@both_networks
def test_bfloat16_autocast_trains_float32_weights(make, tmp_path):
    losses = []
    for autocast in (False, True):
        model = adapted(make, "peft_model", ranks=1)
        run = trainer(model, tmp_path, bf16=autocast)
        run.train()
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] != losses[1] and all(map(math.isfinite, losses[1]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)
