"""A clean stop on SIGTERM (as a cluster sends it before it takes a machine away) and SIGINT (Ctrl-C).

The signal is only noted; the loop asks for it between two steps, saves and stops. One that comes during an evaluation
waits for its end.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# Where the processes of a run received different ones, the first of these decides.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(SystemExit):
    """A signal ended the run after a checkpoint. Uncaught, the process ends with 128 + signal: 143, or 130 by Ctrl-C.

    A shell reports the same of a process that the signal itself has ended, so that no script or cluster takes the run
    for a finished one. It is not an `Exception`, because code that handles a failed run does not mean this.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path) -> None:
        super().__init__(128 + signum)
        self.step = step
        self.checkpoint = checkpoint


class StopSignals:
    """Notes the stop signals while it is entered, and puts the previous handlers back afterwards.

    A signal that comes again changes nothing: launchers pass theirs on to processes that have it already. Outside of
    the main thread, where Python handles no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            # None: it was not installed from Python and cannot be put back from there.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.received.add(signum)

    def flags(self) -> list[float]:
        """1.0 for each of `STOP_SIGNALS` that came: numbers, to be added up over the processes."""
        return [float(signum in self.received) for signum in STOP_SIGNALS]


def ignore_stop_signals() -> None:
    """Makes a helper process ignore the signals: a cluster sends them to all, but the training process decides."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
