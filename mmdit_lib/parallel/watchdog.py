"""A rank's watchdog: a process that monitors its rank and exchanges reports with rank 0's watchdog.

rank -- pipe --> its watchdog <-- TCP --> rank 0's watchdog, which decides

Twice a second each watchdog looks at its rank's process and reports to rank 0's, which answers with its own report.
A watchdog that hears nothing from rank 0's for the timeout ends its own rank.
All messages are lines of JSON. `heartbeat.py` starts this module in a process of its own.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from .heartbeat import HEARTBEAT_SECONDS
from .launch import FAULT_FILE, launched_rank, launched_size
from .verdict import Observer, Peer, Report, fault, never_started

TICK = 0.5
PAUSE = 5
"""If this process itself has not run for so many seconds, the machine was suspended."""
CLEAN_UP_SECONDS = 5
"""How long MPI may take to end all ranks after one has failed or died."""
EARLIER_SECONDS = 0.25
"""How long rank 0's watchdog waits, when its rank has died, to hear whether MPI ended it because another had died."""


class Line:
    """A connection that carries lines of JSON. It never waits."""

    def __init__(self, source: int | socket.socket):
        self.source, self.rank, self.closed = source, None, False
        self._rest = b""

    def read(self) -> list[dict]:
        """The messages that have arrived. What is not an object of JSON on a line closes the connection."""
        try:
            new = os.read(self.source, 65536) if isinstance(self.source, int) else self.source.recv(65536)
            *lines, self._rest = (self._rest + new).split(b"\n")
            messages = [dict(json.loads(line).items()) for line in lines]
        except BlockingIOError:
            return []
        except (OSError, ValueError, AttributeError):
            self.closed = True
            return []
        self.closed = not new or len(self._rest) > 65536
        return messages

    def send(self, message: dict) -> None:
        with suppress(OSError):  # a broken or cut connection shows as silence
            self.source.send(json.dumps(message).encode() + b"\n")


class Watchdog:
    """The watchdog of the process that started it.

    Args:
        listener: on rank 0 the socket for the other watchdogs.
    """

    def __init__(self, listener: socket.socket | None):
        self.report = Report(launched_rank(), socket.gethostname(), os.getppid())
        self.observer = Observer(self.report.pid)
        self.timeout = float(HEARTBEAT_SECONDS)
        self.since = self.last_tick = time.monotonic()
        self.announced = "died"  # how the rank's end is to be understood
        self.joined = False
        self.address: dict = {}  # of rank 0's watchdog, with the token that the others must know
        self.lines: list[Line] = []  # to the other watchdogs; on other ranks than 0, only to rank 0's
        self.heard: dict[int, tuple[Report, float]] = {}  # their last report and when it came
        self.left: set[int] = set()
        self.deadline: float | None = None  # when all must have ended, after one has failed or died
        self.selector = selectors.DefaultSelector()
        self.listen_to(Line(0), self.from_rank)
        if listener:
            self.selector.register(listener, selectors.EVENT_READ, lambda: self.accept(listener))

    def run(self) -> None:
        while True:
            self.hear(TICK / 2)
            if time.monotonic() >= self.last_tick + TICK:
                self.tick()
                self.last_tick = time.monotonic()

    # Connections.

    def hear(self, seconds: float) -> None:
        """What arrives; waits for so long if nothing does."""
        for key, _ in self.selector.select(seconds):
            key.data()

    def listen_to(self, line: Line, hear: Callable[[Line, dict], None]) -> None:
        def read() -> None:
            for message in line.read():
                hear(line, message)
            if line.closed:
                self.close(line)

        self.selector.register(line.source, selectors.EVENT_READ, read)

    def close(self, line: Line) -> None:
        self.selector.unregister(line.source)
        if line.source == 0:
            self.rank_ended()
        line.source.close()
        if line in self.lines:
            self.lines.remove(line)

    def accept(self, listener: socket.socket) -> None:
        peer, _ = listener.accept()
        peer.setblocking(False)
        self.listen_to(Line(peer), self.from_peer)

    def connect(self) -> None:
        """Try to reach rank 0's watchdog, or to reach it again."""
        with suppress(OSError):
            peer = socket.create_connection((self.address["host"], self.address["port"]), timeout=1)
            peer.setblocking(False)
            line = Line(peer)
            line.rank = 0
            line.send(self.message() | {"token": self.address["token"]})
            self.lines = [line]
            self.listen_to(line, self.from_peer)

    # Messages.

    def from_rank(self, line: Line, message: dict) -> None:
        if "doing" in message:
            self.report.doing, self.report.limit = message["doing"], message["limit"]
            self.since = time.monotonic()
        elif "address" in message:
            self.address = message["address"]
        elif "timeout" in message:
            self.join(message["timeout"])
        elif message["end"] == "failed":
            self.report.end = self.announced = "failed"
            self.tell()
            self.one_ended(self.report)
        else:
            self.announced = message["end"]

    def join(self, timeout: float | None) -> None:
        """All ranks have joined: monitor all of them. Safe to call again."""
        if timeout is not None:
            self.timeout = timeout
        if self.joined:
            return
        self.joined, now = True, time.monotonic()
        if self.report.rank == 0:
            others = range(1, launched_size())
            new = {rank: (Report(rank, "an unknown host", 0, "joining"), now) for rank in others}
            self.heard = new | self.heard
        else:
            self.heard[0] = (Report(0, self.address["name"], 0, "joining"), now)
            self.connect()

    def from_peer(self, line: Line, message: dict) -> None:
        if line.rank is None:  # a new connection
            if not self.address or message.get("token") != self.address["token"]:
                line.closed = True
                return
            line.rank = message["report"]["rank"]
            self.lines.append(line)
        report = Report(**message["report"])
        self.heard[report.rank] = (report, time.monotonic())
        if report.rank == 0:
            self.timeout = message["timeout"]
        if message["fault"]:
            self.end_rank()
        if report.end == "left":
            self.left.add(report.rank)
            del self.heard[report.rank]
        elif report.end and (not self.report.ended or self.ended_before(report)):
            self.one_ended(report)

    def tell(self, fault: str | None = None) -> None:
        """Report to rank 0's watchdog or, on rank 0, to all others."""
        for line in self.lines:
            line.send(self.message(fault))

    def message(self, fault: str | None = None) -> dict:
        return {"report": asdict(self.report), "timeout": self.timeout, "fault": fault}

    # Decisions.

    def tick(self) -> None:
        now = time.monotonic()
        if now - self.last_tick > PAUSE:  # this process did not run either, and has heard nobody in the meantime
            pause = now - self.last_tick
            self.since += pause
            self.heard = {rank: (report, then + pause) for rank, (report, then) in self.heard.items()}
        if os.getppid() != self.report.pid:
            self.rank_ended()
        if self.observer.orphaned():
            self.end_all("mpirun is gone")
        self.report.seconds = now - self.since
        self.report.stuck, self.report.stuck_seconds = self.observer.look(now)
        if 0 in self.heard and not self.lines:
            self.connect()
        self.tell()
        if self.deadline and now > self.deadline:
            self.end_all("")
        if not self.joined:
            self.check_start()
        elif text := self.fault(now):
            self.end_all(text)

    def fault(self, now: float) -> str | None:
        peers = {rank: Peer(report, now - then) for rank, (report, then) in self.heard.items()}
        if self.report.rank == 0:
            return fault({0: Peer(self.report), **peers}, self.timeout)
        if 0 in peers and self.timeout and peers[0].silent >= self.timeout:
            return f"{fault({0: peers[0]}, self.timeout)}; reported by {self.report} during {self.report.doing}"
        return None

    def check_start(self) -> None:
        """Before the ranks have joined: only the start of MPI has a limit."""
        limit, seconds = self.report.limit, self.report.seconds
        if limit is not None and seconds > limit:
            text, speaks = never_started(self.report.host, limit)
            if speaks or seconds > limit + 2:
                self.end_all(text)

    def rank_ended(self) -> None:
        if self.report.ended:
            return
        self.report.end, self.report.ended = self.announced, time.time()
        self.tell()
        if self.report.end == "died":
            until = time.monotonic() + EARLIER_SECONDS
            while self.deadline is None and self.report.rank == 0 and time.monotonic() < until:
                self.hear(until - time.monotonic())
            self.one_ended(self.report)
        sys.exit()

    def ended_before(self, report: Report) -> bool:
        """Whether that rank failed, or died before this one. The clocks of two machines may differ."""
        same_clock = report.host == self.report.host
        return report.end == "failed" or (same_clock and report.ended <= self.report.ended)

    def one_ended(self, report: Report) -> None:
        """A rank failed or died, and MPI ends the others. Rank 0's watchdog says which died first."""
        if self.deadline is None:
            self.deadline = time.monotonic() + CLEAN_UP_SECONDS
            if self.report.rank == 0 and report.end == "died" and not self.left:
                show(f"{report} was killed or ran out of memory; last activity: {report.doing}")

    def end_all(self, text: str) -> None:
        if text:
            show(f"{text}; all ranks are stopped")
        self.tell(text or "a rank ended")
        self.end_rank()

    def end_rank(self) -> None:
        time.sleep(0.2)  # mpirun may drop what it has not read when a rank ends
        self.observer.end()
        sys.exit()


def show(text: str) -> None:
    """Print what happened, and leave it to the notebook that has started the ranks."""
    with suppress(OSError):  # mpirun is gone
        print(text, file=sys.stderr, flush=True)
    if file := os.environ.get(FAULT_FILE):
        with suppress(OSError):
            Path(file).write_text(text)


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1])) if len(sys.argv) > 1 else None
    Watchdog(listener).run()


if __name__ == "__main__":
    main()
