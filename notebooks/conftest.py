"""How pytest runs the notebooks (nbval): a failed cell ends its notebook, GPU cells need a GPU, no cluster remains."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[1])
# The kernels import the library as it stands beside the notebooks, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
sys.path[:0] = [ROOT, str(Path(ROOT, "tests"))]  # this process too: it reaps the clusters
os.environ.setdefault("IPP_NONINTERACTIVE", "1")  # ipyparallel: ordered output, real tracebacks

from gpu_cells import gpus_here, gpus_needed  # noqa: E402


def is_cell(item: pytest.Item) -> bool:
    return hasattr(item, "cell_num")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Snippets are run by tests/test_notebooks.py, each alone in a fresh process, which is stricter."""
    snippets = [item for item in items if is_cell(item) and "snippet" in item.cell.metadata.get("tags", [])]
    config.hook.pytest_deselected(items=snippets)
    items[:] = [item for item in items if item not in snippets]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not is_cell(item):
        return
    failed = getattr(item.parent, "failed_cell", None)
    if failed is not None:
        pytest.skip(f"cell {failed} of this notebook failed")
    if (needed := gpus_needed(item.cell)) and needed > gpus_here():
        pytest.skip(f"needs {needed} GPU{'s' * (needed > 1)}; the notebook has the output of a machine that has them")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    outcome = yield
    if is_cell(item) and outcome.get_result().failed:
        item.parent.failed_cell = item.cell_num


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A kernel that nbval kills runs no exit handlers: stop the clusters that its notebook had started."""
    if "ipyparallel" not in sys.modules and not Path(ROOT, "mmdit_lib", "parallel").is_dir():
        return
    try:
        from mmdit_lib import parallel
    except ImportError:
        return
    stop = getattr(parallel, "stop_clusters", None)
    if stop is not None:
        stop()
