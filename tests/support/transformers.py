"""Helpers shared by tests: those of tuner/test_transformers.py."""

import torch
import transformers


def tiny_swin2sr():
    """A tiny Swin2SR, which doubles height and width."""
    torch.manual_seed(0)
    settings = {"image_size": 8, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4, "upscale": 2}
    return transformers.Swin2SRForImageSuperResolution(transformers.Swin2SRConfig(**settings)).eval()
