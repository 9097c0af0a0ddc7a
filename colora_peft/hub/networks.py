"""Loads the network that is adapted: from a folder, from the Hub, or from a function of the user's own."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageToImage

from colora_peft.utils import some

from .source import ADAPTER_FILES, NETWORK_FILES, Source, fetch

__all__ = ["is_function", "load_backbone", "load_from_folder", "register_backbones"]

_ENTRY_POINTS = "colora_peft.backbones"
_MODULE_AND_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")


@cache
def register_backbones() -> None:
    """Imports every module that installed packages name under the entry point group `colora_peft.backbones`.

    Such a module registers its networks with transformers' Auto classes when it is imported; `colora_peft.models` is
    one of them. By entry point, because the method itself does not depend on any backbone.
    """
    for entry_point in entry_points(group=_ENTRY_POINTS):
        entry_point.load()


def is_function(name_or_path: str) -> bool:
    """Whether a network's name is `module:function`, and not a folder of that name."""
    return _MODULE_AND_FUNCTION.fullmatch(name_or_path) is not None and not Path(name_or_path).exists()


def load_backbone(
    name_or_path: str, *, revision: str | None = None, subfolder: str = "", token: str | bool | None = None
) -> nn.Module:
    """A restoration network in float32 (adapters are trained on full precision) and evaluation mode, on the CPU.

    Args:
        name_or_path: A folder of `save_pretrained`, an id on the Hub, or `module:function`, a function without
            arguments that returns the network as any `nn.Module`; the module may lie in the current directory. Where
            the network takes sizes of some multiple only, the function sets its attribute `needs_multiple_of`
            (`colora_peft.inference.network`).
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder inside the repository or `name_or_path` that holds the network.
        token: For private repositories, as in transformers.

    Raises:
        ValueError: if a function is named together with `revision` or `subfolder`, or its module or name is not there;
            or if there is no network in safetensors, or a damaged or unknown one.
        TypeError: if what it returns is not an `nn.Module`.
        OSError: if there is no such folder or repository, or the Hub does not answer.
    """
    if is_function(str(name_or_path)):
        if revision is not None or subfolder:
            raise ValueError(f"{name_or_path} is a function: leave out revision and subfolder.")
        network = _call(*str(name_or_path).split(":")).float().eval()
        network.name_or_path = str(name_or_path)  # PEFT writes it into adapters, as the name of their base
        return network
    source = Source(str(name_or_path), revision, subfolder, token)
    return load_from_folder(fetch(source, (NETWORK_FILES,)), source)


def load_from_folder(folder: Path, source: Source) -> nn.Module:
    """The network in `folder`, as `load_backbone`; it remembers from where on the Hub it came.

    Raises:
        ValueError: its files are damaged or lack weights, or are of a kind of network that no installed package knows;
            or an adapter lies beside them, which transformers would put onto the network, or even load its base
            instead.
    """
    if (folder / ADAPTER_FILES[0]).is_file():
        raise ValueError(
            f"The network {source} lies in one folder with an adapter, and would not be bare: move {ADAPTER_FILES[0]} "
            "and its weights to a folder of their own, and load that by colora_peft.load."
        )
    register_backbones()
    try:
        network, loaded = AutoModelForImageToImage.from_pretrained(
            str(folder),
            dtype=torch.float32,
            use_safetensors=True,  # never a pickle, nor code that came with it
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The network {source} cannot be loaded: {error}") from error
    if loaded["missing_keys"]:  # transformers would leave them random, and say so in a table
        raise ValueError(
            f"The network {source} lacks weights of {some(sorted(loaded['missing_keys']), limit=3)}: its file is of "
            "another network, or of a wrapped one; save it again."
        )
    if source.is_hub_id and not source.subfolder:
        # Not the folder in this machine's cache: adapters that are trained on it write down where it is from.
        network.name_or_path = network.config.name_or_path = source.name_or_path
        network.config._commit_hash = folder.name
    return network.eval()


def _call(module_name: str, function_name: str) -> nn.Module:
    # A script's own folder is on the path, the one that it is started from is not. At the end: nothing is shadowed.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports something that is not
        raise ValueError(
            f"There is no module {module_name} to take {function_name} from: run from the folder that holds it, or "
            "install it."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"The module {module_name} has no function {function_name}; check the name after the colon.")
    try:
        inspect.signature(function, follow_wrapped=False).bind()  # a decorator may give what it wraps
    except TypeError as error:
        raise ValueError(f"{module_name}:{function_name} must be a function without arguments: {error}.") from error
    except ValueError:  # a builtin that does not tell its arguments
        pass
    network = function()
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{module_name}:{function_name} returned {type(network).__name__}; it must return an nn.Module."
        )
    return network
