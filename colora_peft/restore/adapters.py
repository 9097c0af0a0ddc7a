"""A network with several adapters, each used in turn, and the bare network among them."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn

from colora_peft.hub import ADAPTER_FILES, Source, fetch, load, peft_type_of

from .record import fingerprint

__all__ = ["NO_ADAPTER", "AdapterSet", "adapter_labels"]

NO_ADAPTER = "none"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# Of an adapter's settings: where it came from and how it is loaded, which change nothing of what it does.
_ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")


def adapter_labels(adapters: Sequence[str]) -> list[str]:
    """A short name for each, fit for a folder: the last part of its path, or the last two where that is not enough.

    Raises:
        ValueError: one is given twice, or two have the same last parts.
    """
    last = [PurePath(adapter).name or "adapter" for adapter in adapters]
    counts = Counter(last)
    labels = [
        name if counts[name] == 1 else "-".join(PurePath(adapter).parts[-2:])
        for name, adapter in zip(last, adapters, strict=True)
    ]
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise ValueError(f"Several adapters are called {', '.join(twice)}; give each once, and rename one of those.")
    return labels


class AdapterSet:
    """Adapters of a network, loaded for inference.

    PEFT allows one method on a network: for each method among the adapters the network is copied.

    Args:
        network: The bare network, which stays bare.
        adapters: By label, a folder or an id on the Hub; "none" for the bare network.

    Attributes:
        labels: In the order given.
        fingerprints: By label, of the network's and the adapter's weights and settings.

    Raises:
        ValueError: there is no adapter, its weights are not in safetensors, it does not fit the network, or (CoLoRA,
            whose adapters know it) was trained on another one; it names the adapter.
    """

    def __init__(self, network: nn.Module, adapters: Mapping[str, str]) -> None:
        self.labels = list(adapters)
        # With the kind: one without weights, or with the same, may do something else.
        base = fingerprint(network.state_dict(), f"{type(network).__module__}.{type(network).__qualname__}")
        self.fingerprints = {label: base for label, path in adapters.items() if path == NO_ADAPTER}
        self._bare = network.eval()
        self._device = str(next((parameter.device for parameter in network.parameters()), "cpu"))
        self._adapted: dict[str, tuple[PeftModel, str]] = {}  # by label, with PEFT's name of the adapter
        by_method: dict[str, PeftModel] = {}
        for number, (label, path) in enumerate(adapters.items()):
            if path == NO_ADAPTER:
                continue
            name = f"adapter_{number}"  # a label may hold dots, which PEFT does not allow
            model = self._load(path, name, by_method).eval()
            self._adapted[label] = model, name
            config = {key: value for key, value in model.peft_config[name].to_dict().items() if key not in _ORIGIN}
            weights = get_peft_model_state_dict(model, adapter_name=name)
            self.fingerprints[label] = fingerprint(weights, base, json.dumps(config, sort_keys=True, default=str))

    def _load(self, path: str, name: str, by_method: dict[str, PeftModel]) -> PeftModel:
        if not Path(path).is_dir() and not _HUB_ID.fullmatch(path):
            raise ValueError(f"There is no folder {path} with an adapter; check the path.")
        source = Source(path)
        try:
            folder = fetch(source, (ADAPTER_FILES,))  # never a pickle
            method = peft_type_of(folder, source)
            network = by_method[method] if method in by_method else copy.deepcopy(self._bare)
            if method == "COLORA":
                by_method[method] = load(path, base=network, adapter_name=name)  # refuses another base
            elif method in by_method:
                network.load_adapter(str(folder), adapter_name=name, torch_device=self._device)
            else:
                by_method[method] = PeftModel.from_pretrained(
                    network, str(folder), adapter_name=name, torch_device=self._device
                )
        except (ValueError, TypeError, OSError, RuntimeError, KeyError, SafetensorError) as error:
            raise ValueError(f"The adapter {path} cannot be loaded: {error}") from error
        return by_method[method]

    def activate(self, label: str) -> nn.Module:
        """The network with that adapter alone, until another is activated."""
        if label not in self._adapted:
            return self._bare
        model, name = self._adapted[label]
        model.set_adapter(name)
        return model
