"""Checks of command-line flags that scripts share."""

from __future__ import annotations


def check_at_least(args: object, name: str, least: int) -> None:
    """Refuse a flag whose value is below `least`."""
    if getattr(args, name) < least:
        raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")


def check_seed(seed: int) -> None:
    """Refuse a seed that NumPy or torch would refuse."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be at least 0 and below 2**32, got {seed}.")
