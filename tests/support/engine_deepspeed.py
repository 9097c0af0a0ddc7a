"""Helpers shared by tests: those of training/test_engine_deepspeed.py."""

import torch
from peft import get_peft_model
from support.loop import InfiniteGradient, nafnet
from torch import nn

from colora_peft import CoLoRAConfig


def adapted():
    torch.manual_seed(1)
    return get_peft_model(nafnet(), CoLoRAConfig(parameter_budget=0.3))


class Drifting(nn.Module):
    """A buffer that training moves and uses; and weights in the layout that examples/finetune.py hands over."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last)
        self.register_buffer("drift", torch.zeros(1))

    def forward(self, x):
        y = self.layer(x) * (1 + self.drift)
        if self.training:
            self.drift.mul_(0.5).add_(x.detach().mean())
        return y


NETWORKS = {"nafnet": nafnet, "adapted": adapted, "infinite": InfiniteGradient, "drifting": Drifting}
