"""One network in several threads: every result is that of one thread, bit for bit, and the network is as before."""

import copy
import itertools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from support.backbones import adapted
from support.tiny_networks import tiny_nafnet, tiny_restormer
from torch import nn

from colora_peft import restore_image
from colora_peft.inference import local_pooling, reconstruct

TILES = {"tile": 24, "overlap": 8}
SIZES = [(24, 40), (50, 24), (36, 33), (21, 23)]


class Remembering(nn.Module):
    """Notes the size of its input on itself, as many networks do, and reads it later."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        self.size = x.shape[-2:]
        gate = self.pool(self.conv(x))
        return F.interpolate(F.avg_pool2d(x, 2), self.size) * gate


def images(sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


CASES = {
    "nafnet, adapter": (lambda: adapted(tiny_nafnet()), {}),
    "restormer, adapter": (lambda: adapted(tiny_restormer()), {}),
    "self-ensemble": (lambda: adapted(tiny_nafnet()), {"self_ensemble": True, "statistics_passes": 1}),
    "local": (lambda: adapted(tiny_nafnet()), {"pooling": "local", "pooling_window": 16}),
    "remembers": (Remembering, {"size_multiple": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_four_threads_restore_as_one(case):
    make, settings = CASES[case]
    model = make().train()  # each thread finds it so, or in evaluation mode by another one

    def restore(image):
        return restore_image(model, image, **TILES, **settings)

    expected = [restore(image) for image in images()]
    with ThreadPoolExecutor(4) as pool:
        for restored, alone in zip(pool.map(restore, images() * 2), expected * 2, strict=True):
            assert torch.equal(restored, alone)
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_threads_share_a_network_with_all_ways_to_pool():
    model = adapted(tiny_nafnet())
    ways = [{}, {"pooling": "tile"}, {"pooling": "local", "pooling_window": 16}, {"self_ensemble": True, "tile": None}]
    work = list(itertools.product(images(SIZES[:2]), ways))

    def restore(image, way):
        return restore_image(model, image, **{**TILES, **way})

    expected = list(itertools.starmap(restore, work))
    with ThreadPoolExecutor(4) as pool:
        for restored, alone in zip(pool.map(restore, *zip(*work, strict=True)), expected, strict=True):
            assert torch.equal(restored, alone)


@pytest.mark.parametrize("settings", [{}, {"pooling": "local", "pooling_window": 16}], ids=["picture", "local"])
def test_calls_from_other_threads_and_copies_are_as_if_nothing_was_restored(settings):
    model, image = adapted(tiny_nafnet()), images()[0]
    x = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        expected = reconstruct(model, x)
    alone, main, others = restore_image(model, image, **TILES, **settings), threading.get_ident(), []

    @torch.no_grad()
    def call():
        copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
        return [reconstruct(each, x) for each in (model, *copies)], copies

    with ThreadPoolExecutor(1) as pool:
        hook = _InMain(lambda: others.append(pool.submit(call).result()) if len(others) < 3 else None, main)
        model.get_base_model().encoders[0].register_forward_hook(hook)
        restored = restore_image(model, image, **TILES, **settings)
    assert torch.equal(restored, alone) and others
    for outputs, copies in others:
        assert all(torch.equal(output, expected) for output in outputs)
        with torch.no_grad():
            assert all(torch.equal(reconstruct(each, x), expected) for each in copies)


class _InMain:
    """Hook that works in one thread, and of which copies do nothing."""

    def __init__(self, work=None, thread=None):
        self.work, self.thread = work, thread

    def __call__(self, *_):
        if self.work is not None and threading.get_ident() == self.thread:
            self.work()

    def __reduce__(self):
        return _InMain, ()


def test_local_pooling_of_a_network_is_that_of_all_threads():
    model, x = tiny_nafnet(), torch.rand(1, 3, 48, 48)
    with torch.no_grad(), local_pooling(model, window=16), ThreadPoolExecutor(1) as pool:
        expected = reconstruct(model, x)
        assert torch.equal(pool.submit(torch.no_grad()(reconstruct), model, x).result(), expected)
        assert torch.equal(pool.submit(restore_image, model, x[0], pooling="tile").result(), expected[0].clamp(0, 1))
    assert not torch.equal(reconstruct(model, x), expected)
