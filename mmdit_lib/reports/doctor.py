"""`mmdit doctor`: what is installed here, what each missing piece is for, and how to install it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..engine.capability import refused_capability
from ..network.trt import installed

PYTHONS = (3, 10), (3, 13)
"""The first and the last that are supported, as in pyproject.toml, which is not there if the package is installed."""


class Check(NamedTuple):
    name: str
    found: str
    """Version or name; empty if it is missing."""
    gives: str
    how_to_install: str
    ok: bool


def doctor() -> list[Check]:
    """Everything the library can use, required packages first. Imports only torch and TensorRT."""
    return [
        python(),
        pytorch(),
        package("diffusers", "pipelines around the runner; the reference for parity"),
        package("transformers", "the text encoders"),
        package("safetensors", "reading and writing checkpoints"),
        tensorrt(),
        *gpus(),
        package("fa3_fwd", "faster attention on Hopper GPUs (pytorch backend)", extra="hopper"),
        mpi(),
        package("mpi4py", "communication between ranks under mpirun", extra="parallel"),
        package("ipyparallel", "several ranks inside a notebook", extra="parallel"),
        package("onnx", "`mmdit onnx`: engines as ONNX files", extra="onnx"),
        package("peft", "LoRAs in diffusers' own pipelines, for comparison; engines do not need it", extra="dev"),
        package("jupyterlab", "`make lab`: the notebooks", extra="notebooks"),
        tiny_model(),
    ]


def print_doctor(checks: list[Check] | None = None, console: Console | None = None) -> None:
    table = Table("", "found", "what it is for", "how to get it", title="mmdit doctor", title_justify="left")
    for check in doctor() if checks is None else checks:
        mark, how = ("[green]ok[/]", "") if check.ok else ("[yellow]--[/]", check.how_to_install)
        table.add_row(f"{mark} {check.name}", check.found or "not found", check.gives, escape(how))
    (console or Console()).print(table)


def python() -> Check:
    first, last = (".".join(map(str, version)) for version in PYTHONS)
    supported = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    return Check("python", platform.python_version(), "runs the library", f"Python {first} to {last}", supported)


def pytorch() -> Check:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU only"
    gives = "the pytorch backend; tensors and CUDA streams of both backends"
    return Check("torch", f"{torch.__version__}, {build}", gives, "pip install torch", True)


def install(extra: str) -> str:
    """How to install an extra of pyproject.toml, in a checkout."""
    return f"pip install '.[{extra}]'"


def package(name: str, gives: str, extra: str | None = None) -> Check:
    """A Python package, found without importing it, and the extra that installs it."""
    try:
        found = metadata.version(name) if importlib.util.find_spec(name) else ""
    except metadata.PackageNotFoundError:
        found = "of unknown version"
    return Check(name, found, gives, install(extra) if extra else f"pip install {name}", bool(found))


def tensorrt() -> Check:
    found = installed()
    gives = "building plans (tensorrt_rtx: on any x86-64 Linux machine, no GPU needed) and the tensorrt backend"
    how = f"{install('rtx')} (works without a GPU), or {install('gpu')} (data-center GPUs)"
    return Check("TensorRT", found or "", gives, how, found is not None)


def gpus() -> list[Check]:
    """One check per GPU, with what can run on it."""
    if not torch.cuda.is_available():
        gives = "running plans, CUDA graphs; without one the pytorch backend runs on the CPU"
        return [Check("GPU", "", gives, "an NVIDIA GPU, its driver, and a CUDA build of torch", False)]
    return [gpu(i) for i in range(torch.cuda.device_count())]


def gpu(index: int) -> Check:
    capability = torch.cuda.get_device_capability(index)
    found = f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}"
    here = installed()
    why_not = refused_capability(here.split()[0], capability) if here else "no TensorRT is installed"
    gives = f"no plan runs on it: {why_not}; the pytorch backend does" if why_not else f"runs plans of {here}"
    return Check(f"GPU {index}", found, gives, install("gpu"), why_not is None)


def mpi() -> Check:
    found = mpirun()
    how = f"{install('parallel')}, or apt-get install openmpi-bin"
    return Check("mpirun", found, "one process per GPU", how, bool(found))


def mpirun() -> str:
    """The first line of `mpirun --version`; empty if it is not installed."""
    # The wheel installs it next to python; that environment may not be active.
    command = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    if command is None:
        return ""
    try:
        run = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip().partition("\n")[0] if run.returncode == 0 else ""


def tiny_model() -> Check:
    found = resources.files("mmdit_lib").joinpath("tiny", "weights")
    present = found.is_dir() and any(found.iterdir())
    gives = "`mmdit demo` and the notebooks without a download"
    return Check("tiny model", "ships with the package" if present else "", gives, "install mmdit_lib again", present)
