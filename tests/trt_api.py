"""TensorRT's Python API as data: the members of every class of an installed binding, with their signatures.

As a script, `python trt_api.py tensorrt_rtx` prints it as JSON. A process can load one binding only
(pybind11 registers each C++ type once), so each one is read in a process of its own.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

RTX, TRT11 = "tensorrt_rtx", "tensorrt_bindings"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
MODULE = ""
"""The owner of the package's own members."""


class Api(NamedTuple):
    name: str
    classes: dict[str, dict[str, str]]
    """By class ('ILogger.Severity' if nested): its members, inherited ones too, and their signatures, one a line."""


class Use(NamedTuple):
    owner: str
    name: str
    arguments: int | None = None
    """How many a call passes, without `self`; None if the member is not called or the call is not known."""


def read_api(package: str, libraries: Path | None = None) -> Api:
    """`libraries` is a folder with the shared libraries that the binding is linked to."""
    env = dict(os.environ)
    if libraries:
        env["LD_LIBRARY_PATH"] = f"{libraries}{os.pathsep}{env.get('LD_LIBRARY_PATH', '')}"
    run = subprocess.run([sys.executable, __file__, package], env=env, capture_output=True, text=True)
    if run.returncode:
        raise ImportError(run.stderr.strip().splitlines()[-1])
    return Api(*json.loads(run.stdout))


def make_stand_ins(folder: Path) -> Path:
    """Compile empty libraries with the names and entry points that TensorRT 11's binding is linked to."""
    source = folder / "stand_in.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS))
    for name in LIBRARIES:
        soname = f"lib{name}.so.11"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", str(source), "-o", str(folder / soname)]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def fault(use: Use, rtx: Api, trt11: Api) -> str | None:
    """What is wrong with a use, in one line; None if it fits both packages and every signature is in both."""
    what = f"{use.owner}.{use.name}".lstrip(".")
    here, there = (api.classes.get(use.owner, {}).get(use.name) for api in (rtx, trt11))
    if here is None or there is None:
        lacking = [api.name for api, signature in ((rtx, here), (trt11, there)) if signature is None]
        return f"{what} is not in {' and '.join(lacking)}"
    if not set(here.splitlines()) <= set(there.splitlines()):
        return f"{what} differs: {here!r} in {rtx.name}, {there!r} in {trt11.name}"
    if use.arguments is None:
        return None
    if here == "class":
        return fault(Use(use.name, "__init__", use.arguments), rtx, trt11)
    fits = any(use.arguments in counts(line) for line in here.splitlines())
    return None if fits else f"{what} does not take {use.arguments} arguments: {here}"


def counts(signature: str) -> range:
    """How many arguments 'f(self: X, a: int, b: int = 1) -> Y' takes, without `self`; none for a property."""
    if not re.match(r"\w+\(", signature):
        return range(0)
    arguments = ast.parse(f"def {re.sub('<[^<>]*>', 'None', signature.replace('::', '.'))}: ...").body[0].args
    return range(len(arguments.args) - len(arguments.defaults) - 1, len(arguments.args))


# In the process that loads the binding ------------------------------------------------------------


def describe(package: str) -> tuple[str, dict]:
    module = importlib.import_module(package)
    public = {name: value for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)}
    classes: dict[str, dict] = {}
    _describe(classes, MODULE, public)
    binding = importlib.import_module(module.ILogger.__module__).__name__
    return f"{package} {module.__version__}", json.loads(json.dumps(classes).replace(f"{binding}.", ""))


def _describe(classes: dict, owner: str, members: dict) -> None:
    signatures = classes[owner] = {}
    for name, member in members.items():
        if name.startswith("_") and name != "__init__":
            continue
        signatures[name] = _signature(member)
        if isinstance(member, type) and (qualified := f"{owner}.{name}".lstrip(".")) not in classes:
            _describe(classes, qualified, {n: inspect.getattr_static(member, n) for n in dir(member)})


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


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1])))
