"""Time, memory and facts of the machine, as all measurements take them, and how they keep their results."""

from __future__ import annotations

import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch

from colora_peft.hub import hardware_name
from colora_peft.utils import write_json, write_text
from examples.experiments.tables import table_line

Row = dict[str, Any]
"""One measured figure and what it belongs to, as JSON keeps it."""


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------------------- time


def take_turns(
    runs: dict[Any, Callable[[], object]],
    rounds: int,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Returns the seconds of each run in each round.

    All runs take turns, because machines are noisy. Every other round goes backwards, so that no place is the better
    one. A first round warms up and does not count.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            wait()
            start = clock()
            runs[name]()
            wait()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median, over the rounds, of the ratio within a round."""
    return statistics.median(own / other for own, other in zip(seconds, others, strict=True))


# ----------------------------------------------------------------------------------------------------------- memory


def in_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Result of `function` in a process of its own, which does not begin with the memory of this one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(function, *arguments).result()


def peak_memory(device: str, run: Callable[..., object], *arguments: object) -> int:
    """Bytes that `run(*arguments)` takes at its peak; to be called in a fresh process.

    On the CPU it is the growth of the process since before the call.
    """
    if device == "cuda":
        run(*arguments)
        return torch.cuda.max_memory_allocated()
    process, peaks, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            peaks[0] = max(peaks[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run(*arguments)
    finally:
        done.set()
        watcher.join()
    return peaks[0] - before


def peak_memories(
    device: str, run: Callable[..., object], arguments: dict[str, Sequence[object]], repeats: int
) -> dict[str, float]:
    """Peak bytes of each variant, whose arguments of `run` are given: the median over `repeats` fresh processes."""
    peaks: dict[str, list[int]] = {variant: [] for variant in arguments}
    for _ in range(repeats):
        for variant, own in arguments.items():
            peaks[variant].append(in_fresh_process(peak_memory, device, run, *own))
    return {variant: statistics.median(own) for variant, own in peaks.items()}


# ---------------------------------------------------------------------------------------------------------- results


def machine_facts(device: torch.device, *packages: str) -> dict[str, str]:
    """Hardware, and versions of Python and the packages."""
    python = {"python": sys.version.split()[0]}
    return {"hardware": hardware_name(device), **python, **{name: version(name) for name in packages}}


def machine_name(facts: Row) -> str:
    """Name of a result's files: the hardware and the version of torch."""
    return re.sub(r"[^a-z0-9.]+", "-", f"{facts['hardware']} torch{facts['torch']}".lower()).strip("-")


def settings_text(results: Row, *without: str) -> str:
    """The facts and flags of a result in one line, without its figures."""
    return ", ".join(f"{name} {value}" for name, value in results.items() if name not in without)


def save_results(folder: str | Path, name: str, results: Row, report: Callable[[Row], str]) -> None:
    """Writes the results as JSON and beside it the report that is made of them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", results)
    write_text(folder / f"{name}.md", report(results))
    print(f"Saved in {folder / name}.md.")


def shown(rows: Iterable[Row], line: Callable[[Row], list[str]]) -> list[Row]:
    """All rows, each printed as a line of a table as soon as it is measured."""
    kept = []
    for row in rows:
        print(table_line(line(row)), flush=True)
        kept.append(row)
    return kept
