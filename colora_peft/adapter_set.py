"""A network with several adapters, each used in turn, and the bare network among them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from .restore_record import fingerprint

__all__ = ["NO_ADAPTER", "AdapterSet", "adapter_labels"]

NO_ADAPTER = "none"

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

    Args:
        network: The bare network; its layers are wrapped.
        adapters: By label, a folder or an id on the Hub; "none" for the bare network.

    Attributes:
        labels: In the order given.
        fingerprints: By label, of the network's and the adapter's weights and settings.

    Raises:
        ValueError: PEFT finds no adapter there, or it does not fit the network; it names the adapter.
    """

    def __init__(self, network: nn.Module, adapters: Mapping[str, str]) -> None:
        self.labels = list(adapters)
        base = fingerprint(network.state_dict())
        self.fingerprints, self._names = {}, {}
        self._model = network
        for number, (label, path) in enumerate(adapters.items()):
            if path == NO_ADAPTER:
                self.fingerprints[label] = base
                continue
            name = f"adapter_{number}"  # a label may hold dots, which PEFT does not allow
            self._load(path, name)
            self._names[label] = name
            config = {
                key: value for key, value in self._model.peft_config[name].to_dict().items() if key not in _ORIGIN
            }
            weights = get_peft_model_state_dict(self._model, adapter_name=name)
            self.fingerprints[label] = fingerprint(weights, base, json.dumps(config, sort_keys=True, default=str))
        self._model.eval()

    def _load(self, path: str, name: str) -> None:
        try:
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(path, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, path, adapter_name=name)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise ValueError(f"The adapter {path} cannot be loaded: {error}") from error

    @contextmanager
    def active(self, label: str) -> Iterator[nn.Module]:
        """The network with that adapter, inside."""
        if label in self._names:
            self._model.set_adapter(self._names[label])
            yield self._model
        elif isinstance(self._model, PeftModel):
            with self._model.disable_adapter():
                yield self._model
        else:
            yield self._model
