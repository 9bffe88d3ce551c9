"""What TensorRT calls back: its log, forwarded to Python's `logging`, its build progress, and times of layers."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache

from tqdm.auto import tqdm

from ..network.trt import trt

log = logging.getLogger("tensorrt")


@cache
def logger():
    """The process's TensorRT logger. TensorRT keeps using the first one it gets."""

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

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


class Progress:
    """An `IProgressMonitor` for a `with` block. Ctrl-C stops the build at its next step."""

    def __init__(self, title: str, show: bool):
        self.title = title
        self.show = show

    def __enter__(self):
        self.monitor = _monitor(self.title, self.show)
        return self.monitor

    def __exit__(self, *exception) -> None:
        self.monitor.close()
        if self.monitor.interrupted:
            raise KeyboardInterrupt


def _monitor(title: str, show: bool):
    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.bar = tqdm(desc=title, unit="step", disable=not show, total=0)

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.bar.total += num_steps
            self.bar.set_postfix_str(phase_name, refresh=False)

        def phase_finish(self, phase_name):
            pass

        def step_complete(self, phase_name, step):
            try:
                self.bar.update(1)
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def close(self):
            self.bar.total = self.bar.n
            self.bar.close()

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
