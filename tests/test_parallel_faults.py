"""Whatever happens to a rank: all ranks stop, the reason is shown, no process is left behind."""

import re
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import Case, model_config

from mmdit_lib.checkpoint import convert
from mmdit_lib.engine.build import build
from mmdit_lib.parallel.faults import START_SECONDS
from mmdit_lib.parallel.heartbeat import HEARTBEAT_SECONDS

pytest.importorskip("mpi4py")
from fault_table import FAULTS, Fault, run_mpi
from helpers import TESTS
from hosts import processes_with
from parallel_tasks import fail, greet, join_twice

pytestmark = pytest.mark.slow
LIMIT = 30
SECONDS = 3
"""The timeouts in these tests, in place of `HEARTBEAT_SECONDS` and `START_SECONDS`."""
assert START_SECONDS == HEARTBEAT_SECONDS


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    case = Case(model_config(num_layers=2), tmp_path_factory.mktemp("faults"))
    checkpoint = convert(str(case.transformer), str(case.root / "checkpoint"), tp_size=2, progress=False)
    return build(str(checkpoint), str(case.root / "engine"), plan=False, progress=False)


QUICK = [
    "killed (signal 9)", "frozen (signal 19) in a step", "hung in a C call in a step", "never started", "never joined",
    "raised", "exited with an error", "Ctrl-C in a step", "mpirun killed (signal 9)",
]  # fmt: skip
"""Of `fault_table.FAULTS`, which has them all."""


@pytest.mark.parametrize("what", QUICK)
def test_all_ranks_stop(what, engine, tmp_path, record_property):
    fault = FAULTS[what]
    found = run_mpi(fault, engine, tmp_path, SECONDS if fault.waits else None)
    print(f"{what}: all ranks had stopped {found.seconds:.1f} s after the fault")
    record_property("seconds", found.seconds)
    assert found.left == 0 and found.code != 0
    assert all(re.search(text, found.text) for text in fault.shown), found.text
    assert len(re.findall(r"^(?:rank \d|all ranks)", found.text, re.M)) <= 1, "one message"
    assert found.seconds < (LIMIT - HEARTBEAT_SECONDS + SECONDS if fault.waits else LIMIT)


def test_no_false_alarm(engine, tmp_path):
    """A rank that loads in C for twice the timeout, with the GIL held, is left alone."""
    found = run_mpi(Fault("work", "loading w", ()), engine, tmp_path, SECONDS)
    assert found.code == 0 and found.left == 0, found.text


# The same from a notebook.


@pytest.fixture
def own_ipython(tmp_path, monkeypatch):
    pytest.importorskip("ipyparallel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}:{TESTS}")
    return str(tmp_path)


def processes(ipython: str) -> list[psutil.Process]:
    return [p for p in processes_with("IPYTHONDIR", f"{ipython}/ipython") if p != psutil.Process()]


def gone(ipython: str) -> bool:
    deadline = time.time() + 10
    while processes(ipython) and time.time() < deadline:
        time.sleep(0.1)
    return not processes(ipython)


def test_cluster(engine, own_ipython, capsys):
    from mmdit_lib import parallel

    with parallel.cluster(2) as ranks:
        assert ranks.run(greet, "hello") == [0, 1]
        folder = ranks._fault_file.parent
        assert list(folder.glob("ompi*")), "mpiexec keeps its files in /tmp, where those of a killed one may stop it"
        assert capsys.readouterr().out.splitlines() == ["[rank 0] hello", "[rank 1] hello"]
        assert ranks.run(join_twice, str(engine)) == [[0, 0, 0], [1, 1, 1]]
        start = time.time()
        with pytest.raises(RuntimeError, match="rank 1 failed: ValueError: rank 1 had enough"):
            ranks.run(fail, "raise")
        print(f"notebook, raise: {time.time() - start:.1f} s")
        assert time.time() - start < LIMIT
        with pytest.raises(RuntimeError, match="start a new cluster"):
            ranks.run(greet, "hello")
    assert gone(own_ipython)


@pytest.mark.parametrize(("how", "shown"), [("kill", "was killed or ran out of memory"), ("stop", "is frozen")])
def test_cluster_with_a_killed_or_frozen_rank(how, shown, own_ipython):
    from mmdit_lib import parallel

    with parallel.cluster(2, heartbeat=SECONDS) as ranks:
        ranks.run(greet, "hello")  # which imports the file there
        start = time.time()
        with pytest.raises(RuntimeError, match=rf"^rank 1 on \S+ {shown}"):
            ranks.run(fail, how)
        print(f"notebook, {how}: {time.time() - start:.1f} s")
        assert time.time() - start < LIMIT - HEARTBEAT_SECONDS + SECONDS
    assert gone(own_ipython)


def test_ipyparallel_reports_a_killed_rank_first(own_ipython, monkeypatch):
    """It may notice before the list of processes has been read: the watchdogs' verdict is shown all the same."""
    from mmdit_lib import parallel

    with parallel.cluster(2, heartbeat=SECONDS) as ranks:
        ranks.run(greet, "hello")
        monkeypatch.setattr(ranks, "_died", lambda: None)
        with pytest.raises(RuntimeError, match=r"^rank 1 on \S+ was killed or ran out of memory"):
            ranks.run(fail, "kill")
    assert gone(own_ipython)


def test_leftovers_of_a_killed_notebook(own_ipython):
    from mmdit_lib import parallel

    code = (
        "import time; from mmdit_lib import parallel; ranks = parallel.cluster(2).start(); "
        "print('up', flush=True); time.sleep(100)"
    )
    with psutil.Popen([sys.executable, "-c", code], stdout=-1, text=True) as notebook:
        assert notebook.stdout.readline() == "up\n"
        assert parallel.stop_clusters() == [], "its owner lives"
        notebook.kill()
    assert len(processes(own_ipython)) >= 3
    (stopped,) = parallel.stop_clusters()
    assert stopped.startswith(f"{notebook.pid}-")
    assert gone(own_ipython)
