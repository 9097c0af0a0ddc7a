"""Helpers shared by tests: those of training/test_fsdp.py."""

import torch


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5, msg=name)
