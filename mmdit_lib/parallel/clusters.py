"""MPI ranks for a notebook: ipyparallel starts them, and a failure leaves none behind.

with parallel.cluster(2) as ranks:
    results = ranks.run(function, argument)     # one result per rank, in rank order
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .faults import START_SECONDS, start_mpi
from .heartbeat import HEARTBEAT_SECONDS, watch
from .launch import FAULT_FILE, RANK_VARIABLES, mpi_environment, session_environment

PROFILE = "mmdit_lib"
"""The ipyparallel profile of our clusters; clusters with other profiles are never touched."""


class Ranks:
    """`n` MPI processes, reached through ipyparallel. Engine i is MPI rank i.

    Attributes:
        view: ipyparallel's view of all engines, for `%px` and the like (without the failure detection of `run`).
    """

    def __init__(self, n: int, seconds: int = 60, heartbeat: float = HEARTBEAT_SECONDS):
        self.n = n
        self.seconds = seconds
        self.heartbeat = heartbeat
        self.view = None
        self._cluster = None
        self._client = None
        self._local: dict[int, Any] = {}  # the processes of the ranks on this machine
        self._folder: tempfile.TemporaryDirectory | None = None  # of the watchdogs' verdict and mpiexec's files

    def start(self) -> Ranks:
        """Start the processes. If they take too long, stops them and raises `TimeoutError`."""
        os.environ.setdefault("IPP_NONINTERACTIVE", "1")  # output in rank order, full tracebacks
        import ipyparallel

        stop_clusters()
        beside = Path(sys.executable).parent / "mpiexec"
        program = str(beside) if beside.exists() else "mpiexec"
        self._cluster = ipyparallel.Cluster(
            engines="mpi", n=self.n, profile=PROFILE, cluster_id=f"{os.getpid()}-{uuid.uuid4().hex[:8]}",
            engine_timeout=self.seconds, log_level=logging.ERROR, parent=None,
        )  # fmt: skip
        self._cluster.config.MPILauncher.mpi_cmd = [program]
        self._folder = tempfile.TemporaryDirectory(prefix="mmdit-cluster-", ignore_cleanup_errors=True)
        try:
            session = session_environment(self._folder.name)
            with environment(mpi_environment(self.n) | session | {FAULT_FILE: str(self._fault_file)}):
                self._client = self._cluster.start_and_connect_sync()
        except BaseException as error:
            self.stop()
            if isinstance(error, Exception) and "engines" in str(error):
                raise TimeoutError(f"{self.n} ranks did not start within {self.seconds} s: {error}") from None
            raise
        self.view = self._client[:]
        self._local = ranks_among(self._processes())
        self.run(watch_cluster, self.heartbeat)
        return self

    def stop(self) -> None:
        """End all processes. Safe to call twice."""
        processes = self._processes()
        if self._client is not None:
            self._client.close()
        if self._cluster is not None:
            with suppress(Exception):
                self._cluster.stop_engines_sync()
            with suppress(Exception):
                self._cluster.stop_controller_sync()
            with suppress(Exception):
                self._cluster.remove_cluster_file()
        self.view = self._client = self._cluster = None
        end(processes)
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def _fault_file(self) -> Path:
        return Path(self._folder.name, "fault")

    def _processes(self) -> list:
        """mpiexec, the controller and their descendants."""
        import psutil

        launchers = [] if self._cluster is None else [self._cluster.controller, self._cluster.engine_set]
        found = []
        for launcher in launchers:
            with suppress(psutil.Error, AttributeError):
                top = psutil.Process(launcher.process.pid)
                found += [top, *top.children(recursive=True)]
        return found

    def __enter__(self) -> Ranks:
        return self if self.view is not None else self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def run(self, function: Callable, *arguments, **options) -> list[Any]:
        """Call `function` on every rank; returns the results in rank order and prints the ranks' output.

        Raises:
            RuntimeError: as soon as one rank fails or dies, with that rank's error. All ranks are stopped
                then, since the others may wait in a collective forever.
        """
        if self.view is None:
            raise RuntimeError("the ranks are not running; start a new cluster")
        calls = [self._client[rank].apply_async(function, *arguments, **options) for rank in range(self.n)]
        try:
            self._wait(calls)
            results = [call.get(timeout=30) for call in calls]
        except BaseException:
            self.stop()
            raise
        for rank, call in enumerate(calls):
            call.wait_for_output(timeout=5)  # it may arrive after the result
            for line in call.stdout.rstrip().splitlines():
                print(f"[rank {rank}] {line}")
        return results

    def _wait(self, calls: list) -> None:
        import concurrent.futures

        while True:
            _, pending = concurrent.futures.wait(calls, timeout=0.5, return_when=FIRST_EXCEPTION)
            failed = next((rank for rank, call in enumerate(calls) if call.done() and call.exception()), None)
            died = self._died()
            if failed is not None and not died:
                error = calls[failed].exception()
                if getattr(error, "ename", "") != "EngineError":  # with which ipyparallel reports a rank that is gone
                    raise RuntimeError(f"rank {failed} failed: {_text(error)}") from None
                died = f"rank {failed} died: {error.evalue}"
            if died:
                raise RuntimeError(self._verdict() or died)
            if not pending:
                return

    def _verdict(self, seconds: float = 5) -> str | None:
        """What the watchdogs say: they know which rank was the first, and what it was doing.

        They check twice a second, and less often when many processes share few cores.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._fault_file.exists():
                return self._fault_file.read_text()
            time.sleep(0.05)
        return None

    def _died(self) -> str | None:
        """Which rank died; None if all are alive. MPI ends the others too, but reports it much later."""
        import psutil

        for rank, process in self._local.items():
            with suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    continue
            return f"rank {rank} died: its process {process.pid} was killed, or ran out of memory"
        mpi = self._cluster.engine_set
        if mpi is not None and mpi.state == "running" and mpi.process.is_running():
            return None
        return "a rank died: MPI has ended"  # a rank on another machine


def watch_cluster(heartbeat: float) -> None:
    """Called on every rank, so that the watchdogs run before a team is formed."""
    watch(start_mpi().COMM_WORLD, START_SECONDS, heartbeat)


def ranks_among(processes: list) -> dict[int, Any]:
    """The MPI ranks among psutil's processes, without their children."""
    import psutil

    found = {}
    for process in processes:
        with suppress(psutil.Error, StopIteration):
            words, variables = process.cmdline(), process.environ()
            if "--mpi" in words:
                found[int(next(variables[name] for name in RANK_VARIABLES if name in variables))] = process
    return dict(sorted(found.items()))


def _text(error: BaseException) -> str:
    """A remote error's own message and traceback."""
    trace = getattr(error, "traceback", "")
    return f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}\n{trace}"


def end(processes: list, seconds: float = 1) -> None:
    """Wait for `processes` to exit, then kill those that do not (such as ipyparallel's nannies)."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


def cluster(n: int, seconds: int = 60, heartbeat: float = HEARTBEAT_SECONDS) -> Ranks:
    """`n` MPI ranks, for a `with` block or `start()` and `stop()`. Starting first ends clusters of dead notebooks.

    Args:
        n: number of ranks.
        seconds: how long they may take to start.
        heartbeat: seconds after which a rank that is frozen or unreachable ends all; 0: never.
    """
    return Ranks(n, seconds, heartbeat)


def stop_clusters(*, mine_too: bool = False) -> list[str]:
    """End the clusters whose notebooks are gone; returns their ids.

    A killed kernel cannot clean up after itself. Clusters of other profiles are left alone.

    Args:
        mine_too: also end the clusters of this process.
    """
    import ipyparallel
    import psutil

    with suppress(Exception):  # no profile yet: nothing to stop
        found = ipyparallel.ClusterManager().load_clusters(profile=PROFILE)
        stopped = []
        for cluster in list(found.values()):
            owner = cluster.cluster_id.split("-")[0]
            own = owner == str(os.getpid())
            if (own and not mine_too) or (not own and owner.isdigit() and psutil.pid_exists(int(owner))):
                continue
            with suppress(Exception):
                cluster.stop_cluster_sync()
            with suppress(Exception):
                cluster.remove_cluster_file()
            stopped.append(cluster.cluster_id)
        return stopped
    return []


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set `variables` in `os.environ` for a `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
