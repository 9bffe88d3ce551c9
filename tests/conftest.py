"""Tests use no network and no display; those marked `gpu` are skipped without a GPU. The longest start first."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

LONGEST_FIRST = [
    "notebooks/07",
    "notebooks/06",
    "tests/test_notebooks.py",
    "tests/test_parallel.py::TestRanks",
    "tests/test_browser.py",
    "notebooks/05",
    "notebooks/09",
    "notebooks/04",
    "tests/test_parallel_faults.py",
    "tests/test_parallel.py",
    "tests/test_network.py",
    "tests/test_docs.py",
    "tests/test_controlnet.py",
    "tests/test_skip_layers.py",
    "tests/test_passes.py",
    "notebooks/",
]
"""Test files and notebooks that take 20 s or more, by their duration, so that no process has a long one left at the
end. Which two run at a time makes no difference."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((i for i, s in enumerate(LONGEST_FIRST) if item.nodeid.startswith(s)), 99))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
