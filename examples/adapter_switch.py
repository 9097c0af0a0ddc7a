"""A network and its adapters, of which one at a time is at work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from colora_peft import CoLoRALayer, load
from colora_peft.hub import load_backbone
from colora_peft.restore import NO_ADAPTER

MAX_STRENGTH = 1.5

_ADAPTER_FILE = "adapter_config.json"


def adapters_in(folder: str | Path) -> dict[str, Path]:
    """The adapters right below `folder`, by the names of their folders, sorted.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; check the path.")
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{_ADAPTER_FILE}"))}
    if not found:
        raise ValueError(
            f"The folder {folder} holds no adapters, which are folders with an {_ADAPTER_FILE}: name another."
        )
    return found


class AdapterSwitch:
    """A network with several adapters, of which one, or none, is at work.

    Args:
        network: Folder or id of the base.
        adapters: Folders or ids by the names that they get.
        device: Where it runs; None takes the accelerator if there is one.

    Raises:
        OSError, ValueError: as `colora_peft.load`, also where an adapter is not for this base.
    """

    def __init__(
        self, network: str | Path, adapters: Mapping[str, str | Path], device: torch.device | None = None
    ) -> None:
        if device is None and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
        self.device = device or torch.device("cpu")
        self.model: nn.Module = load_backbone(str(network)).to(self.device, memory_format=torch.channels_last)
        self.names: list[str] = []
        self._strengths: dict[str, float] = {}
        for name, path in adapters.items():
            self.add(name, path)

    def add(self, name: str, name_or_path: str | Path) -> None:
        """Load one more adapter, which is then at work.

        Raises:
            OSError, ValueError: as `colora_peft.load`; the network is as it was.
        """
        self.model = load(name_or_path, base=self.model, adapter_name=name)
        self.names.append(name)

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: There is none of that name.
        """
        self._check(name)
        self.model.delete_adapter(name)
        self.names.remove(name)
        self._strengths.pop(name, None)

    def blend(self, names: Sequence[str], weights: Sequence[float], name: str) -> None:
        """Add the weighted sum of adapters, exactly, as an adapter of its own.

        Raises:
            ValueError: as `add_weighted_adapter` of CoLoRA.
        """
        self.model.add_weighted_adapter(list(names), list(weights), name, combination_type="cat")
        self.names.append(name)

    def activate(self, name: str, strength: float = 1.0) -> None:
        """Put one adapter to work, `strength` times what it was trained to do: 0 is the bare network.

        Raises:
            ValueError: There is none of that name, or the strength is not in [0, 1.5].
        """
        self._check(name)
        if not 0 <= strength <= MAX_STRENGTH:
            raise ValueError(f"The strength is {strength}; it must be between 0 and {MAX_STRENGTH}.")
        if self.model.active_adapters != [name]:
            self.model.set_adapter(name, inference_mode=True)
        if self._strengths.get(name, 1.0) != strength:  # to walk over all layers takes as long as the switch
            for layer in self.model.modules():
                if isinstance(layer, CoLoRALayer):
                    layer.set_scale(name, strength)
            self._strengths[name] = strength

    @contextmanager
    def at_work(self, name: str, strength: float = 1.0) -> Iterator[nn.Module]:
        """The network with that adapter, or without any for "none".

        Raises:
            ValueError: as `activate`.
        """
        if name != NO_ADAPTER:
            self.activate(name, strength)
            yield self.model
        elif self.names:
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.model

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"There is no adapter {name!r}; choose one of {', '.join([*self.names, NO_ADAPTER])}.")
