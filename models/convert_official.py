"""Converts an official NAFNet or Restormer checkpoint to a folder that transformers loads.

    python -m colora_peft.models.convert_official FILE OUT

FILE is a .pth of the authors, or safetensors with the same keys. OUT then is what
`AutoModelForImageToImage.from_pretrained` takes (after `import colora_peft.models`). The network's settings are read
from the checkpoint; weights load strictly and are stored as float32. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import inspect
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from colora_peft.utils import (
    PARTIAL,
    check_writable,
    digest_of_bytes,
    print_any_name,
    some,
    write_text,
    writing_folder,
)

from .official_architectures import Architecture, recognise, shapes_of

WRAPPERS = ("params_ema", "params", "state_dict")
"""Keys under which training codes put the weights. The first that has any counts: averages are what gets published."""


def convert(file: str | Path, out: str | Path) -> PreTrainedModel:
    """Reads `file`, writes the folder `out` (config.json, model.safetensors, README.md) and returns the network.

    Raises:
        FileNotFoundError: `file` is not there.
        FileExistsError: `out` is there already, and not an empty folder.
        ValueError: `file` holds code, is no checkpoint, of an unknown architecture, or not all and only its weights.
    """
    file, out = Path(file), Path(out)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}; name a checkpoint, such as a .pth of the authors.")
    check_is_free(out)
    check_writable(out.parent, "The folder above OUT,")
    try:
        weights = unwrap(read_checkpoint(file))
        architecture = recognise(weights)
        model = build_model(architecture, weights)
    except ValueError as error:
        raise ValueError(f"{file} cannot be converted: {error}.") from error
    with writing_folder(out, keep_others=True) as folder:
        model.save_pretrained(folder)
        model.save_image_processor(folder)
        write_text(folder / "README.md", model_card(architecture, model, file, out.name))
        check_is_free(out)  # again: somebody may have filled it meanwhile
    return model


def check_is_free(out: Path) -> None:
    """Refuses an output that is there, unless it is a folder with nothing but what is being written."""
    if out.exists() and not (out.is_dir() and all(path.name.endswith(PARTIAL) for path in out.iterdir())):
        raise FileExistsError(f"{out} is there already and is not overwritten; name another folder or remove it.")


def read_checkpoint(file: Path) -> Any:
    """Content of `file`, by safetensors or by torch.load without the right to run code."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"it is no safetensors file ({error})") from error
    try:
        # The one place where something else than safetensors and JSON is read: official checkpoints are pickles.
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not code:
            raise ValueError("it is no checkpoint of torch.save that holds weights alone") from error
        raise ValueError(f"it holds more than weights, loading could run {code[1]}; it was not loaded") from error
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, UnicodeDecodeError) as error:
        # Whatever torch's readers of its two formats stumble over in a file of another kind, or a truncated one.
        raise ValueError("it is no checkpoint of torch.save, or damaged") from error


def unwrap(content: Any) -> dict[str, Tensor]:
    """State dict within `content`, however it is wrapped, without the `module.` of DataParallel."""
    while isinstance(content, Mapping):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError("it holds no weights under names, alone or under " + ", ".join(WRAPPERS))
    others = [
        str(key)
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, Tensor) and value.is_floating_point())
    ]
    if others:
        raise ValueError(f"it is no state dict: {some(others)} are no weights, and none of {', '.join(WRAPPERS)} is")
    weights = dict(content)
    while all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): tensor for key, tensor in weights.items()}
    return weights


def build_model(architecture: Architecture, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Network with exactly these weights, as float32."""
    found, looks_like = shapes_of(weights), f"it looks like {architecture.name}, but"
    try:
        config = architecture.read_config(found)
    except KeyError as error:
        raise ValueError(f"{looks_like} the key {error} is missing") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"{looks_like} no network has such shapes ({str(error).rstrip('.')})") from error
    with torch.device("meta"):
        model = architecture.model_class(config)
    expected = shapes_of(model.state_dict())
    wrong = {
        "missing": [key for key in expected if key not in found],
        "left over": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} ({found[key]}, not {shape})" for key, shape in expected.items() if found.get(key, shape) != shape
        ],
    }
    complaints = [f"{what} are {some(keys)}" for what, keys in wrong.items() if keys]
    if complaints:
        raise ValueError(f"{looks_like} {'; '.join(complaints)}")
    # Copies: tensors of a checkpoint may share memory.
    own = {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in weights.items()}
    model.load_state_dict(own, strict=True, assign=True)
    return model.eval()


def model_card(architecture: Architecture, model: PreTrainedModel, file: Path, name: str) -> str:
    digest = digest_of_bytes(file.read_bytes())
    settings = inspect.signature(type(model.config).__init__).parameters.keys() - {"self", "kwargs"}
    rows = "\n".join(f"| {name} | {value} |" for name, value in vars(model.config).items() if name in settings)
    return f"""---
library_name: transformers
pipeline_tag: image-to-image
tags: [image-restoration]
{architecture.licence_metadata}
---

# {name}

{architecture.name}, {model.num_parameters() / 1e6:.2f} M parameters, converted from the checkpoint `{file.name}`
(sha256 `{digest}`) by `python -m colora_peft.models.convert_official`.

**The task is unknown**: the checkpoint does not say what its network was trained for, and on which images.

**Licence.** {architecture.licence} The conversion cannot tell whether the file is one of them; if it is not, ask where
it comes from.

{architecture.note}

| Read from the checkpoint | |
|---|---|
{rows}

```python
import colora_peft.models
from transformers import AutoModelForImageToImage

model = AutoModelForImageToImage.from_pretrained("{name}")
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m colora_peft.models.convert_official",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("file", metavar="FILE", help="A .pth of the authors, or safetensors with the same keys.")
    parser.add_argument("out", metavar="OUT", help="The folder to write; it must not be there yet.")
    print_any_name()
    args = parser.parse_args()
    try:
        model = convert(args.file, args.out)
    except (ValueError, OSError, SafetensorError) as error:  # the last where the disk is full
        sys.exit(f"convert_official: {error}")
    print(f"""{type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters, task unknown.
Saved in {args.out}. Licence: see {Path(args.out) / "README.md"}. Load it with:

import colora_peft.models
from transformers import AutoModelForImageToImage
model = AutoModelForImageToImage.from_pretrained({args.out!r})""")


if __name__ == "__main__":
    main()
