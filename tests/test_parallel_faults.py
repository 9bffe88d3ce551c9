"""A rank that raises, is killed or never starts: all ranks stop, the reason is shown, no process is left behind."""

import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import Case, model_config

from mmdit_lib.checkpoint import convert
from mmdit_lib.engine.build import build
from mmdit_lib.parallel.faults import START_SECONDS

pytest.importorskip("mpi4py")
from helpers import TESTS, mpirun
from parallel_tasks import fail, greet, join_twice

pytestmark = pytest.mark.slow
LIMIT = 30


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    case = Case(model_config(num_layers=2), tmp_path_factory.mktemp("faults"))
    checkpoint = convert(str(case.transformer), str(case.root / "checkpoint"), tp_size=2, progress=False)
    return build(str(checkpoint), str(case.root / "engine"), plan=False, progress=False)


def processes(word: str) -> list[psutil.Process]:
    """Processes with `word` in their arguments or in their IPYTHONDIR, except this one."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("IPYTHONDIR", "")]
            if any(word in text for text in words) and process.pid != psutil.Process().pid:
                found.append(process)
        except psutil.Error:
            pass
    return found


FAULTS = {  # what: (what is shown, seconds of waiting that the test asks for instead of START_SECONDS)
    "raise": (["rank 1: RuntimeError: rank 1 had enough", "Traceback", 'raise RuntimeError("rank 1 had enough")'], 0),
    "exit": (["rank 1: rank 1 says so in one line"], 0),
    "kill": (["rank 1", "signal 9"], 0),
    "absent": (["rank 0: TimeoutError: rank 0 waited 3 s for rank 1, which did not join"], 3),
    "unstarted": (["Timeout (0:00:03)!", "in start_mpi"], 3),
}


@pytest.mark.parametrize("what", FAULTS)
def test_all_ranks_stop(what, engine, tmp_path, record_property):
    shown, waited = FAULTS[what]
    done = mpirun(2, TESTS / "parallel_faults.py", what, engine, tmp_path / "mark", timeout=90)
    assert (tmp_path / "mark").exists(), done.stderr
    while left := processes(str(tmp_path)):
        assert time.time() - float((tmp_path / "mark").read_text()) < LIMIT, left
        time.sleep(0.05)
    seconds = time.time() - float((tmp_path / "mark").read_text())
    print(f"{what}: all ranks had stopped {seconds:.1f} s after the fault")
    record_property("seconds", seconds)
    assert done.returncode != 0
    assert all(text in done.stderr for text in shown), done.stderr
    assert seconds - waited + (START_SECONDS if waited else 0) < LIMIT


# The same from a notebook.


@pytest.fixture
def own_ipython(tmp_path, monkeypatch):
    pytest.importorskip("ipyparallel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}:{TESTS}")
    return str(tmp_path)


def gone(word: str) -> bool:
    deadline = time.time() + 10
    while processes(word) and time.time() < deadline:
        time.sleep(0.1)
    return not processes(word)


def test_cluster(engine, own_ipython, capsys):
    from mmdit_lib import parallel

    with parallel.cluster(2) as ranks:
        assert ranks.run(greet, "hello") == [0, 1]
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


def test_cluster_with_a_killed_rank(own_ipython):
    from mmdit_lib import parallel

    with parallel.cluster(2) as ranks:
        ranks.run(greet, "hello")  # which imports the file there
        start = time.time()
        with pytest.raises(RuntimeError, match="rank 1 died: its process"):
            ranks.run(fail, "kill")
        print(f"notebook, kill: {time.time() - start:.1f} s")
        assert time.time() - start < LIMIT
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
