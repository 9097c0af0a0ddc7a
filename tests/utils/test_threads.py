"""One thread at a time has a network, each in its turn, and hooks and settings of threads do not mix."""

import copy
import gc
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from torch import nn

from colora_peft import CoLoRAConfig
from colora_peft.utils import SharedSettings, alone_with, register_for_this_thread, threads


def network():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())


def wrapped(model):
    return nn.Sequential(nn.Identity(), model)


def adapted(model):
    return get_peft_model(model, CoLoRAConfig(ranks=1))


def visit(model):
    with alone_with(model):
        pass


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("wrap", [lambda model: model, wrapped, torch.compile, adapted, lambda model: model[0]])
def test_a_network_is_found_whatever_wraps_it(wrap):
    model = network()
    other, inside, most = wrap(model), [], []

    def work(each):
        with alone_with(each):
            inside.append(each)
            most.append(len(inside))
            time.sleep(0.002)
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [model, other] * 6))
    assert most == [1] * 12 and not threads._claims


def test_other_networks_need_not_wait():
    with alone_with(network()), ThreadPoolExecutor(1) as pool:
        pool.submit(visit, network()).result(timeout=10)


def test_contexts_of_one_thread_may_be_nested_while_others_wait():
    model = network()
    order = []

    def other():
        with alone_with(wrapped(model)):
            order.append("other")

    with alone_with(model):
        thread = threading.Thread(target=other)
        thread.start()
        wait_for(lambda: len(threads._claims) == 2)
        with alone_with(model), alone_with(wrapped(model)):  # the second has a module that only the other wants, too
            order.append("nested")
    thread.join()
    assert order == ["nested", "other"] and not threads._claims


def test_who_comes_first_is_served_first():
    model, order, workers = network(), [], []

    def work(number):
        with alone_with(model):
            order.append(number)

    with alone_with(model):
        for number in range(6):
            workers.append(threading.Thread(target=work, args=(number,)))
            workers[-1].start()
            wait_for(lambda: len(threads._claims) == len(workers) + 1)
    work("again")
    for worker in workers:
        worker.join()
    assert order == [*range(6), "again"]


def test_an_error_frees_the_network_and_nothing_holds_it():
    model = network()
    with pytest.raises(KeyError), alone_with(model):
        raise KeyError
    with ThreadPoolExecutor(1) as pool:
        pool.submit(visit, model).result(timeout=10)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_hook_acts_in_its_own_thread_and_not_in_copies():
    model, x, seen = network(), torch.rand(1, 3, 2, 2), []
    register_for_this_thread(model[0].register_forward_hook, lambda *_: seen.append(threading.get_ident()))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(each, x).result()
        each(x)
    assert seen == [threading.get_ident()]


def test_settings_last_from_the_first_thread_to_the_last():
    value = ["before"]

    @contextmanager
    def settings():
        previous, value[0] = value[0], "inside"
        yield
        value[0] = previous

    shared = SharedSettings(settings)
    entered, leave = threading.Event(), threading.Event()

    def work():
        with shared:
            entered.set()
            leave.wait(10)

    with shared:
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait(10)
    assert value == ["inside"]
    leave.set()
    thread.join()
    assert value == ["before"]
