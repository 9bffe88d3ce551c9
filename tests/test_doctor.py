"""`mmdit doctor` shows what is installed and what is missing, and does not fail if something is."""

import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mmdit_lib.engine.capability import plan_runs_here, refused_capability
from mmdit_lib.reports import doctor as module
from mmdit_lib.reports.doctor import Check, doctor, print_doctor


def checks() -> dict[str, Check]:
    return {check.name: check for check in doctor()}


def fake_gpu(monkeypatch, capability: tuple[int, int], name: str = "NVIDIA H100") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)


def test_every_piece_has_a_line_and_says_how_to_get_it():
    found = checks()
    assert {"python", "torch", "diffusers", "transformers", "safetensors", "TensorRT", "jupyterlab"} <= found.keys()
    assert {"mpirun", "mpi4py", "ipyparallel", "tiny model"} <= found.keys()
    assert found["torch"].found.startswith(torch.__version__)
    assert all(check.gives and check.how_to_install for check in found.values())
    assert all(check.ok == bool(check.found) for check in found.values() if not check.name.startswith("GPU"))


def test_nothing_optional_installed(monkeypatch):
    monkeypatch.setattr(module, "installed", lambda: None)
    monkeypatch.setattr(module.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find_spec = importlib.util.find_spec
    optional = ("mpi4py", "ipyparallel", "jupyterlab", "onnx", "peft", "fa3_fwd")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda n, *a: None if n in optional else find_spec(n, *a))
    found = checks()
    for name in ("TensorRT", "GPU", "mpirun", *optional):
        assert not found[name].ok and found[name].found == ""
    assert printed().count("not found") >= 9
    extras = re.findall(r"pip install '\.\[(\w+)\]'", printed())
    assert extras.count("parallel") == 3 and {"rtx", "hopper", "onnx", "notebooks"} <= set(extras)
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras)


@pytest.mark.parametrize(
    ("package", "capability", "runs"),
    [
        ("tensorrt_rtx", (7, 5), True),
        ("tensorrt_rtx", (8, 9), True),
        ("tensorrt_rtx", (9, 0), False),
        ("tensorrt_rtx", (12, 1), True),
        ("tensorrt", (9, 0), True),
        ("tensorrt", (7, 0), False),
    ],
)
def test_each_gpu_says_whether_a_plan_runs_on_it(monkeypatch, package, capability, runs):
    fake_gpu(monkeypatch, capability)
    monkeypatch.setattr(module, "installed", lambda: f"{package} 11.4.0.106")
    check = checks()["GPU 0"]
    assert check.ok is runs and "NVIDIA H100" in check.found
    assert (plan_runs_here(package) is None) is runs
    assert (refused_capability(package, capability) is None) is runs
    if not runs:
        assert f"{capability[0]}.{capability[1]}" in check.gives and "pytorch backend does" in check.gives


def test_no_gpu_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan_runs_here("tensorrt") == "this machine has no CUDA GPU"


def test_an_mpirun_that_fails_counts_as_missing(monkeypatch, tmp_path):
    (tmp_path / "mpirun").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.mpirun() == ""


def printed() -> str:
    console = Console(file=io.StringIO(), width=200)
    print_doctor(console=console)
    return console.file.getvalue()


def test_the_table_names_every_check():
    text = printed()
    assert all(check.name in text for check in doctor())
