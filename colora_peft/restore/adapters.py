"""A network and its adapters, of which one at a time, or none, is at work."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn

from colora_peft.hub import ADAPTER_FILES, BY_FLAG, Asking, Source, fetch, load_for_script, peft_type_of
from colora_peft.tuner import CoLoRALayer, carried_adapters
from colora_peft.utils import PARTIAL, digest_of_state

NO_ADAPTER = "none"
MAX_STRENGTH = 1.5

_COLORA = "COLORA"
_LOADS_OTHERS = "XLORA"  # its configuration names further adapters, which PEFT would fetch, pickles as well
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# Settings of an adapter that change nothing of what it does: where it came from, and how it is loaded.
_ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")


def adapters_in(folder: str | Path) -> dict[str, Path]:
    """The adapters right below `folder`, by the names of their folders, sorted.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds none.
    """
    folder, config = Path(folder), ADAPTER_FILES[0]
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; check the path.")
    paths = (path.parent for path in sorted(folder.glob(f"*/{config}")))
    found = {path.name: path for path in paths if not path.name.endswith(PARTIAL)}
    if not found:
        raise ValueError(f"The folder {folder} holds no adapters, which are folders with an {config}: name another.")
    return found


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


def _check_method(method: str, only_colora: bool) -> None:
    if only_colora and method != _COLORA:
        raise ValueError(f"its method is {method}, and only adapters of CoLoRA can be added here: name one of these.")
    if method.upper() == _LOADS_OTHERS:
        raise ValueError(f"its method, {method}, loads further adapters by itself: name those one by one.")


class AdapterSet:
    """Adapters of a network, loaded for inference.

    PEFT allows one method on a network: for each method among the adapters the network is copied.

    Args:
        network: The bare network, which stays bare.
        adapters: By label, a folder or an id on the Hub; "none" for the bare network.
        asking: How messages ask for another network, where an adapter is not for this one.

    Attributes:
        labels: Labels in the order in which the adapters came.

    Raises:
        ValueError: The network is not bare; else as `add`.
    """

    def __init__(self, network: nn.Module, adapters: Mapping[str, str | Path], asking: Asking = BY_FLAG) -> None:
        if carried := carried_adapters(network):
            raise ValueError(
                f"The network carries adapter {carried[0]!r} already: pass the bare one, as `load_backbone` gives it."
            )
        self.labels: list[str] = []
        self._bare = network.eval()
        self._asking = asking
        self._by_method: dict[str, PeftModel] = {}
        self._adapted: dict[str, tuple[PeftModel, str]] = {}  # by label, with PEFT's name of the adapter
        self._names = (f"adapter_{number}" for number in itertools.count())  # a label may hold dots, PEFT's may not
        self._strengths: dict[str, float] = {}
        self._digests: dict[str, str] = {}
        for label, path in adapters.items():
            if path == NO_ADAPTER:
                self.labels.append(label)
            else:
                self.add(label, path)

    def add(self, label: str, path: str | Path, only_colora: bool = False) -> None:
        """Loads one more adapter, from a folder or the Hub.

        Args:
            label: Its label.
            path: A folder or an id on the Hub.
            only_colora: Whether to refuse other methods, whose loading is PEFT's: for adapters that strangers name.

        Raises:
            ValueError: there is no adapter, its weights are not in safetensors, its method is refused, it does not fit
                the network, or (CoLoRA, whose adapters know it) was trained on another one. It names the adapter, and
                all is as it was.
        """
        path = str(path)
        if not Path(path).is_dir() and not _HUB_ID.fullmatch(path):
            raise ValueError(f"There is no folder {path} with an adapter; check the path.")
        source, name = Source(path), next(self._names)
        try:
            folder = fetch(source, (ADAPTER_FILES,))  # never a pickle
            method = peft_type_of(folder, source)
            _check_method(method, only_colora)
            self._by_method[method] = self._load(method, source, folder, name)
        except (ValueError, TypeError, OSError, RuntimeError, KeyError, SafetensorError) as error:
            raise ValueError(f"The adapter {path} cannot be loaded: {error}") from error
        self._keep(label, self._by_method[method], name)

    def _load(self, method: str, source: Source, folder: Path, name: str) -> PeftModel:
        """The network of that method with one more adapter; after an error it has what it had."""
        device = str(next((parameter.device for parameter in self._bare.parameters()), "cpu"))
        known = self._by_method.get(method)
        model = known or copy.deepcopy(self._bare)
        try:
            if method == _COLORA:
                # Refuses another base.
                model = load_for_script(source.name_or_path, base=model, adapter_name=name, asking=self._asking)
            elif known:
                known.load_adapter(str(folder), adapter_name=name, torch_device=device)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, torch_device=device)
        except Exception:
            if known and name in known.peft_config:
                known.delete_adapter(name)
            raise
        return model.eval()

    def remove(self, label: str) -> None:
        """Forgets an adapter.

        Raises:
            ValueError: There is none of that label.
        """
        model, name = self._find(label)
        model.delete_adapter(name)
        self.labels.remove(label)
        for known in (self._adapted, self._strengths, self._digests):
            known.pop(label, None)

    def blend(self, labels: Sequence[str], weights: Sequence[float], label: str) -> None:
        """Adds the exact weighted sum of CoLoRA adapters, as an adapter of its own.

        Raises:
            ValueError: as `add_weighted_adapter` of CoLoRA, or if there is no adapter of one of the labels.
        """
        (model, *_), names = zip(*(self._find(one) for one in labels), strict=True)
        name = next(self._names)
        model.add_weighted_adapter(list(names), list(weights), name, combination_type="cat")
        self._keep(label, model, name)

    def activate(self, label: str, strength: float = 1.0) -> nn.Module:
        """The network with that adapter alone, until another is activated; "none" is the bare network.

        Args:
            label: One of `labels`, or "none".
            strength: Factor on what a CoLoRA adapter was trained to do, between 0 (the bare network) and 1.5.

        Raises:
            ValueError: There is no such adapter, or its strength cannot be that.
        """
        if label == NO_ADAPTER and label not in self._adapted:
            return self._bare
        model, name = self._find(label)
        if not 0 <= strength <= MAX_STRENGTH:
            raise ValueError(f"The strength is {strength}; it must be between 0 and {MAX_STRENGTH}.")
        switched = model.active_adapters != [name] or self._strengths.get(label, 1.0) != strength
        if model.active_adapters != [name]:
            model.set_adapter(name, inference_mode=True)
        if self._strengths.get(label, 1.0) != strength:  # walking over all layers takes as long as the switch
            if model is not self._by_method.get(_COLORA):
                raise ValueError(f"The strength of {label} is fixed, because it is no CoLoRA adapter: leave it at 1.")
            for layer in model.modules():
                if isinstance(layer, CoLoRALayer):
                    layer.set_scale(name, strength)
            self._strengths[label] = strength
        if switched:
            model.eval()  # some networks compute weights from others when they enter evaluation mode
        return model

    def digest_of(self, label: str) -> str:
        """Digest of the network's and the adapter's weights and settings, wherever they came from."""
        if label not in self._digests:
            # With the class: another one that has the same weights, or none, may do something else.
            kind = f"{type(self._bare).__module__}.{type(self._bare).__qualname__}"
            digest = digest_of_state(self._bare.state_dict(), kind)
            if label in self._adapted:
                model, name = self._adapted[label]
                settings = {key: value for key, value in model.peft_config[name].to_dict().items()
                            if key not in _ORIGIN}  # fmt: skip
                weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
                digest = digest_of_state(weights, digest, json.dumps(settings, sort_keys=True, default=str))
            self._digests[label] = digest
        return self._digests[label]

    def _keep(self, label: str, model: PeftModel, name: str) -> None:
        self._adapted[label] = model, name
        self.labels.append(label)

    def _find(self, label: str) -> tuple[PeftModel, str]:
        if label not in self._adapted:
            raise ValueError(
                f"There is no adapter {label!r}; choose one of {', '.join(dict.fromkeys([*self.labels, NO_ADAPTER]))}."
            )
        return self._adapted[label]
