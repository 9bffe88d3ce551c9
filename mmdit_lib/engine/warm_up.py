"""Steps that run in threads to compile a GPU's kernels, while a program loads the rest of a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock, Thread

log = logging.getLogger("mmdit_lib")

_running: set[Thread] = set()
_one_at_a_time = Lock()


def start(step: Callable[[], object]) -> None:
    """Run `step` in a thread. If it fails, that is only logged: the first real step will raise it again."""

    def run() -> None:
        with _one_at_a_time:
            try:
                step()
            except Exception:
                log.debug("a step that compiles kernels failed", exc_info=True)

    thread = Thread(target=run, name="warm-up")
    _running.add(thread)
    thread.start()


def wait() -> None:
    """Return when all of them have ended: while a CUDA graph is captured, no other thread may use CUDA."""
    for thread in [*_running]:
        thread.join()
        _running.discard(thread)  # another thread may have waited, too
