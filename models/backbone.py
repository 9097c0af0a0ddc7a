"""Base class of the restoration networks here, and of yours: the contract is in README.md beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageToImage, PreTrainedModel
from transformers.modeling_outputs import ImageSuperResolutionOutput

from .image_processing_restoration import RestorationImageProcessor


class RestorationBackbone(PreTrainedModel):
    """Network that maps degraded images of any size to restored ones of the same size.

    A subclass sets `config_class`, `base_model_prefix`, `_no_split_modules` and `decoder_modules`, registers its
    modules in the order in which they run, and implements `pad` and `restore`. Its own kinds of layers get their
    first weights by `reset_parameters`, as PyTorch's do.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    decoder_modules: tuple[str, ...] = ()
    """Prefixes of the modules after the bottleneck, which `--method decoder` trains."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Gives a module PyTorch's own initial weights instead of the normal ones of transformers."""
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """The first layer: transformers makes its output require a gradient where blocks are checkpointed."""
        return next(self.children())

    def pad(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) continued below and to the right to the sizes that `restore` takes."""
        raise NotImplementedError

    def restore(self, images: Tensor) -> Tensor:
        """Restored images of padded ones, not clamped."""
        raise NotImplementedError

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageSuperResolutionOutput | tuple[Tensor, ...]:
        """Restores a batch of images of any size.

        Args:
            pixel_values: Degraded images (B, `config.num_channels`, H, W) in [0, 1].
            labels: Clean images of the shape of the restored ones. If given, `loss` is the mean absolute difference.
            return_dict: `False` returns a tuple `(loss, reconstruction)` without the parts that are None.

        Returns:
            A ModelOutput with `loss` (scalar, or None without labels) and `reconstruction` (B, C, H, W), not clamped.
            C is `config.num_output_channels` where the configuration has it, else `config.num_channels`.

        Raises:
            ValueError: if `pixel_values` or `labels` has another shape.
        """
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"The pixel_values must have the shape (batch, {channels}, height, width), "
                f"got {tuple(pixel_values.shape)}."
            )
        batch, _, height, width = pixel_values.shape
        restored_shape = (batch, getattr(self.config, "num_output_channels", channels), height, width)
        if labels is not None and labels.shape != restored_shape:
            raise ValueError(
                f"The labels must have the shape of the restored images {restored_shape}, got {tuple(labels.shape)}."
            )
        reconstruction = self.restore(self.pad(pixel_values))[..., :height, :width]
        loss = None if labels is None else F.l1_loss(reconstruction, labels)
        if return_dict or (return_dict is None and self.config.return_dict):
            return ImageSuperResolutionOutput(loss=loss, reconstruction=reconstruction)
        return (reconstruction,) if loss is None else (loss, reconstruction)

    def save_image_processor(self, folder: str | Path) -> None:
        """Writes the file from which `AutoImageProcessor` loads; networks for other images than RGB have none."""
        if self.config.num_channels == 3:
            RestorationImageProcessor().save_pretrained(folder)


def register(backbone: type[RestorationBackbone]) -> None:
    """Makes transformers' Auto classes know a backbone by the `model_type` of its configuration."""
    config = backbone.config_class
    # exist_ok: importing the package twice (reload, notebook) must not fail.
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, backbone, exist_ok=True)
    AutoModelForImageToImage.register(config, backbone, exist_ok=True)
    AutoImageProcessor.register(config, slow_image_processor_class=RestorationImageProcessor, exist_ok=True)


def check_counts(least: int, **settings: int | Sequence[int]) -> None:
    """Refuses settings of a configuration that are below `least`, or of which an entry is."""
    for name, value in settings.items():
        if min([value] if isinstance(value, int) else value, default=least) < least:
            raise ValueError(f"The setting {name} must be at least {least} everywhere, got {value}.")
