"""From an id on the Hub, or a folder, to a network that restores.

Files from elsewhere are not trusted: `colora_peft.hub.source` fetches JSON and safetensors alone, a base that a
function would have to build is not built, and a base with other weights than the adapter was trained on is refused.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from colora_peft.tuner import (
    CoLoRAConfig,
    CoLoRAModel,
    base_fingerprint,
    carried_adapters,
    check_not_compiled,
    is_other_base,
)
from colora_peft.utils import relative_path, some

from .asking import BY_ARGUMENT, BY_FLAG, BY_OTHER_FLAG, Asking
from .networks import is_function, load_backbone, load_from_folder
from .source import ADAPTER_FILES, NETWORK_FILES, Source, fetch

ADAPTER_CONFIG, ADAPTER_WEIGHTS = ADAPTER_FILES


# ------------------------------------------------------------------------------------------------------------- load


def load(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    base: str | Path | nn.Module | None = None,
    adapter_name: str = "default",
) -> nn.Module:
    """A network that restores, in evaluation mode: an adapter on its base, or a network that was tuned as a whole.

    Args:
        name_or_path: A folder or an id on the Hub, with an adapter or with a network.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder inside of it.
        token: For private repositories: True or None takes the one that `hf auth login` has stored.
        base: The network that the adapter was trained on, where it is not found by the name that the adapter has for
            it: a folder, an id on the Hub, `module:function`, or the network itself, which then carries the adapter.
            A network that carries adapters (a result of this function) gets a further one, which is active.
        adapter_name: Name of the adapter inside the network.

    Returns:
        The `PeftModel` of an adapter, the bare network of a network.

    Raises:
        OSError: There is no such folder or repository, access is refused, the Hub does not answer, or the base is not
            found.
        ValueError: The files are incomplete, damaged, not those of a CoLoRA adapter, or of a method version that this
            package does not read; they hold a pickle; or the base has other weights than the adapter was trained
            on, or carries the adapter of another model.
        TypeError: `base` is of another kind.

    Warns:
        UserWarning: The adapter does not say which weights its base has, as those of older versions, or the base given
            is not in float32: then nobody checks that it is the right one.
    """
    source = Source(str(name_or_path), revision, subfolder, token)
    folder = fetch(source)
    if not (folder / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise ValueError(f"{source} is a whole network, no adapter: leave out base.")
        return load_from_folder(folder, source)
    config, network = _config_and_base(folder, source, base, BY_ARGUMENT)
    return _attach(network, folder, config, adapter_name, source, BY_ARGUMENT)


def load_for_script(
    name_or_path: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
    adapter_name: str = "default",
    asking: Asking | None = None,
) -> PeftModel:
    """An adapter on its base, as `load`, with messages for the user of a script, where `base` is --model_name_or_path.

    Args:
        name_or_path: A folder or an id on the Hub, with an adapter.
        base: as `load`.
        adapter_name: as `load`.
        asking: How messages ask for the base. Default: by the flag, which was given if `base` is.

    Raises:
        OSError: as `load`.
        ValueError: as `load`; or it is a whole network.
    """
    source = Source(str(name_or_path))
    folder = fetch(source, (ADAPTER_FILES,))
    asking = asking or _by_flag(base)
    config, network = _config_and_base(folder, source, base, asking)
    return _attach(network, folder, config, adapter_name, source, asking)


def _by_flag(base: object) -> Asking:
    return BY_FLAG if base is None else BY_OTHER_FLAG


def _config_and_base(
    folder: Path, source: Source, base: str | Path | nn.Module | None, asking: Asking
) -> tuple[CoLoRAConfig, nn.Module]:
    """The configuration of the adapter in `folder`, and the network of `base`, or else the one that it names."""
    config = _read_config(folder, source)
    _check_readable(folder / ADAPTER_WEIGHTS, source)
    if isinstance(base, nn.Module):
        return config, base
    if base is None:
        return config, _find_base(config, folder, source, asking)
    if isinstance(base, str | Path):
        return config, load_backbone(str(base), token=source.token)
    raise TypeError(f"The base is a {type(base).__name__}: pass a folder, an id on the Hub, or a network.")


def load_base(name_or_path: str | Path, *, token: str | bool | None = None) -> nn.Module:
    """The bare network that an adapter of any PEFT method names as its base, searched for as `load` does.

    Args:
        name_or_path: A folder or an id on the Hub, with an adapter.
        token: For private repositories.

    Its messages are for the user of a script, where the base is --model_name_or_path.

    Raises:
        OSError: The adapter or its base is not found.
        ValueError: The adapter is incomplete, damaged or a pickle, or names no base, or one that is a function.
    """
    source = Source(str(name_or_path), token=token)
    folder = fetch(source, (ADAPTER_FILES,))
    if peft_type_of(folder, source) == "COLORA":
        return _find_base(_read_config(folder, source), folder, source, BY_FLAG)
    return _find_base(_read_foreign_config(folder, source), folder, source, BY_FLAG)


def load_for_training(
    name_or_path: str | Path, *, base: str | Path | None = None, token: str | bool | None = None
) -> PeftModel:
    """An adapter on its base, to be trained further: with its weights, its ranks, and only its parameters trainable.

    Args:
        name_or_path: A folder or an id on the Hub, with a CoLoRA adapter or one of PEFT's LoRA.
        base: The network that the adapter was trained on, where it is not found by the name that the adapter has for
            it: a folder, an id on the Hub, or `module:function`. The adapter then has this name for it.
        token: For private repositories.

    Its messages are for the user of a script, where `base` is --model_name_or_path.

    Raises:
        OSError: as `load`.
        ValueError: as `load`; or the adapter is of another method than these two.

    Warns:
        UserWarning: as `load`. An adapter of LoRA never says which weights its base has.
    """
    source = Source(str(name_or_path), token=token)
    folder = fetch(source, (ADAPTER_FILES,))
    method = peft_type_of(folder, source)
    if method not in ("COLORA", "LORA"):
        raise ValueError(
            f"{source} is an adapter of the PEFT method {method!r}: only adapters of CoLoRA and LoRA are trained "
            "further."
        )
    config = _read_config(folder, source) if method == "COLORA" else _read_foreign_config(folder, source)
    _check_readable(folder / ADAPTER_WEIGHTS, source)
    if base is None:
        network = _find_base(config, folder, source, BY_FLAG)
    else:
        network = load_backbone(str(base), token=token)
    model = _attach(network, folder, config, "default", source, _by_flag(base), is_trainable=True)
    if method == "LORA":
        _check_complete(model, folder, source)
    # The result may lie elsewhere than the adapter, from where a folder would not be found by the same relative path.
    name = str(base) if base is not None else config.base_model_name_or_path
    if base is None and not Path(name).exists() and Path(network.name_or_path).is_dir():
        name = relative_path(network.name_or_path)
    config.base_model_name_or_path = name
    if base is not None:
        config.revision = getattr(getattr(network, "config", None), "_commit_hash", None)
    return model


def _check_complete(model: PeftModel, folder: Path, source: Source) -> None:
    """Refuses an adapter whose layers are not those of the network: PEFT leaves out what it does not find."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    differing = sorted(stored ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys())
    if differing:
        raise ValueError(
            f"The adapter {source} does not fit a {type(model.get_base_model()).__name__}: {some(differing)} are only "
            "in one of the two. Give the network that it was trained on."
        )


def peft_type_of(folder: Path, source: Source) -> str:
    """The PEFT method of the adapter in `folder`, as its configuration calls it.

    Raises:
        ValueError: The configuration is damaged.
    """
    file = folder / ADAPTER_CONFIG
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["peft_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The {ADAPTER_CONFIG} of {source} is damaged ({error!r}): {_remedy(file)}.") from error


def _read_config(folder: Path, source: Source) -> CoLoRAConfig:
    """The configuration of the adapter, from its file alone."""
    file, peft_type = folder / ADAPTER_CONFIG, peft_type_of(folder, source)
    if peft_type != "COLORA":
        raise ValueError(
            f"{source} is an adapter of the PEFT method {peft_type!r}, not COLORA: load it with "
            "peft.PeftModel.from_pretrained."
        )
    # A string would be read as the path of a file.
    if isinstance(json.loads(file.read_text(encoding="utf-8")).get("contributions"), str):
        raise ValueError(f"The contributions of {source} are a path instead of scores: {_remedy(file)}.")
    try:
        return CoLoRAConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"The adapter {source} cannot be used. {error}") from error


def _read_foreign_config(folder: Path, source: Source) -> PeftConfig:
    """The configuration of an adapter of another PEFT method."""
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"The adapter {source} cannot be used. {error}") from error


def _check_readable(file: Path, source: Source) -> None:
    """Refuses a damaged file before anything is changed, as far as its header tells."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"The {file.name} of {source} is damaged ({error}): {_remedy(file)}.") from error


def _remedy(file: Path) -> str:
    return f"fetch it again from its origin (here it is {file})"


# ------------------------------------------------------------------------------------------------------------- base


def _find_base(config: PeftConfig, folder: Path, source: Source, asking: Asking) -> nn.Module:
    """The network that the adapter names as its base."""
    name = config.base_model_name_or_path
    ask = asking.for_base()
    if not name:
        raise ValueError(f"The adapter {source} does not name its base: {ask}.")
    if is_function(name):
        raise ValueError(
            f"The base of {source} is made by the function {name}, which an adapter cannot call by itself: if you "
            f"trust it, {asking.way}{name!r}."
        )
    for start in _starts(folder, source):
        if (start / name / NETWORK_FILES[0]).is_file():
            return load_backbone(str(start / name))
    if not Source(name).is_hub_id:
        raise FileNotFoundError(f"The base of {source}, the folder {name}, is not on this machine: {ask}.")
    try:
        return load_backbone(name, revision=config.revision, token=source.token)
    except (OSError, ValueError) as error:
        raise type(error)(f"The base {name} of {source} was not found. {error} Or {ask}.") from error


def _starts(folder: Path, source: Source) -> list[Path]:
    """Folders from which that of a base is looked for: runs are started anywhere, and adapters lie beside bases."""
    return [Path.cwd(), *(folder.resolve().parents if source.is_folder else ())]


def _free_name(name: str, taken: list[str]) -> str:
    return name if name not in taken else f"{name}_{len(taken) + 1}"


def _name_of(network: nn.Module) -> str | None:
    """The name by which `load_backbone` was asked for the network, or the base of an adapted one."""
    return getattr(network.get_base_model() if isinstance(network, PeftModel) else network, "name_or_path", None)


def _other_base(network: nn.Module, name: str | None, folder: Path, source: Source, asking: Asking) -> str:
    """The message where the weights of the network are not those of the adapter's base, which it calls `name`."""
    given = _name_of(network) or ""
    if name and is_function(name) and name == given:
        return (
            f"The adapter {source} was trained on other weights than {name} returns now. The function must return the "
            "same at every call: seed what it draws, or load it from a file."
        )
    named = [(start / name).resolve() for start in _starts(folder, source)] if name else []
    has_changed = given != "" and (given == name or (Path(given).is_dir() and Path(given).resolve() in named))
    remedy = asking.for_changed(name) if has_changed else asking.for_other(name)
    return (
        f"The adapter {source} was trained on another network than the one it is to be put on: the weights differ. "
        f"{remedy}"
    )


def _attach(
    network: nn.Module,
    folder: Path,
    config: PeftConfig,
    adapter_name: str,
    source: Source,
    asking: Asking,
    is_trainable: bool = False,
) -> nn.Module:
    """Puts the adapter onto the network, if that is the one it was trained on."""
    check_not_compiled(network)
    adapted = isinstance(network, PeftModel)
    if adapted and not isinstance(network.base_model, CoLoRAModel):
        raise ValueError("The base carries adapters of another PEFT method: pass the bare network.")
    if not adapted and (carried := carried_adapters(network)):
        raise ValueError(
            f"The base carries adapter {carried[0]!r} already, and the model it belongs to would run the new one. "
            f"Load it onto that model, colora_peft.load({str(source)!r}, base=model, "
            f"adapter_name={_free_name(adapter_name, carried)!r}), or pass a base that carries none."
        )
    if adapted and adapter_name in network.peft_config:
        raise ValueError(f"The base has an adapter {adapter_name!r}: choose another adapter_name.")
    fingerprint = network.base_model.fingerprint_of_base() if adapted else base_fingerprint(network)
    wanted: str | None = getattr(config, "base_fingerprint", None)
    if is_other_base(wanted, fingerprint):
        raise ValueError(_other_base(network, config.base_model_name_or_path, folder, source, asking))
    if wanted is None or fingerprint is None:
        what = f"The adapter {source} does not say" if wanted is None else "The base does not show"
        warnings.warn(
            f"{what} which weights its base has: whether {config.base_model_name_or_path!r} is the right one was not "
            "checked.",
            stacklevel=3,
        )
    device = str(next(network.parameters()).device)
    try:
        if adapted:
            network.load_adapter(str(folder), adapter_name, torch_device=device)
            network.set_adapter(adapter_name)
            return network.requires_grad_(False).eval()  # set_adapter lets the active one be trained
        model = PeftModel.from_pretrained(
            network, str(folder), adapter_name, is_trainable, config=config, torch_device=device
        )
        return model.eval()
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"The adapter {source} cannot be put on a {type(network).__name__}. {error}") from error
