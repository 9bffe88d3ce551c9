"""Delaying Ctrl-C past steps that must not be interrupted halfway."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = "interrupted; no incomplete output is left"
"""The command's message after Ctrl-C."""


@contextmanager
def delayed_interrupts() -> Iterator[list[int]]:
    """Ctrl-C takes effect at the end of the block; the list is empty until it is pressed.

    Outside the main thread nothing changes: only the main thread receives Ctrl-C.
    """
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield pending
    finally:
        signal.signal(signal.SIGINT, before)
        if pending:
            signal.raise_signal(signal.SIGINT)
