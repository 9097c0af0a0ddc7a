"""All backbones at a tiny size, for the contract that each of them keeps."""

import copy

import torch
from peft import get_peft_model
from support.tiny_networks import TINY_NAFNET, TINY_RESTORMER

from colora_peft import CoLoRAConfig, adaptable_layers
from colora_peft.models import NAFNetForImageRestoration, RestormerForImageRestoration

NAFNET = "colora_peft.models.nafnet.modeling_nafnet.NAFNetForImageRestoration"
RESTORMER = "colora_peft.models.restormer.modeling_restormer.RestormerForImageRestoration"
BACKBONES = {
    "nafnet": (NAFNetForImageRestoration, TINY_NAFNET, NAFNET),
    "restormer": (RestormerForImageRestoration, TINY_RESTORMER, RESTORMER),
    "restormer of dual pixels": (
        RestormerForImageRestoration,
        {**TINY_RESTORMER, "num_channels": 6, "dual_pixel": True, "bias": True, "norm_bias": False},
        RESTORMER,
    ),
}
"""For each name, a class, settings of a configuration with a few thousand weights, and the class's full name.

Adapters write that name down, so it must not change.
"""


def tiny_backbone(name, seed=0, trained=True):
    """A tiny network in evaluation mode; `trained` moves whatever is constant at first, such as norms and scales."""
    model_class, settings, _ = BACKBONES[name]
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters() if trained else ():
            if (parameter == parameter.flatten()[0]).all():
                parameter.add_(torch.randn_like(parameter) / 4)
    return model.eval()


def restored_shape(model, x):
    """The shape of the restored images of `x`."""
    channels = getattr(model.config, "num_output_channels", model.config.num_channels)
    return (len(x), channels, *x.shape[2:])


def images(model, *size, batch=2, seed=0):
    """A random batch for a network, and labels of it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, model.config.num_channels, *size, generator=generator)
    return x, torch.rand(restored_shape(model, x), generator=generator)


def adapted(bare):
    """`bare` with random adapters: dense, factors of rank 1 and nothing in turn."""
    ranks = {name: (1000, 1, 0)[i % 3] for i, name in enumerate(adaptable_layers(bare))}
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=ranks, init_weights=False))


def state_is_equal(model, other):
    weights, others = model.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def batch(model):
    """A batch in double precision; the task is to take away a veil."""
    x, labels = images(model, 16, 16)
    return {"pixel_values": (0.3 + labels / 2).double(), "labels": labels.double()}
