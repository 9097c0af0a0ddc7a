"""Configuration of NAFNet (Chen et al., "Simple Baselines for Image Restoration", ECCV 2022, arXiv 2204.04676)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from colora_peft.models.backbone import check_counts


class NAFNetConfig(PretrainedConfig):
    """Settings of a [`NAFNetForImageRestoration`].

    The encoder halves the resolution and doubles the channels once per stage, the decoder mirrors it. The defaults
    are the published width-32 network for deblurring (17.1 M parameters).

    Args:
        num_channels: Channels of the images, in and out (3 for RGB).
        width: Channels of the first and last stage.
        encoder_blocks: NAF blocks in each encoder stage (`enc_blk_nums` in the official code).
        middle_blocks: NAF blocks at the lowest resolution (`middle_blk_num`).
        decoder_blocks: NAF blocks in each decoder stage (`dec_blk_nums`); as many stages as the encoder.

    Raises:
        ValueError: if a count is not positive where it must be, or encoder and decoder differ in stages.
    """

    model_type = "nafnet"

    def __init__(
        self,
        num_channels: int = 3,
        width: int = 32,
        encoder_blocks: Sequence[int] = (1, 1, 1, 28),
        middle_blocks: int = 1,
        decoder_blocks: Sequence[int] = (1, 1, 1, 1),
        **kwargs,  # noqa: ANN003 - the keys every PretrainedConfig carries (architectures, dtype, ...)
    ) -> None:
        check_counts(1, num_channels=num_channels, width=width)
        check_counts(0, encoder_blocks=encoder_blocks, middle_blocks=middle_blocks, decoder_blocks=decoder_blocks)
        if len(encoder_blocks) != len(decoder_blocks):
            raise ValueError(
                f"The setting encoder_blocks has {len(encoder_blocks)} stages but decoder_blocks has "
                f"{len(decoder_blocks)}; give both the same number."
            )
        self.num_channels = num_channels
        self.width = width
        self.encoder_blocks = list(encoder_blocks)
        self.middle_blocks = middle_blocks
        self.decoder_blocks = list(decoder_blocks)
        super().__init__(**kwargs)

    @property
    def pads_to_multiple(self) -> int:
        """Height and width, in pixels, are padded up to a multiple of this inside the network."""
        return 2 ** len(self.encoder_blocks)
