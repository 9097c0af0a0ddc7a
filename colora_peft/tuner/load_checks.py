"""Checks that the weights of an adapter fit the network that they are loaded into.

PEFT loads adapters with strict=False and only warns of missing weights, so that the adapter of another network would
seem to work. Here names are checked when PEFT loads an adapter, and shapes for every state dict, before the first
weight is copied. PEFT before 0.21 does not announce that it loads an adapter. There, names are checked for every state
dict, too.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from colora_peft.utils import some

from .layer import adapted_layers
from .peft_internals import ANNOUNCES_LOADING

_PEFT_PREFIX = "base_model.model."
"""Prefix of the network's own names in the state dict of a PeftModel."""


class _OwnWeights(NamedTuple):
    """The adapter weights that a network has, by adapter and then by "layer.parameter"."""

    by_adapter: dict[str | None, dict[str, Tensor]]
    second_names: set[str]
    """The other names of weights that have several, because a block is registered twice."""


def weights_by_adapter(
    state_dict: Mapping[str, Tensor], module_prefix: str, parameter_prefix: str
) -> dict[str | None, dict[str, Tensor]]:
    """Returns the adapter weights of a state dict, by adapter and then by "layer.parameter".

    Args:
        state_dict: With keys "{module_prefix}{layer}.{parameter_prefix}...{.adapter}"; others are left out. PEFT does
            not add the adapter to the key of a weight that has no place: these stand under None.
        module_prefix: Prefix of the network's own names.
        parameter_prefix: Prefix of the names of adapter parameters.
    """
    found = defaultdict(dict)
    for key, tensor in state_dict.items():
        if not key.startswith(module_prefix):
            continue
        key = key.removeprefix(module_prefix)
        name, _, adapter = key.rpartition(".")
        if name.rpartition(".")[2].startswith(parameter_prefix):  # first: adapters may be called like parameters
            found[adapter][name] = tensor
        elif adapter.startswith(parameter_prefix):
            found[None][key] = tensor
    return dict(found)


def check_adapter_weights(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], adapter: str, check_shapes: bool = True
) -> None:
    """Checks that `found` are the weights of an adapter whose parameters are `expected`, by name and then by shape."""
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if check_shapes and name in found and found[name].shape != tensor.shape
    ]
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": misshapen,
    }
    named = "; ".join(f"{what}: {some(names, 5)}" for what, names in faults.items() if names)
    if named:
        raise ValueError(
            f"The weights of adapter {adapter!r} do not fit the network and the ranks in its configuration: {named}. "
            "Load it into the network that it was trained on, with the adapter_config.json it was saved with."
        )


def check_unmerged(tuner: BaseTuner, adapter: str) -> None:
    """Checks that unmerging will not subtract other weights than were added."""
    if any(adapter in layer.merged_adapters for layer in adapted_layers(tuner.model).values()):
        raise ValueError(f"Adapter {adapter!r} is merged: call unmerge_adapter() before you replace its weights.")


def place_weights(tuner: BaseTuner, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict that PEFT is about to load as `adapter`, under the names that the network has.

    All weights must be there, and each must have a place. If not, an adapter that was made to be loaded into is taken
    off again.
    """
    check_unmerged(tuner, adapter)
    own = _own_weights(tuner)
    # PEFT does not find the place of weights inside of wrappers for checkpointing.
    places = {f"{_PEFT_PREFIX}{name}" for name in own.by_adapter.get(adapter, {})}
    placed = {f"{key}.{adapter}" if key in places else key: tensor for key, tensor in state_dict.items()}
    # Shapes follow in check_state_dict: until then PEFT leaves out what ignore_mismatched_sizes lets it ignore.
    _check_fit(tuner, adapter, own, weights_by_adapter(placed, _PEFT_PREFIX, tuner.prefix), check_shapes=False)
    return placed


def check_state_dict(tuner: BaseTuner, state_dict: Mapping[str, Tensor], module_prefix: str) -> None:
    """Checks the shapes of all adapter weights in a state dict before it is loaded; before PEFT 0.21 names, too.

    If they do not fit, an adapter that was made to be loaded into is taken off again.
    """
    loaded = weights_by_adapter(state_dict, module_prefix, tuner.prefix)
    adapters = [adapter for adapter in loaded if adapter in tuner.peft_config]
    own = _own_weights(tuner) if adapters else None
    for adapter in adapters:
        _check_fit(tuner, adapter, own, loaded, check_names=not ANNOUNCES_LOADING)


def _own_weights(tuner: BaseTuner) -> _OwnWeights:
    """Returns all adapter weights that there are now, without the names of wrappers for checkpointing."""
    first_names, named, second_names = {}, {}, set()
    for name, parameter in tuner.model.named_parameters(remove_duplicate=False):
        if tuner.prefix not in name:
            continue
        name = name.replace("_checkpoint_wrapped_module.", "")
        if first_names.setdefault(id(parameter), name) == name:
            named[name] = parameter
        else:
            second_names.add(name.rpartition(".")[0])
    return _OwnWeights(weights_by_adapter(named, "", tuner.prefix), second_names)


def _check_fit(
    tuner: BaseTuner,
    adapter: str,
    own: _OwnWeights,
    loaded: Mapping[str | None, dict[str, Tensor]],
    check_names: bool = True,
    check_shapes: bool = True,
) -> None:
    # FSDP puts flat parameters in the place of those that state dicts name.
    if any("_fsdp_wrapped_module" in name for name, _ in tuner.model.named_modules()):
        return
    expected = own.by_adapter.get(adapter, {})
    # Some versions of PEFT save what has two names under both.
    found = {name: tensor for name, tensor in loaded.get(adapter, {}).items() if name not in own.second_names}
    found |= loaded.get(None, {})
    if not check_names:
        expected = {name: tensor for name, tensor in expected.items() if name in found}
        found = {name: found[name] for name in expected}
    try:
        check_adapter_weights(expected, found, adapter, check_shapes)
    except ValueError:
        _take_off_if_empty(tuner, adapter)
        raise


def _take_off_if_empty(tuner: BaseTuner, adapter: str) -> None:
    """Leaves the network as it was before PEFT made room for an adapter whose weights then did not fit.

    It does so only if nothing can be lost: the delta is zero, and the adapter was made for loading, not for training.
    """
    layers = [layer for layer in adapted_layers(tuner.model).values() if adapter in layer.rank]
    config = tuner.peft_config[adapter]
    if config.modules_to_save or config.bias != "none":
        return
    if not config.inference_mode or not all(layer.is_empty(adapter) for layer in layers):
        return
    if list(tuner.peft_config) == [adapter]:
        tuner.unload()
    elif adapter not in tuner.active_adapters:
        tuner.delete_adapter(adapter)
