"""MPI ranks for a notebook: ipyparallel starts them, and no fault leaves one behind.

    with parallel.cluster(2) as ranks:
        results = ranks.run(function, argument)     # one result per rank, in their order
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .launch import mpi_environment

PROFILE = "mmdit_lib"
"""ipyparallel's profile of our clusters: those of others are never touched."""


class Ranks:
    """`n` MPI processes, reached through ipyparallel. Engine i is MPI rank i.

    Attributes:
        view: ipyparallel's view of all engines, for `%px` and the like (nothing there watches for faults).
    """

    def __init__(self, n: int, seconds: int = 60):
        self.n = n
        self.seconds = seconds
        self.view = None
        self._cluster = None
        self._client = None

    def start(self) -> Ranks:
        """Start the processes; takes some seconds. Raises `TimeoutError` if they do not come, and stops them."""
        os.environ.setdefault("IPP_NONINTERACTIVE", "1")  # output in the order of the ranks, whole tracebacks
        import ipyparallel

        stop_clusters()
        beside = Path(sys.executable).parent / "mpiexec"
        program = str(beside) if beside.exists() else "mpiexec"
        self._cluster = ipyparallel.Cluster(
            engines="mpi", n=self.n, profile=PROFILE, cluster_id=f"{os.getpid()}-{uuid.uuid4().hex[:8]}",
            engine_timeout=self.seconds, log_level=logging.ERROR, parent=None,
        )  # fmt: skip
        self._cluster.config.MPILauncher.mpi_cmd = [program]
        try:
            with environment(mpi_environment(self.n)):
                self._client = self._cluster.start_and_connect_sync()
        except BaseException as error:
            self.stop()
            if isinstance(error, Exception) and "engines" in str(error):
                raise TimeoutError(f"{self.n} ranks did not start within {self.seconds} s: {error}") from None
            raise
        self.view = self._client[:]
        return self

    def stop(self) -> None:
        """End all processes; once more does no harm."""
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

    def _processes(self) -> list:
        """mpiexec, the controller and all below them."""
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
        """Call `function` on every rank; returns the results in rank order and prints what ranks printed.

        Raises:
            RuntimeError: as soon as one rank fails or dies: with that rank's error. The ranks are
                stopped then, since the others may wait in a collective for ever.
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
            for line in call.stdout.rstrip().splitlines():
                print(f"[rank {rank}] {line}")
        return results

    def _wait(self, calls: list) -> None:
        import concurrent.futures

        while True:
            _, pending = concurrent.futures.wait(calls, timeout=0.5, return_when=FIRST_EXCEPTION)
            died = self._died()
            for rank, call in enumerate(calls):
                if call.done() and call.exception() is not None and not died:
                    raise RuntimeError(f"rank {rank} failed: {_text(call.exception())}") from None
            if died:
                raise RuntimeError(died)
            if not pending:
                return

    def _died(self) -> str | None:
        """What MPI says if a rank is gone; it ends the others too."""
        engines = self._cluster.engine_set
        if engines is not None and engines.state == "running" and engines.process.is_running():
            return None
        output = engines.get_output(remove=False) if engines is not None else ""
        lines = [line.strip() for line in output.splitlines()]
        told = [line for line in lines if "rank" in line and ("signal" in line or "exit" in line)]
        return f"a rank died: {' '.join(told) or output[-2000:].strip() or 'MPI ended without a word'}"


def _text(error: BaseException) -> str:
    """A remote error's own message and traceback."""
    trace = getattr(error, "traceback", "")
    return f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}\n{trace}"


def end(processes: list, seconds: float = 5) -> None:
    """Wait until `processes` are gone; those that stay are killed."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=seconds)


def cluster(n: int, seconds: int = 60) -> Ranks:
    """`n` MPI ranks for `with`, or to `start()` and `stop()`. Leftovers of notebooks that died are ended first.

    Args:
        n: how many.
        seconds: how long they may take to start.
    """
    return Ranks(n, seconds)


def stop_clusters(*, mine_too: bool = False) -> list[str]:
    """End the clusters whose notebooks are gone; returns their ids.

    A killed kernel cannot clean up after itself. Clusters of other profiles are left alone.

    Args:
        mine_too: also those of this process.
    """
    import ipyparallel

    with suppress(Exception):  # no profile yet: nothing to stop
        found = ipyparallel.ClusterManager().load_clusters(profile=PROFILE)
        stopped = []
        for cluster in list(found.values()):
            owner = cluster.cluster_id.split("-")[0]
            own = owner == str(os.getpid())
            if (own and not mine_too) or (not own and owner.isdigit() and _alive(int(owner))):
                continue
            with suppress(Exception):
                cluster.stop_cluster_sync()
            with suppress(Exception):
                cluster.remove_cluster_file()
            stopped.append(cluster.cluster_id)
        return stopped
    return []


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """`os.environ` with `variables` for a while."""
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
