"""This rank's side of the heartbeat: start its watchdog and report what the rank is doing.

Each rank has a watchdog, a small process of its own (`watchdog.py`). A thread could not do this: it stops
with a stopped process, and it waits while a long C call holds the GIL.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .launch import launched_locally, launched_rank, launched_size
from .verdict import WATCHDOG, Here

HEARTBEAT_SECONDS = 25
"""How long a rank may give no sign of life, by default. All ranks have ended some seconds later."""
ROLL_CALL = 7301
"""MPI tag of the messages with which ranks announce themselves to each other."""
MESSAGE_BYTES = 512


class Watchdog:
    """The process that watches this one, and the address at which rank 0's can be reached."""

    def __init__(self) -> None:
        self.address, listener = {}, None
        if launched_rank() == 0:
            here = launched_locally()
            listener = socket.create_server(("127.0.0.1" if here else "", 0))
            host = "127.0.0.1" if here else os.environ.get("MASTER_ADDR") or socket.getfqdn()
            name, port = socket.gethostname(), listener.getsockname()[1]
            self.address = {"host": host, "name": name, "port": port, "token": secrets.token_hex(16)}
        passed = [listener.fileno()] if listener else []
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", WATCHDOG, *map(str, passed)], pass_fds=passed, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths}, start_new_session=True,
        )  # fmt: skip
        os.set_blocking(self.process.stdin.fileno(), False)
        if listener:
            listener.close()
            self.tell(address=self.address)

    def tell(self, **message) -> None:
        """Never waits: a watchdog that does not read must not hold up its rank."""
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self.process.stdin.fileno(), json.dumps(message).encode() + b"\n")


_watchdog: Watchdog | None = None
_activity: tuple[str, float | None] = ("the calling program", None)


def start_watchdog() -> None:
    """Start this rank's watchdog; with one rank, or if it has been started, does nothing."""
    global _watchdog
    if _watchdog is None and launched_size() > 1:
        _watchdog = Watchdog()
        atexit.register(announce, "left")


@contextmanager
def doing(what: str, limit: float | None = None) -> Iterator[None]:
    """What this rank is doing in a `with` block, for the message if it freezes there.

    Args:
        what: for instance 'step 3 of 28'.
        limit: seconds that it may take; by default any time. No limit is shorter than the heartbeat's timeout.
    """
    global _activity
    before = _activity
    _say(what, limit)
    try:
        yield
    finally:
        _say(*before)


def _say(what: str, limit: float | None) -> None:
    global _activity
    _activity = (what, limit)
    if _watchdog is not None:
        _watchdog.tell(doing=what, limit=limit)


def announce(end: str) -> None:
    """This process is about to end: it 'left' normally, or 'failed' and shows why itself."""
    if _watchdog is not None:
        _watchdog.tell(end=end)


def watch(world, seconds: float, timeout: float | None = None) -> None:
    """Wait until every rank has called this as often as this one, and let the watchdogs monitor all of them.

    Args:
        world: MPI's communicator of all ranks.
        seconds: how long to wait.
        timeout: seconds without a sign of life after which all ranks end; rank 0's counts. 0: never; None: as set
            before, at first `HEARTBEAT_SECONDS`.

    Raises:
        TimeoutError: naming the ranks that have not called this.
    """
    start_watchdog()
    addresses = roll_call(world, seconds, _watchdog.address if _watchdog else {})
    if _watchdog is not None:
        _watchdog.tell(address=addresses[0])
        _watchdog.tell(timeout=timeout)


def roll_call(world, seconds: float, message: dict) -> dict[int, dict]:
    """Send `message` to all ranks and return theirs, by rank. Raises `TimeoutError` naming those that are missing."""
    found, missing = {world.rank: message}, set(range(world.size)) - {world.rank}
    content = json.dumps(message).encode()
    assert len(content) <= MESSAGE_BYTES
    sent = [world.Isend(content, dest=rank, tag=ROLL_CALL) for rank in sorted(missing)]
    deadline = time.monotonic() + seconds
    while missing:
        for rank in sorted(missing):
            if world.Iprobe(source=rank, tag=ROLL_CALL):
                received = bytearray(MESSAGE_BYTES)
                world.Recv(received, source=rank, tag=ROLL_CALL)
                found[rank] = json.loads(received.rstrip(b"\0"))
                missing.remove(rank)
        if missing and time.monotonic() > deadline:
            host, here = socket.gethostname(), Here.look()
            who = ", ".join(here.name(rank, host) for rank in sorted(missing))
            raise TimeoutError(f"rank {world.rank} on {host} waited {seconds} s for {who}, which did not join")
        time.sleep(0.002)
    for request in sent:
        request.Wait()
    return found
