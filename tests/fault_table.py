"""The table of faults in docs/faults.md: `python tests/fault_table.py --output docs/faults.md` (about 10 minutes).

Each fault runs separately. Measured: the time from the fault until no process of the run is left, the exit code, and
what is shown. `test_parallel_faults.py` runs the same faults with shorter timeouts.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from helpers import TESTS, mpirun
from hosts import Hosts, processes_with, why_not

from mmdit_lib import build, convert
from mmdit_lib.parallel.clusters import environment
from mmdit_lib.parallel.heartbeat import HEARTBEAT_SECONDS
from mmdit_lib.tiny import model_path

FOLDER = "FAULT_FOLDER"
"""The environment variable by which the processes of a run are found."""


@dataclass(frozen=True)
class Fault:
    """What rank 1 of 2 does (`parallel_faults.ACTIONS`), at which stage, and what must be shown."""

    action: str
    stage: str
    shown: tuple[str, ...]
    waits: bool = False
    """It shows only by a timeout."""


HOST = r"rank 1 on \S+"
FAULTS = {
    "killed (signal 9)": Fault("kill", "step 5", (rf"{HOST} was killed or ran out of memory.*step 5", "signal 9")),
    "killed (signal 15)": Fault("terminate", "step 5", (rf"{HOST} was killed.*step 5", "signal 15")),
    "frozen (signal 19) in a step": Fault("stop", "step 5", (rf"{HOST} is frozen.*stopped.*step 5",), waits=True),
    "frozen while loading weights": Fault("stop", "loading w", (rf"{HOST} is frozen.*loading weights",), waits=True),
    "hung in a C call in a step": Fault("hang", "step 5", (r"hang.*: step 5 has not ended",), waits=True),
    "never started": Fault("sleep", "starting", (r"rank 1 \(process \d+ on \S+\) has not started MPI",), waits=True),
    "never joined": Fault("sleep", "joining", (r"rank 1 \(process \d+ on \S+\), which did not join",), waits=True),
    "raised": Fault("raise", "step 5", ("rank 1: RuntimeError: rank 1 had enough", "Traceback")),
    "exited with an error": Fault("exit", "step 5", ("rank 1: rank 1 says so in one line",)),
    "out of memory": Fault("memory", "step 5", ("rank 1: MemoryError",)),
    "Ctrl-C while MPI starts": Fault("interrupt", "starting MPI", ()),
    "Ctrl-C while joining": Fault("interrupt", "joining", ()),
    "Ctrl-C while loading weights": Fault("interrupt", "loading w", ()),
    "Ctrl-C in a step": Fault("interrupt", "step 5", ()),
    "Ctrl-C while decoding": Fault("interrupt", "waiting for the decoded", ()),
    "mpirun killed (signal 9)": Fault("kill mpirun", "step 5", ()),
}


@dataclass(frozen=True)
class Outcome:
    seconds: float
    """From the fault until all processes had ended."""
    code: int | None
    text: str
    left: int = 0
    """Processes that were still there after 60 s."""


def run_mpi(fault: Fault, engine: Path, folder: Path, seconds: float | None = None) -> Outcome:
    """Run a fault under mpirun on this machine, in an empty `folder`; `seconds`: shorter timeouts."""
    mark = folder / "mark"
    arguments = [
        TESTS / "parallel_faults.py",
        fault.action,
        fault.stage,
        1,
        engine,
        mark,
        *([seconds] if seconds else []),
    ]
    with environment({FOLDER: str(folder)}):
        done = mpirun(2, *arguments, timeout=200)
    assert mark.exists(), done.stderr
    return outcome(float(mark.read_text()), done.returncode, done.stderr, lambda: processes_with(FOLDER, str(folder)))


def outcome(start: float, code: int | None, text: str, left: Callable[[], list[psutil.Process]]) -> Outcome:
    """Wait until no process is left."""
    while (found := left()) and time.time() < start + 60:
        time.sleep(0.05)
    return Outcome(time.time() - start, code, text, len(found))


def run_notebook(action: str, folder: Path, heartbeat: float = HEARTBEAT_SECONDS) -> Outcome:
    """Rank 1 of a cluster fails while rank 0 waits for it."""
    from parallel_tasks import fail, greet

    from mmdit_lib import parallel

    with environment({FOLDER: str(folder), "IPYTHONDIR": str(folder), "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}):
        ranks = parallel.cluster(2, heartbeat=heartbeat).start()
        mine = psutil.Process()
        try:
            ranks.run(greet, "hello")  # which imports the file there
            start = time.time()
            ranks.run(fail, action)
            raise AssertionError("not noticed")
        except RuntimeError as error:
            text = str(error)
        finally:
            ranks.stop()
    return outcome(start, None, text, lambda: [p for p in processes_with(FOLDER, str(folder)) if p != mine])


def run_hosts(cause: str, engine: Path, folder: Path, seconds: float | None = None) -> Outcome:
    """Two hosts with a rank each; hostb's link is cut, or hostb vanishes, in a step."""
    with Hosts(["hosta", "hostb"], folder) as hosts:
        mark = folder / "mark"
        words = [TESTS / "parallel_faults.py", "nothing", "step 5", 1, engine, mark, *([seconds] if seconds else [])]
        process = hosts.mpirun(["hosta", "hostb"], words)
        while not mark.exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        start = time.time()
        {"cut": hosts.cut, "vanish": hosts.vanish}[cause]("hostb")
        _, text = process.communicate(timeout=200)
        return outcome(
            start, process.returncode, text, lambda: [p for name in hosts.names for p in hosts.processes(name)]
        )


NOTEBOOK = {
    "notebook: raised": ("raise", "rank 1 failed: ValueError: rank 1 had enough"),
    "notebook: killed (signal 9)": ("kill", rf"{HOST} was killed or ran out of memory"),
    "notebook: frozen (signal 19)": ("stop", rf"{HOST} is frozen"),
}
HOSTS = {"two hosts: link cut in a step": "cut", "two hosts: a host vanishes in a step": "vanish"}


def message(text: str) -> str:
    """Our line that explains it."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    return next((line for line in lines if re.match(r"rank \d|all ranks", line)), "")


def measured(engine: Path, only: str) -> dict[str, Outcome]:
    runs: dict[str, Callable[[Path], Outcome]] = {
        **{name: lambda folder, fault=fault: run_mpi(fault, engine, folder) for name, fault in FAULTS.items()},
        **{name: lambda folder, action=action: run_notebook(action, folder) for name, (action, _) in NOTEBOOK.items()},
        **{name: lambda folder, cause=cause: run_hosts(cause, engine, folder) for name, cause in HOSTS.items()},
    }
    found = {}
    for name, run in runs.items():
        if only in name and not (name in HOSTS and why_not()):
            with tempfile.TemporaryDirectory() as folder:
                found[name] = run(Path(folder))
            print(f"{name}: {found[name].seconds:.1f} s, {message(found[name].text)}", flush=True)
    return found


HEAD = """\
Measured on {machine}, load average {load:.0f}: 2 ranks, gloo over MPI, the tiny model, default timeouts. Rank 1 fails.

| fault | all ended after | exit code | processes left | message |
|---|---:|---:|---:|---|
"""


def table(found: dict[str, Outcome]) -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{os.cpu_count()} cores ({cpu[1] if cpu else platform.machine()}), no GPU"
    text = HEAD.format(machine=machine, load=os.getloadavg()[1])
    for name, x in found.items():
        said = message(x.text).replace(f" on {platform.node()}", " on HOST").replace("|", "\\|")
        code = "-" if x.code is None else x.code
        text += f"| {name} | {x.seconds:.1f} s | {code} | {x.left} | {said or '(none)'} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("faults.md"))
    parser.add_argument("--only", default="", help="part of the names of the faults to run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = convert(str(model_path()), f"{folder}/checkpoint", dtype="float32", progress=False)
        engine = build(str(checkpoint), f"{folder}/engine", cp_size=2, plan=False, progress=False)
        found = measured(engine, options.only)
    before = options.output.read_text().partition("Measured on ")[0] if options.output.exists() else ""
    options.output.write_text(before + table(found))


if __name__ == "__main__":
    main()
