"""Many damaged folders in worker processes with limits on memory and time."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Literal

from .cases import CASES, Case, Result, same
from .damage import damages, make_folder, remove, swap
from .folders import make_folders

MEMORY = 2 << 30
"""Bytes that one input may add to a worker's address space."""
SECONDS = 10
"""Of processor time, so that the verdict does not depend on what else runs; of waiting, six times as many."""

Verdict = Literal["refused", "same result", "unverified result", "another result", "traceback", "over the limits"]
FAULTS: tuple[Verdict, ...] = ("another result", "traceback", "over the limits")


@dataclass(frozen=True)
class Outcome:
    """What one input led to."""

    index: int
    case: str
    damage: str
    verdict: Verdict
    said: str
    """The message of a refusal; the traceback of a fault."""


class TooSlow(BaseException):
    """Not an `Exception`, so that nothing handles it on the way."""


@contextmanager
def limits() -> Iterator[None]:
    """At most `SECONDS` of time, and `MEMORY` bytes more address space than now."""

    def stop(*_) -> None:
        raise TooSlow(f"more than {SECONDS} s of processor time, or {6 * SECONDS} s in all")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, 6 * SECONDS))
    for timer, number, seconds in timers:
        signal.signal(number, stop)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def judge(case: Case, folder: Path, expected: Result) -> tuple[Verdict, str]:
    """Run a case on a damaged folder."""
    try:
        with limits():
            found = case.run(folder / case.argument)
    except (TooSlow, MemoryError) as error:
        return "over the limits", f"{type(error).__name__}: {error}"
    except Exception as error:
        said = str(error)
        if "not enough memory" in said or "can't allocate memory" in said:
            return "over the limits", said
        # A subclass, such as pydantic's or json's own, was not given the name of the file.
        if type(error) is ValueError and said.strip() and said.isprintable():
            return "refused", said
        return "traceback", traceback.format_exc()
    if not case.compare:
        return "unverified result", ""
    if same(found, expected):
        return "same result", ""
    parts = [key for key in found if found[key] != expected.get(key)]
    return "another result", f"differs in {', '.join(parts)}"


class Worker:
    """One process: the undamaged folders and their results."""

    def __init__(self, root: Path):
        self.root = root
        self.place = Path(tempfile.mkdtemp(dir=root))
        self.expected = {case.name: self.undamaged(case) for case in CASES}

    def undamaged(self, case: Case) -> Result:
        try:
            self.copy(case)
            return case.run(self.place / case.argument)
        finally:
            self.clean()

    def copy(self, case: Case) -> None:
        for name in case.needs:
            shutil.copytree(self.root / "good" / name, self.place / name)

    def clean(self) -> None:
        shutil.rmtree(self.place)
        self.place.mkdir()

    def run(self, seed: int, index: int) -> Outcome:
        """Input number `index`: the same seed and number always give the same damage."""
        rng = Random(f"{seed}/{index}")
        case = rng.choice(CASES)
        try:
            self.copy(case)
            files = sorted(path for name in case.needs for path in (self.place / name).rglob("*") if path.is_file())
            path = rng.choice(files)
            # Another model in one file is just that: nothing else is there to contradict it.
            swaps = [swap(self.root / "donors", self.place)] if len(files) > 1 else []
            rare = [remove, make_folder, *swaps]
            damage = rng.choice(rare if rng.random() < 0.1 else damages(path, checksummed=case.checksummed))
            said = f"{path.relative_to(self.place)}: {damage(rng, path)}"
            return Outcome(index, case.name, said, *judge(case, self.place, self.expected[case.name]))
        finally:
            self.clean()


_worker: Worker | None = None


def _start(root: Path) -> None:
    global _worker
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 open as long as the process
    _worker = Worker(root)


def _run(task: tuple[int, int]) -> Outcome:
    return _worker.run(*task)


def campaign(seed: int, indices: range, processes: int) -> Iterator[Outcome]:
    """The outcome of every input, in order."""
    context = get_context("fork")
    with tempfile.TemporaryDirectory(prefix="mmdit-fuzz-") as root:
        # In a process of its own: TensorRT's threads would not survive the workers' fork.
        with ProcessPoolExecutor(1, context) as maker:
            maker.submit(make_folders, Path(root)).result()
        with ProcessPoolExecutor(processes, context, _start, (Path(root),)) as pool:
            yield from pool.map(_run, [(seed, index) for index in indices], chunksize=8)
