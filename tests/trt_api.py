"""TensorRT's Python API as data: every class, member and signature of an installed binding.

As a script: `python trt_api.py tensorrt_rtx` prints it as JSON. A process can hold one binding only
(pybind11 registers each C++ type once), so each one is read in a process of its own.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from functools import cached_property
from pathlib import Path

RTX, TRT11 = "tensorrt_rtx", "tensorrt_bindings"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
MODULE = ""
"""The owner of what the package itself holds."""


class Api:
    """`classes`: by name ('ILogger.Severity' where nested) the base classes and the members' signatures."""

    def __init__(self, name: str, version: str, classes: dict[str, dict]):
        self.name = f"{name} {version}"
        self.classes = classes

    def member(self, owner: str, name: str) -> str | None:
        """The signature of `owner`'s member, its base classes' too; None where there is none."""
        entry = self.classes.get(owner)
        if entry is None or name in entry["members"]:
            return entry and entry["members"][name]
        return next((found for base in entry["bases"] if (found := self.member(base, name)) is not None), None)

    @cached_property
    def owners(self) -> dict[str, list[str]]:
        """Which classes define a member of this name."""
        found: dict[str, list[str]] = {}
        for owner, entry in self.classes.items():
            for name in entry["members"]:
                found.setdefault(name, []).append(owner)
        return found

    def is_choice(self, owner: str, name: str) -> bool:
        """Whether it is a class of the package or a member of an enum: what code picks by a computed name."""
        return self.member(owner, name) in ("class", f"value -> {owner}")

    def returned(self, signature: str) -> set[str]:
        """The classes of this API that a signature's result may be."""
        results = " ".join(re.findall(r"->(.*)", signature))
        return {name for name in re.findall(r"[A-Za-z_][\w.]*", results) if name in self.classes and name != MODULE}


def read_api(package: str, libraries: Path | None = None, packages: Path | None = None) -> Api:
    """Args: libraries, packages: folders where the binding finds its libraries, and Python the binding."""
    env = dict(os.environ)
    for name, folder in (("LD_LIBRARY_PATH", libraries), ("PYTHONPATH", packages)):
        if folder:
            env[name] = f"{folder}{os.pathsep}{env.get(name, '')}"
    run = subprocess.run([sys.executable, __file__, package], env=env, capture_output=True, text=True)
    if run.returncode:
        raise ImportError(run.stderr.strip().splitlines()[-1])
    return Api(**json.loads(run.stdout))


def make_stand_ins(folder: Path) -> Path:
    """Empty libraries with the names and entry points that TensorRT 11's binding is linked to."""
    source = folder / "stand_in.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS))
    for name in LIBRARIES:
        soname = f"lib{name}.so.11"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", str(source), "-o", str(folder / soname)]
        subprocess.run(command, check=True, capture_output=True)
    return folder


# In the process that holds the binding ------------------------------------------------------------


def describe(package: str) -> dict:
    module = importlib.import_module(package)
    binding = importlib.import_module(module.ILogger.__module__)
    classes: dict[str, dict] = {}
    _describe_class(classes, MODULE, _public(module), ())
    return {"name": package, "version": module.__version__, "classes": _without_module(classes, binding.__name__)}


def _public(module) -> dict:
    return {name: value for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)}


def _describe_class(classes: dict, owner: str, members: dict, bases: tuple) -> None:
    signatures: dict[str, str] = {}
    classes[owner] = {
        "bases": [b.__name__ for b in bases if b.__module__.startswith("tensorrt")],
        "members": signatures,
    }
    for name, member in members.items():
        if name.startswith("_") and name != "__init__":
            continue
        signatures[name] = _signature(member)
        if isinstance(member, type) and (qualified := f"{owner}.{name}".lstrip(".")) not in classes:
            _describe_class(classes, qualified, vars(member), member.__bases__)


def _signature(member) -> str:
    if isinstance(member, type):
        return "class"
    if isinstance(member, property):
        return f"{_signature(member.fget)} {'read and write' if member.fset else 'read only'}"
    if inspect.isfunction(member):
        return f"{member.__name__}{inspect.signature(member)}"
    if callable(member):
        lines = (member.__doc__ or "").splitlines()
        return "\n".join(re.sub(r"^\d+\. ", "", line) for line in lines if re.search(r"^(\d+\. )?\w*\(.*\) ->", line))
    return f"value -> {type(member).__qualname__}"


def _without_module(classes: dict, binding: str) -> dict:
    return json.loads(json.dumps(classes).replace(f"{binding}.", ""))


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1])))
