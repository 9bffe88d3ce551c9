"""Ranks that stay: tests of several files give their tasks to one mpirun, because each start takes seconds a rank.

`conftest.py` knows these tests by their names, runs those with the same number of ranks after each other in one
process, and then stops the ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import psutil
from helpers import mpirun_command

LAYOUTS: dict[int, dict[str, tuple[dict, dict]]] = {
    2: {
        "tp2": (dict(tp_size=2), {}),
        "tp2 trtllm": (dict(tp_size=2, tp_layout="trtllm"), {}),
        "cp2 allgather": ({}, dict(cp_size=2)),
        "cp2 ulysses": ({}, dict(cp_size=2, cp_method="ulysses")),
        "cfg2": (dict(cfg_size=2), {}),
    },
    3: {
        "cp3 allgather": (dict(cp_size=3), {}),
        "cp3 ulysses": (dict(cp_size=3), dict(cp_method="ulysses")),
    },
    4: {
        "tp4": (dict(tp_size=4), {}),
        "tp4 trtllm": (dict(tp_size=4, tp_layout="trtllm"), {}),
        "cp4 allgather": ({}, dict(cp_size=4)),
        "cp4 ulysses": ({}, dict(cp_size=4, cp_method="ulysses")),
        "tp2 x cp2 allgather": (dict(tp_size=2, cp_size=2), {}),
        "tp2 x cp2 ulysses": (dict(tp_size=2, cp_size=2), dict(cp_method="ulysses")),
        "cfg2 x tp2": (dict(tp_size=2, cfg_size=2), {}),
        "cfg2 x cp2": (dict(cfg_size=2, cp_size=2), {}),
    },
}
"""By the number of ranks and a name: options of `convert` and of `build`."""

_running: Ranks | None = None


def run_on_ranks(world: int, tasks: dict[str, dict], timeout: float = 400) -> dict:
    """The results of `tasks`, each the arguments of a function of `parallel_ranks.py`, whose name is its `kind`."""
    global _running
    if _running is None or _running.world != world:
        stop_ranks()
        _running = Ranks(world)
    try:
        return _running.run(tasks, timeout)
    except BaseException:
        failed, _running = _running, None
        failed.kill()
        raise


def stop_ranks() -> None:
    global _running
    if _running:
        ending, _running = _running, None
        ending.stop()


class Ranks:
    """`mpirun -n world python ranks.py`, until `stop`."""

    def __init__(self, world: int):
        self.world, self._given = world, 0
        self._temporary = tempfile.TemporaryDirectory(prefix="mmdit-ranks-", ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)
        self._said = self._folder / "said"
        arguments = [__file__, self._folder, os.getpid()]
        command, environment = mpirun_command(world, *arguments, session=self._temporary.name)
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
            )

    def run(self, tasks: dict[str, dict], timeout: float) -> dict:
        partial, results = self._folder / "partial", self._folder / f"results{self._given}.json"
        partial.write_text(json.dumps(tasks))
        partial.rename(self._folder / f"tasks{self._given}.json")
        self._given += 1
        deadline = time.monotonic() + timeout
        while not results.exists():
            assert self._process.poll() is None, f"the ranks ended\n{self._said.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"no results within {timeout} s\n{self._said.read_text()[-4000:]}"
            time.sleep(0.05)
        return json.loads(results.read_text())

    def stop(self) -> None:
        """End the ranks, which must succeed."""
        (self._folder / "end").touch()
        try:
            assert self._process.wait(60) == 0, self._said.read_text()[-4000:]
        finally:
            self.kill()

    def kill(self) -> None:
        self._process.terminate()  # mpirun ends its ranks
        self._process.wait(20)
        self._temporary.cleanup()


# On every rank ---------------------------------------------------------------------------------------


def serve(folder: Path, giver: int) -> None:
    """Run `tasks0.json`, `tasks1.json` ... in `folder`, until `end` is there or the process `giver` has ended."""
    import parallel_ranks
    import torch

    torch.set_num_threads(1)
    for number in count():
        tasks, partial = folder / f"tasks{number}.json", folder / "partial results"
        if not wait_for(tasks, giver):
            return
        given = json.loads(tasks.read_text())
        found = {name: getattr(parallel_ranks, task["kind"])(task) for name, task in given.items()}
        if parallel_ranks.WORLD.rank == 0:
            partial.write_text(json.dumps(found))
            partial.rename(folder / f"results{number}.json")


def wait_for(tasks: Path, giver: int) -> bool:
    """Wait without using a core; False if no more tasks come."""
    while not tasks.exists():
        if (tasks.parent / "end").exists() or not psutil.pid_exists(giver):
            return False
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
