"""Recognises official NAFNet and Restormer checkpoints and reads all settings of their networks.

Names and shapes of a state dict fix every hyper-parameter but the epsilons of norms, which are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from colora_peft.utils import some

from .nafnet import NAFNetConfig, NAFNetForImageRestoration
from .restormer import RestormerConfig, RestormerForImageRestoration

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """A network for which official checkpoints exist.

    Attributes:
        name: Name as its authors write it.
        model_class: Class of the network here.
        signature: Keys of a state dict by which the network is recognised, if all are there.
        read_config: Function from the shapes of a state dict to the configuration.
        licence: Sentences about the licence of the official weights.
        licence_metadata: The licence for the head of a model card on the Hub.
        note: Further sentences for a user of the converted weights.
    """

    name: str
    model_class: type[PreTrainedModel]
    signature: tuple[str, ...]
    read_config: Callable[[Shapes], PretrainedConfig]
    licence: str
    licence_metadata: str
    note: str


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def count(shapes: Shapes, prefix: str) -> int:
    """Number of the modules `prefix.0`, `prefix.1`, ... of which the last one has weights."""
    parts = [name[len(prefix) + 1 :].split(".")[0] for name in shapes if name.startswith(f"{prefix}.")]
    return max((int(part) for part in parts if part.isdecimal()), default=-1) + 1


def read_nafnet_config(shapes: Shapes) -> NAFNetConfig:
    width, num_channels = shapes["intro.weight"][:2]
    return NAFNetConfig(
        num_channels=num_channels,
        width=width,
        encoder_blocks=[count(shapes, f"encoders.{stage}") for stage in range(count(shapes, "encoders"))],
        middle_blocks=count(shapes, "middle_blks"),
        decoder_blocks=[count(shapes, f"decoders.{stage}") for stage in range(count(shapes, "decoders"))],
    )


def read_restormer_config(shapes: Shapes) -> RestormerConfig:
    width, num_channels = shapes["patch_embed.proj.weight"][:2]
    levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    return RestormerConfig(
        num_channels=num_channels,
        num_output_channels=shapes["output.weight"][0],
        width=width,
        num_blocks=[count(shapes, level) for level in levels],
        num_refinement_blocks=count(shapes, "refinement"),
        num_heads=[shapes[f"{level}.0.attn.temperature"][0] for level in levels],
        ffn_expansion=_read_ffn_expansion(shapes),
        bias="encoder_level1.0.attn.qkv.bias" in shapes,
        norm_bias="encoder_level1.0.norm1.body.bias" in shapes,
        dual_pixel="skip_conv.weight" in shapes,
    )


def _read_ffn_expansion(shapes: Shapes) -> float:
    """Factor with the fewest decimals that gives every feed-forward network the width it has.

    Widths are rounded down, so that a range of factors gives the same network. For the published networks 2.66 is the
    only factor of two decimals.
    """
    projections = [shape[:2] for name, shape in shapes.items() if name.endswith(".ffn.project_out.weight")]
    for decimals in range(7):
        step = 10**decimals
        lowest = max(-(-hidden * step // channels) for channels, hidden in projections)
        if all(int(channels * (lowest / step)) == hidden for channels, hidden in projections):
            return lowest / step
    raise ValueError("the feed-forward networks (*.ffn.project_out.weight) do not widen by one common factor")


ARCHITECTURES = (
    Architecture(
        name="NAFNet",
        model_class=NAFNetForImageRestoration,
        signature=("intro.weight", "ending.weight", "encoders.0.0.beta", "middle_blks.0.sca.1.weight"),
        read_config=read_nafnet_config,
        licence="The official weights of NAFNet (github.com/megvii-research/NAFNet) are under the MIT licence, "
        "Copyright (c) 2022 megvii-model.",
        licence_metadata="license: mit",
        note="The published figures on GoPro and REDS were obtained with pooling over local windows in place of the "
        "whole image, at test time only. This class pools over the whole image, as SIDD's figures do.",
    ),
    Architecture(
        name="Restormer",
        model_class=RestormerForImageRestoration,
        signature=("patch_embed.proj.weight", "encoder_level1.0.attn.temperature", "latent.0.attn.temperature",
                   "output.weight"),
        read_config=read_restormer_config,
        licence="The official weights of Restormer (github.com/swz30/Restormer) are under an academic public licence: "
        "**non-commercial use only**, copies and modifications under the same licence, with credit to its authors.",
        licence_metadata="license: other\nlicense_name: academic-public-license\n"
        "license_link: https://github.com/swz30/Restormer/blob/main/LICENSE.md",
        note="Images whose sides are no multiple of 8 are padded by reflection inside.",
    ),
)  # fmt: skip


def recognise(weights: Mapping[str, Tensor]) -> Architecture:
    """Architecture that has its whole signature among the keys.

    Raises:
        ValueError: if there is none; the message says which keys were looked for, and some that were found.
    """
    for architecture in ARCHITECTURES:
        if all(key in weights for key in architecture.signature):
            return architecture
    looked_for = "; ".join(f"{known.name} has {', '.join(known.signature)}" for known in ARCHITECTURES)
    raise ValueError(f"it is of no known architecture: {looked_for}; its own keys are {some(sorted(weights))}")
