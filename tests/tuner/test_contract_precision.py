"""PEFT's own test matrix: half precision, autocast, offloading, checkpointing, copies, two processes."""

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model, infer_auto_device_map
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.contract_networks import (
    Row,
    all_rows,
    assert_same,
    far,
    few_rows,
    gradients,
    of_adapter,
    plain_rows,
    run,
    since,
    train,
    trainable,
    tuner_layers,
    weights,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

HALVES = [torch.bfloat16, torch.float16]
half_precisions = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])


# --- half precision -------------------------------------------------------------------------------------------------


@since("0.19")
@few_rows
@half_precisions
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_are_float32_unless_told_otherwise(row, dtype, autocast_adapter_dtype, tmp_path):
    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    expected = {torch.float32 if autocast_adapter_dtype else dtype}

    def dtypes(model):
        return {parameter.dtype for name, parameter in model.named_parameters() if ".colora_" in name}

    model = row.adapted("default", "other", dtype=dtype, **options)
    assert dtypes(model) == expected
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(row.bare(dtype), tmp_path, low_cpu_mem_usage=low_memory, **options)
        loaded.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=low_memory, **options)
        assert dtypes(loaded) == expected
        assert_same(model.state_dict(), loaded.state_dict())


@few_rows
@half_precisions
@pytest.mark.parametrize("how", ["added", "loaded"])
def test_inactive_and_loaded_adapters_are_frozen_also_on_a_half_precision_base(row, dtype, how, tmp_path):
    if how == "added":
        model = row.adapted("default", "other", dtype=dtype)
        assert trainable(model) == of_adapter(model, "default")
    else:
        row.adapted().save_pretrained(tmp_path)
        assert not trainable(PeftModel.from_pretrained(row.bare(dtype), tmp_path))


@all_rows
@pytest.mark.parametrize(("dtype", "autocast_adapter_dtype"), [(torch.bfloat16, True), (torch.float16, False)])
def test_half_precision_network_runs_merges_and_unmerges(row, dtype, autocast_adapter_dtype):
    x, rounding = row.x(dtype), torch.finfo(dtype).eps
    model = row.adapted(dtype=dtype, autocast_adapter_dtype=autocast_adapter_dtype)
    expected, before = run(model, x), [layer.get_base_layer().weight.clone() for layer in tuner_layers(model)]
    assert expected.dtype == dtype and far(expected, run(row.bare(dtype), x))
    torch.testing.assert_close(expected.float(), run(row.adapted(), row.x()), rtol=0, atol=10 * rounding)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert torch.equal(run(model, x), expected)
        merged = [layer.get_base_layer().weight.clone() for layer in tuner_layers(model)]
        assert {weight.dtype for weight in merged} == {dtype}
        model.unmerge_adapter()
        for layer, weight, sum_ in zip(tuner_layers(model), before, merged, strict=True):
            atol = rounding * sum_.abs().max().item()
            torch.testing.assert_close(layer.get_base_layer().weight, weight, rtol=0, atol=atol)
            layer.get_base_layer().weight.data.copy_(weight)  # the next merge starts afresh
    assert torch.equal(run(model.merge_and_unload(), x), expected)


@all_rows
def test_autocast_changes_only_the_precision_of_the_layers(row):
    model, x = row.adapted(), row.x()
    expected, plain = run(model, x), gradients(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, x)
        assert output.dtype == run(row.bare(), x).dtype
        low = gradients(model, x)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.05)
    for name, gradient in plain.items():
        assert low[name].dtype == torch.float32
        torch.testing.assert_close(low[name], gradient, rtol=0, atol=0.6 * gradient.abs().max().item() + 1e-7)
    model.merge_adapter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(model, x), output)


@plain_rows
@half_precisions
def test_half_precision_network_trains_in_float32(row, dtype):
    model, x = row.adapted(dtype=dtype), row.x(dtype)
    before, adapter = weights(model), of_adapter(model, "default")
    train(model, x)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in adapter else dtype)
        assert torch.equal(parameter, before[name]) == (name not in adapter) and torch.isfinite(parameter).all()


# --- device maps and offloading -------------------------------------------------------------------------------------


def dispatched(model, device_map, folder):
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@few_rows
@pytest.mark.parametrize("device_map", ["cpu", "inferred", "disk"])
def test_adapter_loads_onto_a_dispatched_network(row, device_map, tmp_path):
    plain, bare = row.adapted(), row.bare()
    plain.save_pretrained(tmp_path)
    maps = {
        "cpu": {"": "cpu"},
        "inferred": infer_auto_device_map(bare, max_memory={"cpu": "1GB"}),
        "disk": {name: "cpu" for name, _ in bare.named_children()} | {row.last: "disk"},
    }
    bare = dispatched(bare, maps[device_map], tmp_path / "offloaded")
    assert (device_map == "disk") == any(parameter.is_meta for parameter in bare.parameters())
    loaded = PeftModel.from_pretrained(bare, tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(run(loaded, row.x()), run(plain, row.x()), rtol=0, atol=1e-6)
    assert_same(gradients(plain, row.x()), gradients(loaded, row.x()), atol=1e-6)


@plain_rows
def test_network_with_hooks_is_adapted(row, tmp_path):
    plain, bare = row.adapted(), dispatched(row.bare(), {"": "cpu"}, tmp_path)
    torch.manual_seed(1)
    model = get_peft_model(bare, row.config()).eval()
    assert_same(plain.state_dict(), model.state_dict())
    torch.testing.assert_close(run(model, row.x()), run(plain, row.x()), rtol=0, atol=1e-6)
    assert_same(gradients(plain, row.x()), gradients(model, row.x()), atol=1e-6)


# Stock LoRA runs here: each of its factors is a module, whose hook brings the weight back for the time of the call.
@few_rows
def test_adapted_network_is_offloaded(row, tmp_path):
    model = row.adapted()
    expected = run(model, row.x())
    children = [name for name, _ in model.get_base_model().named_children()]
    device_map = {f"base_model.model.{name}": "disk" for name in children}
    model = dispatched(model, device_map, tmp_path)
    torch.testing.assert_close(run(model, row.x()), expected, rtol=0, atol=1e-6)


# --- checkpointing, copies, processes -------------------------------------------------------------------------------


@plain_rows
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # the name that 4.57 has, too
@pytest.mark.parametrize(("use_reentrant", "training"), [(True, True), (False, True), (False, False)])
def test_gradient_checkpointing_changes_no_gradient(row, use_reentrant, training):
    model, x = row.adapted().train(training), row.x()
    expected = gradients(model, x)
    if row.kind == "nafnet":
        model.prepare_model_for_gradient_checkpointing(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        actual = gradients(model, x)
    else:
        x.requires_grad_(True)  # else the reentrant kind sees nothing to differentiate
        actual = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert_same(expected, actual, atol=1e-6)
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())


@few_rows
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copy_is_the_same_and_independent(row, clone):
    model = row.adapted("haze", "rain")
    model.merge_adapter(["rain"])
    copied = clone(model)
    assert_same(model.state_dict(), copied.state_dict())
    assert trainable(copied) == trainable(model) and copied.active_adapters == ["haze"]
    assert torch.equal(run(copied, row.x()), run(model, row.x()))
    before = weights(model)
    copied.unmerge_adapter()
    copied.delete_adapter("rain")
    train(copied, row.x())
    assert_same(before, model.state_dict())
    assert {tuple(layer.merged_adapters) for layer in tuner_layers(model)} == {("rain",)}


def gradients_in_a_process(rank, row, folder):
    """Half of the batch on each of two processes; what both hold afterwards goes into a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = row.adapted(seed=rank)
    # The second has other factors until this sends it those of the first.
    parallel = DistributedDataParallel(model)
    found = gradients(model, row.x()[rank : rank + 1], parallel)
    save_file(found, f"{folder}/gradients{rank}.safetensors")
    save_file(weights(model), f"{folder}/weights{rank}.safetensors")
    dist.barrier()
    # Not destroy_process_group(): the gloo group ends with DDP's reducer, under the GIL, for which its own thread may
    # be waiting to free the last collective. Every few runs that was a deadlock (torch 2.13).
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["factors", "dense", "saved"])
def test_two_processes_find_the_gradients_of_one(settings, tmp_path):
    row = Row("wide", settings)
    torch.multiprocessing.spawn(gradients_in_a_process, (row, str(tmp_path)), nprocs=2)
    expected = gradients(row.adapted(seed=0), row.x())
    for rank in range(2):
        assert_same(row.adapted(seed=0).state_dict(), load_file(tmp_path / f"weights{rank}.safetensors"))
        assert_same(expected, load_file(tmp_path / f"gradients{rank}.safetensors"), atol=1e-5)
