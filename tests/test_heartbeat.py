"""What the watchdogs conclude from the ranks' reports. Real ranks: test_parallel_faults.py and test_two_hosts.py."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import psutil
import pytest

from mmdit_lib.parallel import heartbeat, verdict
from mmdit_lib.parallel.verdict import HUNG, STOPPED, Observer, Peer, Report, fault
from mmdit_lib.parallel.watchdog import Line, Watchdog


def peers(*changes: dict) -> dict[int, Peer]:
    """Ranks at work in step 3 of 28, with changes to the report of each."""
    found = {}
    for rank, change in enumerate(changes):
        silent = change.pop("silent", 0.2)
        found[rank] = Peer(Report(rank, f"host{rank}", 100 + rank, **{"doing": "step 3 of 28"} | change), silent)
    return found


STEP = {"seconds": 31.0, "limit": 2.0}
CASES = {
    "all at work": (peers({}, {}), None),
    "compiling for an hour": (peers(*[{"doing": "step 1", "seconds": 3600.0} for _ in range(2)]), None),
    "stopped for a moment": (peers({}, {"stuck": STOPPED, "stuck_seconds": 29.0}), None),
    "stopped": (
        peers({}, {"stuck": STOPPED, "stuck_seconds": 30.0}),
        "rank 1 on host1 is frozen: its process 101 has been stopped by a signal for 30 s; last activity: step 3 of 28",
    ),
    "hung in a driver": (
        peers({}, {"stuck": HUNG, "stuck_seconds": 30.0, "doing": "decoding"}),
        "rank 1 on host1 is frozen: its process 101 has hung in a driver or file system for 30 s; "
        "last activity: decoding",
    ),
    "all suspended by the user": (peers(*[{"stuck": STOPPED, "stuck_seconds": 900.0} for _ in range(2)]), None),
    "silent": (
        peers({}, {"silent": 30.0}),
        "rank 1 on host1 is unreachable: nothing heard from it for 30 s; last activity: step 3 of 28",
    ),
    "a slow step, but not 10 times as slow": (peers({"seconds": 31.0, "limit": 40.0}, {"seconds": 31.0}), None),
    "the others wait for a stopped rank": (peers(STEP, STEP | {"stuck": STOPPED, "stuck_seconds": 9.0}), None),
    "the others wait for a silent rank": (peers(STEP, STEP | {"silent": 9.0}), None),
    "all hang in a step": (
        peers(STEP, STEP),
        "rank 0 on host0, rank 1 on host1 hang: step 3 of 28 has not ended for 31 s, "
        "over 10 times as long as the step before",
    ),
    "one does not reach the step": (
        peers(STEP, {"doing": "denoising"}),
        "rank 0 on host0 hangs, and may wait for others: step 3 of 28 has not ended for 31 s, "
        "over 10 times as long as the step before; rank 1 on host1: denoising",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_fault(case):
    reports, expected = CASES[case]
    assert fault(reports, 30) == expected
    assert fault(reports, 0) is None, "turned off"


def test_a_stopped_process_is_seen_from_outside():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        observer, start = Observer(process.pid), time.monotonic()
        assert observer.look(0) == ("", 0) and not observer.orphaned()
        process.send_signal(signal.SIGSTOP)
        while observer.look(10)[0] != STOPPED:
            assert time.monotonic() < start + 10
        assert observer.look(12.5) == (STOPPED, 2.5)
        process.send_signal(signal.SIGCONT)
        while observer.look(20)[0]:
            assert time.monotonic() < start + 10
        observer.end()
        assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("launchers", [(), ("sh", "dash", "bash")], ids=["another program", "a launcher"])
def test_a_rank_is_ended_after_its_parent(monkeypatch, launchers):
    monkeypatch.setattr(verdict, "LAUNCHERS", launchers)
    command = ["sh", "-c", "sleep 60 & echo $!; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        rank = psutil.Process(int(parent.stdout.readline()))
        observer = Observer(rank.pid)
        assert not observer.orphaned()
        parent.kill()
        parent.wait(10)
        deadline = time.monotonic() + 10
        while not observer.orphaned():
            assert time.monotonic() < deadline
        observer.end()
        while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline


def test_activities_nest(monkeypatch):
    said = []

    class Recorder:
        def tell(self, doing: str, limit: float | None) -> None:
            said.append((doing, limit))

    monkeypatch.setattr(heartbeat, "_watchdog", Recorder())
    with heartbeat.doing("denoising"), pytest.raises(ValueError, match="no"), heartbeat.doing("step 1", limit=3):
        raise ValueError("no")
    assert said == [("denoising", None), ("step 1", 3), ("denoising", None), ("the calling program", None)]


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"x" * 70000, b'{"a": 1}\n{"b"\n', b""])
def test_a_stranger_on_the_port_is_hung_up_on(garbage):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        line = Line(ours)
        theirs.sendall(garbage)
        theirs.close()
        while not line.closed:
            line.read()


def test_messages_arrive_whole():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        line = Line(ours)
        theirs.sendall(b'{"a": 1}\n{"b"')
        assert line.read() == [{"a": 1}]
        assert line.read() == [] and not line.closed
        theirs.sendall(b": 2}\n")
        assert line.read() == [{"b": 2}]


@pytest.mark.parametrize(
    ("moved", "host", "named"),
    [(-0.1, "host0", 1), (0.1, "host0", 0), (-0.1, "host1", 0)],
    ids=["ended by MPI", "the first to die", "by another machine's clock"],
)
@pytest.mark.parametrize("late", [0, 0.1], ids=["both reports are there", "the other report is late"])
def test_the_rank_that_died_first_is_named(moved, host, named, late, monkeypatch, capsys):
    """Rank 0's watchdog may see the end of its own rank before it hears that another died and MPI ended this one."""
    own, other = socket.socketpair()
    monkeypatch.setattr("mmdit_lib.parallel.watchdog.Observer", lambda pid: None)
    monkeypatch.setattr(Watchdog, "listen_to", lambda *arguments: None)
    watchdog = Watchdog(None)
    monkeypatch.undo()
    watchdog.report = Report(0, "host0", 100)
    line = Line(own)
    line.rank, watchdog.lines = 1, [line]
    watchdog.listen_to(line, watchdog.from_peer)
    report = Report(1, host, 101, end="died", ended=time.time() + moved)
    message = json.dumps({"report": asdict(report), "timeout": 25, "fault": None}).encode() + b"\n"
    sending = threading.Timer(late, other.send, [message])
    sending.start()
    if not late:
        sending.join()
    with pytest.raises(SystemExit):
        watchdog.rank_ended()
    sending.join()
    own.close(), other.close()
    assert capsys.readouterr().err.startswith(f"rank {named} on host0 was killed or ran out of memory")
