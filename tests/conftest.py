"""Tests use no network and no display; those marked `gpu` are skipped without a GPU. The longest start first."""

import os
import re
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; tests send it to themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST_FIRST = [
    "notebooks/07",
    "notebooks/06",
    "tests/test_notebooks.py",
    "4 ranks",
    "tests/test_browser.py",
    "notebooks/05",
    "2 ranks",
    "notebooks/09",
    "notebooks/04",
    "notebooks/",
    "tests/test_parallel_faults.py",
    "tests/test_parallel.py",
    "tests/test_two_hosts.py",
    "tests/test_network.py",
    "tests/test_docs.py",
    "tests/test_controlnet.py",
    "tests/test_skip_layers.py",
    "3 ranks",
    "tests/test_files_faults.py",
    "tests/test_tiny_adapters.py",
    "tests/test_plots.py",
    "tests/test_fp8.py",
    "tests/test_memory.py",
    "tests/test_step_time.py",
    "tests/test_tensorrt_10.py",
    "tests/test_judge.py",
    "tests/test_adapters.py",
    "tests/test_cli.py",
]
"""Test files and notebooks that take 15 s or more, by their duration, so that no process has a long one left at the
end. Which two run at a time makes no difference."""


def ranks_of(nodeid: str) -> str | None:
    """'2 ranks' if a test gives tasks to so many (`ranks.py`), by its name: `TestRanks` and `..._on_ranks[2]`."""
    found = re.search(r"(?:TestRanks::|_on_ranks\[).*?(\d)\]$", nodeid)
    return found and f"{found[1]} ranks"


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        name = ranks_of(item.nodeid) or item.nodeid
        return next((i for i, start in enumerate(LONGEST_FIRST) if name.startswith(start)), 99)

    items.sort(key=place)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_runtest_teardown(item, nextitem):
    ranks = ranks_of(item.nodeid)
    if ranks and (nextitem is None or ranks_of(nextitem.nodeid) != ranks):
        from ranks import stop_ranks

        stop_ranks()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """As `--dist=loadscope`, but tests that give tasks to the same ranks belong together, whatever file they are in."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return ranks_of(nodeid) or super()._split_scope(nodeid)

    return ByScope(config, log)
