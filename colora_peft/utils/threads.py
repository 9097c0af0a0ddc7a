"""Sharing between threads: a network, which each gets for itself, its hooks, and settings of the whole process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclass(eq=False)
class _Claim:
    """Wish of a thread to be alone with some modules."""

    thread: int
    modules: frozenset[nn.Module]
    granted: bool = False


_claims: list[_Claim] = []  # of all threads, granted or not, first come, first served
_change = threading.Condition()


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Context in which one thread at a time has the network; others wait for their turn, in the order of their coming.

    Any two networks that share a module count as one, however they are wrapped. Contexts of one thread may be nested.
    Nothing is noted on the network.
    """
    claim = _Claim(threading.get_ident(), frozenset(model.modules()))
    with _change:
        is_nested = any(other.granted and other.thread == claim.thread for other in _claims)
        _claims.insert(0 if is_nested else len(_claims), claim)  # those who wait for this thread must not stop it
        try:
            _change.wait_for(lambda: _is_its_turn(claim))
        except BaseException:
            _withdraw(claim)
            raise
        claim.granted = True
    try:
        yield
    finally:
        with _change:
            _withdraw(claim)


def _is_its_turn(claim: _Claim) -> bool:
    place = _claims.index(claim)
    rivals = (other for at, other in enumerate(_claims) if other.granted or at < place)
    return all(other.thread == claim.thread or other.modules.isdisjoint(claim.modules) for other in rivals)


def _withdraw(claim: _Claim) -> None:
    _claims.remove(claim)
    _change.notify_all()


class SharedSettings:
    """Context for settings of the whole process: the first thread to enter makes them, the last to leave ends them.

    Without it, two threads that overlap would each put back what the other one had set.

    Args:
        settings: Makes the context that sets and puts back.
    """

    def __init__(self, settings: Callable[[], AbstractContextManager[Any]]) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._entered = self._settings()
                self._entered.__enter__()
            self._inside += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._entered.__exit__(None, None, None)


class _HookOfOneThread:
    """Hook of a module that acts in the thread that made it. Copies and pickles of it do nothing."""

    def __init__(self, hook: Callable[..., Any] | None) -> None:
        self._hook = hook
        self._thread = threading.get_ident()

    def __call__(self, *args: Any) -> Any:
        is_own = torch.compiler.is_compiling() or self._thread == threading.get_ident()
        return self._hook(*args) if self._hook is not None and is_own else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)


_registering = threading.Lock()


def register_for_this_thread(register: Callable[[Any], RemovableHandle], hook: Callable[..., Any]) -> RemovableHandle:
    """Registers a hook that sees only those calls of the module that come from this thread.

    Args:
        register: Method of the module, such as `module.register_forward_hook`.
        hook: The hook.
    """
    with _registering:  # PyTorch may give hooks of two threads one number, and the later replaces the earlier
        return register(_HookOfOneThread(hook))
