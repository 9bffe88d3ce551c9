"""TensorRT's Python API as data: the members of every class of an installed binding, with their signatures.

As a script, `python trt_api.py tensorrt_rtx` prints it as JSON. A process can load one binding only
(pybind11 registers each C++ type once), so each one is read in a process of its own.
"""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
Api = dict[str, dict[str, str]]
"""By class: its members, inherited ones too, and their signatures, one a line. 'ILogger.Severity' is a nested class."""
MODULE = ""
"""The package's own members are under this name."""


def make_stand_ins(folder: Path) -> Path:
    """Compile empty libraries with the entry points that TensorRT 11's binding takes from the real ones."""
    source = folder / "stand_in.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS))
    for name in LIBRARIES:
        subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", folder / f"lib{name}.so.11"], check=True)
    return folder


def read_api(package: str, libraries: Path | None = None) -> Api:
    """`libraries` is a folder with the shared libraries that the binding is linked to."""
    env = os.environ | ({"LD_LIBRARY_PATH": str(libraries)} if libraries else {})
    run = subprocess.run([sys.executable, __file__, package], env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


def describe(package: str) -> Api:
    """The API of a package; loads its binding into this process."""
    module, api = importlib.import_module(package), {}
    _add_class(api, MODULE, {name: value for name, value in vars(module).items() if not inspect.ismodule(value)})
    binding = importlib.import_module(module.ILogger.__module__).__name__
    return json.loads(json.dumps(api).replace(f"{binding}.", ""))


def _add_class(api: Api, owner: str, members: dict) -> None:
    public = {name: member for name, member in members.items() if name[0] != "_" or name == "__init__"}
    api[owner] = {name: _signature(member) for name, member in public.items()}
    for name, member in public.items():
        if isinstance(member, type) and (qualified := f"{owner}.{name}".lstrip(".")) not in api:
            _add_class(api, qualified, {n: inspect.getattr_static(member, n) for n in dir(member)})


def _signature(member) -> str:
    if isinstance(member, type):
        return "class"
    if isinstance(member, property):
        return f"{_signature(member.fget)} {'read and write' if member.fset else 'read only'}"
    if not callable(member):
        return f"value -> {type(member).__qualname__}"
    lines = (member.__doc__ or "").splitlines()
    return "\n".join(re.sub(r"^\d+\. ", "", line) for line in lines if re.search(r"^(\d+\. )?\w*\(.*\) ->", line))


def argument_counts(signature: str) -> range:
    """'f(self: X, a: int, b: int = 1) -> Y' takes 1 or 2; a property, '(self: X) -> Y', none."""
    if signature[0] == "(":
        return range(0)
    arguments = ast.parse(f"def {re.sub('<[^<>]*>', 'None', signature.replace('::', '.'))}: ...").body[0].args
    return range(len(arguments.args) - len(arguments.defaults) - 1, len(arguments.args))


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1])))
