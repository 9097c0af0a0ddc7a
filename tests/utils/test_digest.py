"""Digests follow every value they are of, and nothing else."""

import pytest
import torch

from colora_peft.utils import digest_of_bytes, digest_of_state, digest_of_weights


def test_stored_digests_keep_their_values():
    """They stand in adapters, checkpoints and restored.jsonl."""
    weights = {"b": torch.arange(4.0).view(2, 2), "a": torch.tensor([0.5])}
    assert digest_of_weights(weights).startswith("edd861e5c23139d1")
    assert digest_of_state(weights, "x", "y") == "d1bb800f646ec57e"
    assert digest_of_bytes(b"abc").startswith("ba7816bf8f01cfea")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_digests_of_a_state_see_every_value_name_shape_type_and_word(dtype):
    weights = {"a": torch.arange(6).to(dtype), "b": torch.tensor(3).to(dtype)}
    same = {"b": weights["b"].clone(), "a": torch.arange(12)[::2].div(2, rounding_mode="floor").to(dtype)}
    assert digest_of_state(weights) == digest_of_state(same)
    others = [
        {**weights, "b": torch.tensor(4).to(dtype)},
        {**weights, "a": weights["a"].view(2, 3)},
        {"a": weights["a"], "c": weights["b"]},
        {**weights, "b": weights["b"].double()},
        {"a": weights["a"]},
    ]
    found = {digest_of_state(weights), digest_of_state(weights, "x"), *(digest_of_state(other) for other in others)}
    assert len(found) == 2 + len(others)
