"""Export of a restoration network to one file that other runtimes run: ONNX, or `torch.export` (.pt2).

Images go in and come out as float32 RGB (B, 3, H, W) in [0, 1], not clamped, under the names `pixel_values` and
`reconstruction`. Before anything is written, the file's content is run by its own runtime on images of several sizes
and compared with PyTorch.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from colora_peft.inference import needed_multiple, output_images, reconstruct
from colora_peft.utils import pad_to_multiple, write_bytes

__all__ = ["EXPORT_SUFFIXES", "ExportError", "ExportFormat", "ExportSettings", "SizeCheck", "export_network"]

ExportFormat = Literal["onnx", "torch_export"]
EXPORT_SUFFIXES: Mapping[str, str] = {"onnx": ".onnx", "torch_export": ".pt2"}
METADATA_FILE = "colora_peft.json"
"""Name of the metadata in a .pt2 file; an .onnx file has them as its properties."""

# Batch, height and width of the checks: sides that are multiples of usual strides and sides that are not, and several
# images. The network is traced at another size.
_CHECKED = ((1, 64, 64), (2, 96, 128), (1, 77, 101), (3, 64, 83), (1, 131, 72))
# Smaller than most strides. Padding by reflection takes another branch there, which a trace at a larger size does not
# hold; some networks do not take it either.
_SMALL = (1, 3, 40)
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}
_INPUT, _OUTPUT = "pixel_values", "reconstruction"


class ExportError(ValueError):
    """Error of a network that cannot be exported, or of an exported file that does not restore as the network does."""


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export.

    Args:
        format: "onnx", or "torch_export", which `torch.export.load` reads.
        fixed_size: Height and width of the images, one at a time, for runtimes and networks that need them fixed.
            None: images of any size and number.
        half_precision: Weights and arithmetic in float16: half the file. Images stay float32.
        tolerance: Greatest accepted difference to PyTorch in float32, of pixel values in [0, 1]. None: 1e-4, or 2e-2
            in half precision, which is our choice: five levels of 8 bits.
        metadata: Further metadata of the file.

    Raises:
        ValueError: An unknown format, or a size or tolerance that is not positive.
    """

    format: ExportFormat = "onnx"
    fixed_size: tuple[int, int] | None = None
    half_precision: bool = False
    tolerance: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format not in EXPORT_SUFFIXES:
            raise ValueError(f"The format is {self.format!r}: choose one of {', '.join(EXPORT_SUFFIXES)}.")
        if self.fixed_size is not None and min(self.fixed_size) < 1:
            raise ValueError(f"The fixed_size is {self.fixed_size}: give height and width of at least 1 pixel.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"The tolerance is {self.tolerance}: choose it above 0, for example 1e-4.")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.half_precision else torch.float32

    @property
    def greatest_difference(self) -> float:
        return _TOLERANCES[self.dtype] if self.tolerance is None else self.tolerance


@dataclass(frozen=True)
class SizeCheck:
    """Greatest absolute difference of a pixel between the file's output and PyTorch's, at one size."""

    batch: int
    height: int
    width: int
    max_difference: float


def export_network(network: nn.Module, path: str | Path, settings: ExportSettings | None = None) -> list[SizeCheck]:
    """Exports a network, compares the result with it, and writes it to `path`, replacing what is there.

    Args:
        network: Any network that `reconstruct` takes, of float32 RGB images, on the CPU and without adapters (merge
            them by `merge_and_unload`). It is run in evaluation mode and not changed.
        path: The file; its folder is made.
        settings: Default: ONNX, any size, float32.

    Returns:
        One check for each size. Where the last, of 3 x 40 pixels, is missing, the file does not restore images so
        small. The metadata name the least side that was checked.

    Raises:
        ExportError: The network or one of its layers cannot be exported, or the result differs by more than the
            tolerance. Nothing is written.
        ImportError: Packages for ONNX are missing.
        ValueError: The network does not restore images of 3 channels and the sizes that are checked.
        OSError: The file cannot be written.
    """
    settings = settings or ExportSettings()
    if settings.format == "onnx":
        _check_onnx_packages()
    network = copy.deepcopy(network).eval()
    shapes = _CHECKED if settings.fixed_size is None else ((1, *settings.fixed_size),)
    images = [_images(shape) for shape in shapes]
    with torch.no_grad():
        expected = [reconstruct(network, image) for image in images]
        program = _trace(_Restorer(copy.deepcopy(network).to(settings.dtype)), settings)
        if settings.fixed_size is None and (small := _restored_small(network, program, settings)) is not None:
            images.append(_images(_SMALL))
            expected.append(small)
    metadata = _metadata(settings, min(min(image.shape[-2:]) for image in images))
    data = _onnx_bytes(program, settings, metadata) if settings.format == "onnx" else _pt2_bytes(program, metadata)
    run = _onnx_runner(data) if settings.format == "onnx" else _pt2_runner(data)
    checks = [_check(run, image, wanted, settings) for image, wanted in zip(images, expected, strict=True)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return checks


class _Restorer(nn.Module):
    """Network from images to images, run as `reconstruct` does but in the precision of its weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.dtype = next(network.parameters()).dtype
        self.multiple = needed_multiple(network)

    def forward(self, pixel_values: Tensor) -> Tensor:
        padded = pad_to_multiple(pixel_values.to(self.dtype), self.multiple)
        restored = output_images(self.network, self.network(padded))
        if self.multiple > 1:
            restored = restored[..., : pixel_values.shape[-2], : pixel_values.shape[-1]]
        return restored.to(pixel_values.dtype)


def _trace(restorer: _Restorer, settings: ExportSettings) -> ExportedProgram:
    if settings.fixed_size is not None:
        dynamic, shape = None, (1, *settings.fixed_size)
    else:
        if getattr(getattr(restorer.network, "config", None), "model_type", None) == "swin2sr":
            # Its masks are built in loops over the size, with which torch.export does not end in a useful time.
            raise ExportError(
                f"{type(restorer.network).__name__} cannot be exported for any size: the masks of its windows depend "
                "on it. Give a fixed_size (on the command line --height and --width)."
            )
        dynamic = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
        # Sides that are no multiples of a stride, so that padding is traced, and large enough to be mirrored.
        shape = (2, max(67, restorer.multiple + 3), max(90, restorer.multiple + 6))
    example = _images(shape)
    try:
        program = torch.export.export(restorer, (example,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises whatever the network and its own passes raise
        raise _cannot_be_exported(error, restorer.network, settings) from error
    # Tracing notes each condition that it met on a size, many of them about the layout of memory: NAFNet's say "no
    # multiple of 16" of a graph that is right for all. The checks tell which sizes the graph is right for.
    if hasattr(program, "_guards_code"):
        program._guards_code = []
    return program


def _restored_small(network: nn.Module, program: ExportedProgram, settings: ExportSettings) -> Tensor | None:
    """Returns what the network makes of an image smaller than its stride; None if the program does not make that."""
    images = _images(_SMALL)
    try:
        expected = reconstruct(network, images)
        _check(program.module(), images, expected, settings)
    except Exception:  # whatever the user's network raises, or the operators on shapes that they were not traced for
        return None
    return expected


def _cannot_be_exported(error: Exception, network: nn.Module, settings: ExportSettings) -> ExportError:
    layer = _innermost_module(error, network)
    where = f"The layer {layer!r} ({type(network.get_submodule(layer)).__name__})" if layer else type(network).__name__
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = "with a fixed_size it may work" if settings.fixed_size is None else "torch.export does not follow it"
    return ExportError(f"{where} cannot be exported; {remedy}. The reason: {reason}")


def _innermost_module(error: BaseException, network: nn.Module) -> str | None:
    """Returns the name of the network's module whose code was running when the error came, if any."""
    names = {id(module): name for name, module in network.named_modules()}
    found, trace = None, error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found or None


def _check_onnx_packages() -> None:
    missing = " ".join(name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None)
    if missing:
        raise ImportError(f"Exporting to ONNX needs further packages: pip install {missing}.")


def _onnx_bytes(program: ExportedProgram, settings: ExportSettings, metadata: Mapping[str, str]) -> bytes:
    axes = None if settings.fixed_size is not None else ({0: "batch", 2: "height", 3: "width"},)
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                dynamic_shapes=axes,
            )
    except Exception as error:  # many kinds, some of them private; the innermost names the operator
        reason = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise ExportError(
            f"ONNX has no form for a layer of this network: {str(reason).strip().splitlines()[0]} The format "
            "torch_export may take it."
        ) from error
    model = exported.model_proto
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return model.SerializeToString()


def _onnx_runner(data: bytes) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([_OUTPUT], {_INPUT: images.numpy()})[0])


def _pt2_bytes(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(dict(metadata), indent=2)})
    return buffer.getvalue()


def _pt2_runner(data: bytes) -> Callable[[Tensor], Tensor]:
    with _quiet():
        return torch.export.load(io.BytesIO(data)).module()


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without PyTorch's warnings about its own parts and its log of what it skips."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _images(shape: tuple[int, int, int]) -> Tensor:
    """Returns images (B, 3, H, W) in [0, 1] with large forms and noise, the same at each call."""
    batch, height, width = shape
    generator = torch.Generator().manual_seed(height * width)
    forms = nn.functional.interpolate(torch.rand(batch, 3, 8, 8, generator=generator), (height, width), mode="bicubic")
    return (forms + 0.1 * torch.randn(batch, 3, height, width, generator=generator)).clamp(0, 1)


@torch.no_grad()
def _check(run: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor, settings: ExportSettings) -> SizeCheck:
    batch, _, height, width = images.shape
    what = f"{batch} x {height} x {width} (batch, height, width)"
    try:
        restored = run(images)
    except Exception as error:  # of the runtime
        raise ExportError(
            f"The exported network fails on images of {what}, which PyTorch restores: export it with a fixed_size. "
            f"The reason: {str(error).strip().splitlines()[0]}"
        ) from error
    same_shape = restored.shape == expected.shape
    difference = (restored - expected).abs().max().item() if same_shape else float("inf")
    if not difference <= settings.greatest_difference:  # also refuses NaN
        raise ExportError(
            f"The exported network differs from PyTorch by {difference:.2g} on images of {what}, more than the "
            f"tolerance of {settings.greatest_difference:g}: "
            + ("leave half precision out" if settings.half_precision else "export it with a fixed_size")
            + ", or raise the tolerance if that is good enough."
        )
    return SizeCheck(batch, height, width, difference)


def _metadata(settings: ExportSettings, smallest_side: int) -> dict[str, str]:
    size = f"any of at least {smallest_side} pixels a side"
    if settings.fixed_size is not None:
        size = "{} x {}, batch 1".format(*settings.fixed_size)
    return {
        "pictures": "float32 RGB (batch, 3, height, width) in [0, 1], in and out; clamp the output",
        "size": size,
        "precision": str(settings.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        **settings.metadata,
    }
