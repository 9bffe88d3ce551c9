"""TensorRT's callbacks: its log, forwarded to Python's `logging`, build progress, and layer times."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from tqdm.auto import tqdm

from ..files import delayed_interrupts
from ..network.trt import trt

log = logging.getLogger("tensorrt")

KEPT_ERRORS = 100


@cache
def logger():
    """The process's TensorRT logger. TensorRT keeps using the first one it gets."""

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=KEPT_ERRORS)

        def log(self, severity, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
                log.debug(message)  # the exception repeats it
            elif severity == trt.ILogger.Severity.WARNING:
                log.info(message)
            else:
                log.debug(message)

        def last_error(self) -> str:
            """The last error on one line."""
            return " ".join(self.errors[-1].split()) if self.errors else "no error was logged"

    return Logger()


@contextmanager
def build_progress(title: str, show: bool) -> Iterator:
    """An `IProgressMonitor` with a progress bar. Ctrl-C stops the build at its next step.

    TensorRT would end the process if a `KeyboardInterrupt` came out of the monitor.
    """
    with delayed_interrupts() as pending, tqdm(desc=title, unit="step", disable=not show, total=0) as bar:
        yield _monitor(bar, pending)
        bar.total = bar.n


def _monitor(bar: tqdm, interrupts: list[int]):
    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name, parent_phase, num_steps):
            bar.total += num_steps
            bar.set_postfix_str(phase_name, refresh=False)

        def phase_finish(self, phase_name):
            pass

        def step_complete(self, phase_name, step):
            bar.update(1)
            return not interrupts

    return Monitor()


def layer_timer():
    """An `IProfiler`; its `ms` is the total time of each layer of the plan, by name."""

    class Timer(trt.IProfiler):
        def __init__(self):
            trt.IProfiler.__init__(self)
            self.ms: Counter[str] = Counter()

        def report_layer_time(self, layer_name, ms):
            self.ms[layer_name] += ms

    return Timer()
