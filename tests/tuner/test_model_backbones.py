"""CoLoRA on whole backbones: merging, files, mixed batches and gradient checkpointing."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.tiny_networks import tiny_nafnet, tiny_restormer

from colora_peft import CoLoRAConfig, CoLoRALayer, adaptable_layers
from colora_peft.models.nafnet.modeling_nafnet import NAFBlock
from colora_peft.models.restormer.modeling_restormer import RestormerBlock

backbones = pytest.mark.parametrize("make", [tiny_nafnet, tiny_restormer])


def adapted(bare):
    """The network with a layer that is dense, one of factors and one without a delta in turn."""
    ranks = {name: (1000, 1, 0)[i % 3] for i, name in enumerate(adaptable_layers(bare))}
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=ranks, init_weights=False))


@backbones
@torch.no_grad()
def test_unmerged_merged_and_reloaded_agree(make, tmp_path):
    bare, x = make(), torch.rand(2, 3, 24, 19)
    model = adapted(bare).eval()
    layers = [module for module in model.modules() if isinstance(module, CoLoRALayer)]
    dense = sum(len(layer.colora_dense) for layer in layers)
    assert dense > 0 and len(layers) - dense > 0 and len(layers) < len(adaptable_layers(bare))
    expected = model(x).reconstruction
    assert not torch.allclose(expected, bare(x).reconstruction, atol=1e-2)

    model.save_pretrained(tmp_path)
    torch.manual_seed(2)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    torch.testing.assert_close(loaded(x).reconstruction, expected, rtol=0, atol=1e-5)

    model.merge_adapter()
    torch.testing.assert_close(model(x).reconstruction, expected, rtol=0, atol=1e-5)
    assert all(layer.merged for layer in layers)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x).reconstruction, expected, rtol=0, atol=1e-5)
    unloaded = model.unload().state_dict()
    for name, tensor in bare.state_dict().items():
        torch.testing.assert_close(unloaded[name], tensor, rtol=0, atol=1e-6)

    merged = loaded.merge_and_unload()
    assert merged.state_dict().keys() == bare.state_dict().keys()
    torch.testing.assert_close(merged(x).reconstruction, expected, rtol=0, atol=1e-5)


@backbones
@torch.no_grad()
def test_each_sample_of_a_batch_may_have_its_own_adapter(make):
    bare, x = make(), torch.rand(3, 3, 24, 16)
    model = adapted(bare).eval()
    mixed = model(x, adapter_names=["default", "__base__", "default"]).reconstruction
    own, plain = model(x).reconstruction, bare(x).reconstruction
    torch.testing.assert_close(mixed, torch.stack([own[0], plain[1], own[2]]), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # the name that 4.57 has, too
@pytest.mark.parametrize("when", ["before", "after"])
@backbones
def test_gradient_checkpointing_changes_no_gradient(make, when):
    x, labels, gradients, calls = torch.rand(1, 3, 16, 8), torch.rand(1, 3, 16, 8), [], []
    for checkpointed in (False, True):
        bare = make()
        if checkpointed and when == "before":
            bare.gradient_checkpointing_enable()
        model = adapted(bare).train()
        if checkpointed and when == "after":
            model.gradient_checkpointing_enable()
        blocks = [module for module in model.modules() if isinstance(module, NAFBlock | RestormerBlock)]
        for block in blocks:
            block.norm1.register_forward_hook(lambda *_: calls.append(1))
        model(x, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(calls) == 3 * len(blocks) > 0  # with checkpoints each block ran twice
    plain, checkpointed = gradients
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-7)


def test_first_layer_is_where_transformers_lets_gradients_in():
    model, other = tiny_nafnet(), tiny_restormer()
    assert model.get_input_embeddings() is model.intro
    assert other.get_input_embeddings() is other.patch_embed
