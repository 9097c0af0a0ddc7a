"""Whether the weights of an adapter fit the network that they are loaded into."""

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from colora_peft.utils import some

__all__ = ["check_adapter_weights", "weights_by_adapter"]


def weights_by_adapter(
    state_dict: Mapping[str, Tensor], module_prefix: str, parameter_prefix: str
) -> dict[str | None, dict[str, Tensor]]:
    """Adapter weights of a state dict, by adapter and then by "layer.parameter".

    Args:
        state_dict: With keys "{module_prefix}{layer}.{parameter_prefix}...{.adapter}"; others are left out. PEFT does
            not add the adapter to the key of a weight that has no place: such stand under None.
        module_prefix: What comes before the network's own names.
        parameter_prefix: What the names of adapter parameters begin with.
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
    """Check that `found` are the weights of an adapter whose parameters are `expected`, by name and then by shape.

    Raises:
        ValueError: They are not; names what is missing, what is unexpected, and what has another shape.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if check_shapes and name in found and found[name].shape != tensor.shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    named = "; ".join(f"{what}: {some(names, 5)}" for what, names in faults.items() if names)
    if named:
        raise ValueError(
            f"The weights of adapter {adapter!r} do not fit the network and the ranks in its configuration: {named}. "
            "Load it into the network that it was trained on, with the adapter_config.json it was saved with."
        )
