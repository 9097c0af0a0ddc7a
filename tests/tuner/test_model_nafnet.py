"""CoLoRA on a whole NAFNet: merging, files, and gradient checkpointing."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.tiny_networks import tiny_nafnet

from colora_peft import CoLoRAConfig, CoLoRALayer, adaptable_layers
from colora_peft.models.nafnet.modeling_nafnet import NAFBlock

RANKS = {name: (1000, 1, 0)[i % 3] for i, name in enumerate(adaptable_layers(tiny_nafnet()))}
"""Dense, factors and nothing in turn."""


def adapted(bare):
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=RANKS, init_weights=False))


@torch.no_grad()
def test_unmerged_merged_and_reloaded_agree(tmp_path):
    bare, x = tiny_nafnet(), torch.rand(2, 3, 9, 12)
    model = adapted(bare).eval()
    layers = [module for module in model.modules() if isinstance(module, CoLoRALayer)]
    dense = sum(len(layer.colora_dense) for layer in layers)
    assert dense > 0 and len(layers) - dense > 0 and len(layers) < len(RANKS)
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
    restored = model.unload().state_dict()
    for name, tensor in bare.state_dict().items():
        torch.testing.assert_close(restored[name], tensor, rtol=0, atol=1e-6)

    merged = loaded.merge_and_unload()
    assert merged.state_dict().keys() == bare.state_dict().keys()
    torch.testing.assert_close(merged(x).reconstruction, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # the name that 4.57 has, too
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_changes_no_gradient(when):
    x, labels, gradients, calls = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), [], []
    for checkpointed in (False, True):
        bare = tiny_nafnet()
        if checkpointed and when == "before":
            bare.gradient_checkpointing_enable()
        model = adapted(bare).train()
        if checkpointed and when == "after":
            model.gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, NAFBlock):
                module.norm1.register_forward_hook(lambda *_: calls.append(1))
        model(x, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(calls) == 5 + 10  # each of the five blocks ran twice
    plain, checkpointed = gradients
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-7)


def test_first_layer_is_where_transformers_lets_gradients_in():
    model = tiny_nafnet()
    assert model.get_input_embeddings() is model.intro
