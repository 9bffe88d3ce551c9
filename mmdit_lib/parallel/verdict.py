"""What the watchdogs know about each rank, and which rank is at fault."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import psutil

from .launch import launched_job, launched_rank, launched_size

WATCHDOG = "mmdit_lib.parallel.watchdog"
"""The module that a watchdog runs, by which its process is recognized."""
STOPPED, HUNG = "been stopped by a signal", "hung in a driver or file system"
"""Why a process cannot run."""
LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "orted")
MPIRUN_SECONDS = 2
"""How long mpirun may take to end after a rank has been killed."""
UNSURE = 2
"""Seconds of silence after which a rank may be unreachable."""

End = Literal["", "left", "failed", "died"]


@dataclass
class Report:
    """One rank, as its watchdog sees it. Durations are in seconds."""

    rank: int
    host: str
    pid: int
    doing: str = "the calling program"
    seconds: float = 0
    """How long it has been doing that."""
    limit: float | None = None
    """How long that may take; None: any time, as loading and compiling may."""
    stuck: str = ""
    """`STOPPED` or `HUNG`; empty if the process can run."""
    stuck_seconds: float = 0
    end: End = ""
    """How it ended: left normally, failed with an error that it shows itself, or died without a message."""
    ended: float = 0
    """When that was noticed, by the clock of `host`; 0 until then."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass
class Peer:
    """Another rank, as far as its reports have arrived."""

    report: Report
    silent: float = 0
    """Seconds since its last report."""


def fault(peers: Mapping[int, Peer], timeout: float) -> str | None:
    """Which rank is frozen, unreachable or hangs, in one line; None if all are at work.

    Args:
        peers: all ranks that have not left, by rank, with the one that asks.
        timeout: seconds; 0 finds no fault.
    """
    if not timeout:
        return None
    for peer in peers.values():
        if peer.silent >= timeout:
            last = peer.report.doing
            return f"{peer.report} is unreachable: nothing heard from it for {peer.silent:.0f} s; last activity: {last}"
    reports = [peer.report for peer in peers.values()]
    if len(reports) > 1 and all(report.stuck == STOPPED for report in reports):
        return None  # the user has suspended the whole job
    for report in reports:
        if report.stuck and report.stuck_seconds >= timeout:
            what = f"its process {report.pid} has {report.stuck} for {report.stuck_seconds:.0f} s"
            return f"{report} is frozen: {what}; last activity: {report.doing}"
    if any(peer.report.stuck or peer.silent > UNSURE for peer in peers.values()):
        return None  # the others may wait for that one, which is named when its time is up
    return overdue(reports, timeout)


def overdue(reports: list[Report], timeout: float) -> str | None:
    """Whether a step takes far longer than the one before. Ranks elsewhere are named: the others wait for them."""
    late = [r for r in reports if r.limit is not None and r.seconds >= max(r.limit, timeout)]
    if not late:
        return None
    first = late[0]
    others = [r for r in reports if r.doing != first.doing]
    text = f"{first.doing} has not ended for {first.seconds:.0f} s, over 10 times as long as the step before"
    if others:
        return f"{first} hangs, and may wait for others: {text}; " + "; ".join(f"{r}: {r.doing}" for r in others)
    return f"{', '.join(map(str, reports))} hang: {text}"


class Observer:
    """Checks from outside whether a process can run, even if it is stopped or holds the GIL."""

    def __init__(self, pid: int):
        self.process = psutil.Process(pid)
        self._parent = psutil.Process(self.process.ppid())
        self._launcher = self._parent.name() in LAUNCHERS  # asked now, since it may be gone at the end
        self.stuck, self._since, self._cpu = "", math.nan, math.nan

    def orphaned(self) -> bool:
        """Whether mpirun, or its daemon on this machine, is gone: it leaves its ranks behind if it is killed."""
        with suppress(psutil.Error):
            return self.process.ppid() != self._parent.pid
        return False

    def look(self, now: float) -> tuple[str, float]:
        """Why it cannot run ('' if it can), and for how many seconds. Call it about once a second."""
        try:
            status, times = self.process.status(), self.process.cpu_times()
        except psutil.Error:
            return "", 0
        cpu = times.user + times.system
        if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            stuck = STOPPED
        elif status == psutil.STATUS_DISK_SLEEP and cpu == self._cpu:  # a slow disk leaves it some time on the CPU
            stuck = HUNG
        else:
            stuck = ""
        if stuck != self.stuck:
            self.stuck, self._since = stuck, now
        self._cpu = cpu
        return stuck, now - self._since if stuck else 0

    def end(self) -> None:
        """Kill the rank. mpirun should end then; while it waits for an unreachable host it does not, and is killed."""
        kill(family(self.process))
        if not self._launcher:
            return
        launcher = family(self._parent)  # with its ssh
        if not gone(self._parent, MPIRUN_SECONDS):
            with suppress(psutil.Error):
                self._parent.terminate()
            gone(self._parent, MPIRUN_SECONDS / 2)
            kill(launcher)


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and its children, except this one."""
    with suppress(psutil.Error):
        return [process, *(child for child in process.children(recursive=True) if child.pid != os.getpid())]
    return []


def gone(process: psutil.Process, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return False
    return True


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


@dataclass
class Here:
    """The ranks of this mpirun on this machine, from the list of processes."""

    pids: dict[int, int] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)
    """Those that have a watchdog."""

    @classmethod
    def look(cls) -> Here:
        found, job = cls(), launched_job()
        for process in psutil.process_iter():
            try:
                variables = process.environ()
                if job is None or launched_job(variables) != job:
                    continue
                rank = launched_rank(variables)
                if WATCHDOG in process.cmdline():
                    found.started.add(rank)
                else:
                    found.pids.setdefault(rank, process.pid)
            except psutil.Error:
                pass
        return found

    def name(self, rank: int, host: str) -> str:
        """The rank, with its process if it is on this machine."""
        return f"rank {rank}" + (f" (process {self.pids[rank]} on {host})" if rank in self.pids else "")


def never_started(host: str, seconds: float) -> tuple[str, bool]:
    """Which ranks have not started MPI; and whether this rank should say so, since no other here does."""
    here, size = Here.look(), launched_size()
    late = [rank for rank in range(size) if rank in here.pids and rank not in here.started]
    elsewhere = [rank for rank in range(size) if rank not in here.pids]
    if late:
        text = f"{' and '.join(here.name(rank, host) for rank in late)} has not started MPI"
    elif launched_job() is None:
        text = "another rank has not started MPI"
    elif elsewhere:
        text = f"rank {' or '.join(map(str, elsewhere))}, not on {host}, has not started MPI"
    else:
        text = "all ranks are starting MPI, and it does not start"
    speaks = launched_rank() == min(here.started, default=launched_rank())
    return f"rank {launched_rank()} on {host} waited {seconds:.0f} s: {text}", speaks and bool(late)
