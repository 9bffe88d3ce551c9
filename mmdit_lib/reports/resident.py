"""How much memory a call takes, watched from a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psutil

from ..engine.host_memory import return_freed_memory

SECONDS_BETWEEN = 0.003


def resident_during(work: Callable[[], object]) -> list[tuple[float, float]]:
    """(seconds, MB) while `work` runs: this process's resident memory, less what it was before."""
    return_freed_memory()
    process, found, done = psutil.Process(), [], threading.Event()
    before, start = process.memory_info().rss, time.perf_counter()

    def look() -> None:
        found.append((time.perf_counter() - start, (process.memory_info().rss - before) / 1e6))

    def watch() -> None:
        while not done.wait(SECONDS_BETWEEN):
            look()

    look()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    look()
    return found
