"""Configuration of Restormer (Zamir et al., CVPR 2022, arXiv 2111.09881)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from colora_peft.models.backbone import check_counts

NUM_LEVELS = 4


class RestormerConfig(PretrainedConfig):
    """Settings of a [`RestormerForImageRestoration`].

    Four levels; each halves the resolution and doubles the channels. The defaults are the published network for
    deraining, deblurring and defocus of single RGB images (26.1 M parameters); its denoisers are without
    `norm_bias`, those of grey images have `num_channels=1`, and defocus of dual-pixel images has `num_channels=6`
    and `dual_pixel=True`.

    Args:
        num_channels: Channels of the degraded images (3 for RGB, 6 for the two views of a dual-pixel camera).
        num_output_channels: Channels of the restored images; None stands for `num_channels`, or half of them for
            dual-pixel images.
        width: Channels of the first level.
        num_blocks: Transformer blocks at each level, encoder and decoder alike.
        num_refinement_blocks: Transformer blocks after the decoder, at full resolution.
        num_heads: Attention heads at each level; each divides the channels of its level.
        ffn_expansion: The feed-forward network widens its input by this factor, rounded down to whole channels.
        bias: Whether the convolutions of the blocks, the 1 x 1 ones between levels and the last one have biases.
        norm_bias: Whether the layer norms subtract the mean and add a bias (`WithBias` in the official code), or
            only divide by the standard deviation (`BiasFree`).
        dual_pixel: Whether a convolution of the first features is added before the last layer, in place of the
            image after it.

    Raises:
        ValueError: if a count is not positive where it must be, a level is missing, heads do not divide the channels,
            or a network that adds the image to its output would change the number of channels.
    """

    model_type = "restormer"

    def __init__(
        self,
        num_channels: int = 3,
        num_output_channels: int | None = None,
        width: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion: float = 2.66,
        bias: bool = False,
        norm_bias: bool = True,
        dual_pixel: bool = False,
        **kwargs,  # noqa: ANN003 - the keys every PretrainedConfig carries (architectures, dtype, ...)
    ) -> None:
        if num_output_channels is None:
            num_output_channels = num_channels // 2 if dual_pixel else num_channels
        check_counts(1, num_channels=num_channels, num_output_channels=num_output_channels, num_heads=num_heads)
        check_counts(0, num_blocks=num_blocks, num_refinement_blocks=num_refinement_blocks)
        if width < 2 or width % 2:
            raise ValueError(f"The setting width must be even and at least 2, got {width}.")
        if not dual_pixel and num_output_channels != num_channels:
            raise ValueError(
                f"A network that adds the image to its output keeps the channels, but num_channels is {num_channels} "
                f"and num_output_channels {num_output_channels}; set dual_pixel=True or make them equal."
            )
        if len(num_blocks) != NUM_LEVELS or len(num_heads) != NUM_LEVELS:
            raise ValueError(
                f"The settings num_blocks {list(num_blocks)} and num_heads {list(num_heads)} must have {NUM_LEVELS} "
                "entries each, one for each level."
            )
        for level, heads in enumerate(num_heads):
            if width * 2**level % heads:
                raise ValueError(
                    f"The setting num_heads {list(num_heads)} asks for {heads} heads at level {level + 1}, which do "
                    f"not divide its {width * 2**level} channels."
                )
        if int(width * ffn_expansion) < 1:
            raise ValueError(
                f"The setting ffn_expansion is {ffn_expansion}, which leaves no channel of {width}; make it larger."
            )
        self.num_channels = num_channels
        self.num_output_channels = num_output_channels
        self.width = width
        self.num_blocks = list(num_blocks)
        self.num_refinement_blocks = num_refinement_blocks
        self.num_heads = list(num_heads)
        self.ffn_expansion = ffn_expansion
        self.bias = bias
        self.norm_bias = norm_bias
        self.dual_pixel = dual_pixel
        super().__init__(**kwargs)

    @property
    def pads_to_multiple(self) -> int:
        """Height and width, in pixels, are padded up to a multiple of this inside the network."""
        return 2 ** (NUM_LEVELS - 1)
