"""Variants of the measurement of speed: two networks, the ways to adapt them, and their steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from colora_peft import (
    CoLoRAConfig,
    adaptable_layers,
    allocate_ranks,
    prepare_model_for_compiled_hotswap,
    weight_matrix_shape,
)
from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration
from colora_peft.training import reconstruct, restoration_loss
from colora_peft.tuner import lora_obstacle

TRAINED = ("full", "lora", "colora")
"""Variants of a training step. The floor comes on top: forward pass and gradient of the input alone."""
INFERRED = ("bare", "lora", "colora", "colora trainable")
"""Variants of inference: `colora` as `PeftModel.from_pretrained` leaves it, `trainable` as `set_adapter` does.
Compiled networks are also `pinned`: after `prepare_model_for_compiled_hotswap`."""


class ResidualCNN(nn.Module):
    """A plain restoration network of 3 x 3 convolutions, 64 channels wide: (B, 3, H, W) to the same."""

    def __init__(self, channels: int = 64, num_blocks: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
            )
            for _ in range(num_blocks)
        )
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.first(pixel_values)
        for block in self.blocks:
            x = x + block(x)
        return pixel_values + self.last(x)


def make_network(name: str) -> nn.Module:
    """NAFNet of width 32 (17 M parameters) or the CNN (0.6 M), channels_last as in training, every block at work."""
    torch.manual_seed(0)
    network = NAFNetForImageRestoration(NAFNetConfig()) if name == "nafnet" else ResidualCNN()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key.endswith((".beta", ".gamma")):  # zero at first, which would hide the blocks' gradients
                parameter.normal_(std=0.1)
    return network.to(memory_format=torch.channels_last)


def uniform_ranks(network: nn.Module, parameter_budget: float) -> dict[str, int]:
    """The same share of every layer, as far as whole ranks and stock LoRA allow."""
    layers = adaptable_layers(network)
    ranks = allocate_ranks({n: weight_matrix_shape(layer) for n, layer in layers.items()}, None, parameter_budget)
    return {name: rank for name, rank in ranks.items() if rank and lora_obstacle(layers[name]) is None}


def make_variant(network: nn.Module, variant: str, parameter_budget: float) -> nn.Module:
    """A copy of `network`, adapted or trained as `variant` says. The adapters are not the identity."""
    network = copy.deepcopy(network)
    if variant in ("bare", "floor"):
        return network.requires_grad_(False)
    if variant == "full":
        return network
    ranks = uniform_ranks(network, parameter_budget)
    if variant == "lora":
        patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
        targets = "|".join(re.escape(name) for name in ranks)
        config = LoraConfig(
            target_modules=targets, rank_pattern=patterns, alpha_pattern=patterns, init_lora_weights=False
        )
        return get_peft_model(network, config)
    model = get_peft_model(network, CoLoRAConfig(ranks=ranks, init_weights=False))
    if variant in ("colora", "colora pinned"):
        model.set_adapter("default", inference_mode=True)
    if variant == "colora pinned":
        prepare_model_for_compiled_hotswap(model.eval())
    return model


@dataclass(frozen=True)
class Mode:
    """Where and how the networks run."""

    device: str
    bfloat16: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.device} {'bf16' if self.bfloat16 else 'fp32'}{' compiled' if self.compiled else ''}"

    def autocast(self) -> AbstractContextManager:
        """Context manager in which the forward pass runs."""
        return torch.autocast(self.device, torch.bfloat16) if self.bfloat16 else nullcontext()

    def wait(self) -> None:
        """Waits until the device has done all its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def modes() -> list[Mode]:
    """All modes of this machine."""
    found = [Mode("cpu")]
    if torch.cuda.is_available():
        found += [Mode("cuda", *flags) for flags in ((False, False), (True, False), (False, True), (True, True))]
    return found


def images(shape: str, device: str) -> dict[str, Tensor]:
    """A batch of noise for a shape like "2x256": images x side in pixels."""
    count, side = (int(number) for number in shape.split("x"))
    images = torch.rand(2, count, 3, side, side, device=device)
    return {
        "pixel_values": images[0].contiguous(memory_format=torch.channels_last),
        "labels": images[1].contiguous(memory_format=torch.channels_last),
    }


def training_step(model: nn.Module, mode: Mode, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One step of AdamW on the trainable parameters; the floor has none and asks for the input's gradient."""
    parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    if not parameters:
        batch = {**batch, "pixel_values": batch["pixel_values"].requires_grad_()}
    optimizer = torch.optim.AdamW(parameters or [batch["pixel_values"]], lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        with mode.autocast():
            loss = restoration_loss(model, batch)
        loss.backward()
        if parameters:
            optimizer.step()

    return step


def take_steps(model: nn.Module, mode: Mode, shape: str) -> None:
    """Takes three training steps, after which memory has reached its peak."""
    step = training_step(model, mode, images(shape, mode.device))
    for _ in range(3):
        step()


def inference(model: nn.Module, mode: Mode, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One restoration of a batch."""
    model.eval()

    def run() -> None:
        with torch.no_grad(), mode.autocast():
            reconstruct(model, batch["pixel_values"])

    return run
