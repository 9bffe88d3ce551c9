"""What the library uses of TensorRT's API exists, with the same signature, in TensorRT-RTX and in TensorRT 11.

Most of it is recorded from a real build. What only a GPU can run is listed here, and the list is compared
with the source. TensorRT 11's binding is read without its libraries.
"""

import ast
import importlib
import re
import shutil
from pathlib import Path

import pytest
from trt_api import MODULE, RTX, TRT11, Api, Use, fault, make_stand_ins, read_api

import mmdit_lib
from mmdit_lib.checkpoint import convert
from mmdit_lib.engine.build import build
from mmdit_lib.network.trt import trt
from training.random_pipeline import make_random_pipeline

ENGINE = Path(mmdit_lib.__file__).parent / "engine"
SOURCE = "\n".join((ENGINE / name).read_text() for name in ("tensorrt_backend.py", "logger.py"))

LISTED = (
    Use(MODULE, "Runtime", 1),
    Use(MODULE, "TensorIOMode"),
    Use(MODULE, "ILogger"),
    Use(MODULE, "IProgressMonitor"),
    Use("TensorIOMode", "INPUT"),
    Use("Runtime", "deserialize_cuda_engine", 1),
    Use("ICudaEngine", "create_execution_context", 0),
    Use("ICudaEngine", "num_io_tensors"),
    Use("ICudaEngine", "get_tensor_name", 1),
    Use("ICudaEngine", "get_tensor_mode", 1),
    Use("ICudaEngine", "get_tensor_dtype", 1),
    Use("IExecutionContext", "set_communicator", 1),
    Use("IExecutionContext", "set_input_shape", 2),
    Use("IExecutionContext", "get_tensor_shape", 1),
    Use("IExecutionContext", "set_tensor_address", 2),
    Use("IExecutionContext", "execute_async_v3", 1),
    Use("ILogger", "Severity"),
    Use("ILogger.Severity", "INTERNAL_ERROR"),
    Use("ILogger.Severity", "ERROR"),
    Use("ILogger.Severity", "WARNING"),
    # TensorRT calls these on our subclasses.
    Use("ILogger", "log", 2),
    Use("IProgressMonitor", "phase_start", 3),
    Use("IProgressMonitor", "phase_finish", 1),
    Use("IProgressMonitor", "step_complete", 2),
)
"""What `tensorrt_backend.py` and `logger.py` use, all of it by position: their calls need a GPU or come from C++."""

OURS = {"engine", "name"}
"""Attributes in these files that TensorRT has too, but that are the library's or Python's own there."""

RTX_ONLY = {
    (MODULE, "ComputeCapability"),
    ("ComputeCapability", "SM89"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
}
"""`build.py` uses these only if `hasattr(options, "set_compute_capability")`: TensorRT builds for the GPU at hand."""


@pytest.fixture(scope="module")
def rtx() -> Api:
    pytest.importorskip(RTX, reason="tensorrt_rtx is not installed (pip install tensorrt-rtx-cu13)")
    return read_api(RTX)


@pytest.fixture(scope="module")
def trt11(tmp_path_factory) -> Api:
    if shutil.which("gcc") is None:
        pytest.skip("TensorRT 11's binding needs stand-in libraries, and there is no gcc to compile them")
    try:
        return read_api(TRT11, make_stand_ins(tmp_path_factory.mktemp("stand_ins")))
    except ImportError as error:
        pytest.skip(f"TensorRT 11's binding cannot be imported (pip install tensorrt-cu13-bindings): {error}")


def used_names(source: str, *apis: Api) -> set[tuple[str, int | str | None]]:
    """(name, number of arguments) of each attribute in `source` that a listed class has, and of each method it overrides."""
    members = {name for api in apis for use in LISTED for name in api.classes.get(use.owner, ())} - OURS
    nodes = list(ast.walk(ast.parse(source)))
    calls = {n.func: "by keyword" if n.keywords else len(n.args) for n in nodes if isinstance(n, ast.Call)}
    found = {(n.attr, calls.get(n)) for n in nodes if isinstance(n, ast.Attribute)}
    methods = [f for n in nodes if isinstance(n, ast.ClassDef) for f in n.body if isinstance(f, ast.FunctionDef)]
    found |= {(f.name, len(f.args.args) - 1) for f in methods}
    return {(name, count) for name, count in found if name in members and name != "__init__"}


def test_the_list_is_what_the_source_uses(rtx, trt11):
    assert used_names(SOURCE, rtx, trt11) == {(use.name, use.arguments) for use in LISTED}


def test_what_is_listed_is_in_both(rtx, trt11):
    assert [line for use in LISTED if (line := fault(use, rtx, trt11))] == []


# A real build, recorded ---------------------------------------------------------------------------


class Recorder:
    """Records every member of TensorRT's classes that is used while it is installed."""

    def __init__(self, package, monkeypatch):
        self.used: set[tuple[str, str]] = set()
        self._monkeypatch = monkeypatch
        binding = importlib.import_module(package.ILogger.__module__)
        for name, cls in vars(binding).items():
            if isinstance(cls, type) and not hasattr(cls, "__members__"):
                self._wrap_class(name, cls)
        monkeypatch.setitem(vars(trt), "package", Recorded(self, MODULE, package))

    def _wrap_class(self, owner: str, cls: type) -> None:
        for name, member in list(vars(cls).items()):
            if type(member) is property:  # not a static one, which cannot be replaced
                setter = member.fset and self._recording(owner, name, member.fset)
                wrapped = property(self._recording(owner, name, member.fget), setter)
            elif type(member).__name__ == "instancemethod" and (name[0] != "_" or name == "__init__"):
                wrapped = self._recording(owner, name, member)
            else:
                continue
            self._monkeypatch.setattr(cls, name, wrapped)

    def _recording(self, owner: str, name: str, function):
        def recording(*args, **kwargs):
            self.used.add((owner, name))
            return function(*args, **kwargs)

        return recording


class Recorded:
    """Takes the place of the package or of one of its enums, and records what is taken from it."""

    def __init__(self, recorder: Recorder, owner: str, target):
        self._recorded = recorder, owner, target

    def __getattr__(self, name: str):
        recorder, owner, target = self._recorded
        value = getattr(target, name)
        if not name.startswith("__"):
            recorder.used.add((owner, name))
        return Recorded(recorder, name, value) if isinstance(value, type) and hasattr(value, "__members__") else value


@pytest.fixture(scope="module")
def recorded(rtx, tmp_path_factory) -> set[tuple[str, str]]:
    """(class, member) of all that two builds use: one with its plan, and the networks of a layout with every collective."""
    folder = tmp_path_factory.mktemp("recorded")
    model = str(make_random_pipeline(folder / "model"))
    whole = convert(model, str(folder / "whole"), dtype="float32", progress=False)
    split = convert(model, str(folder / "split"), dtype="float16", tp_size=2, progress=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder = Recorder(importlib.import_module(RTX), monkeypatch)
        build(str(whole), str(folder / "plan"), cp_size=2, compute_capability=("8.9",), progress=False)
        build(str(split), str(folder / "graphs"), cp_size=2, cp_method="ulysses", plan=False, progress=False)
    return recorder.used


def test_what_a_build_uses_is_in_both(recorded, rtx, trt11):
    assert {("INetworkDefinition", "add_dist_collective"), ("ActivationType", "GELU_TANH")} <= recorded
    assert {("CollectiveOperation", name) for name in ("ALL_GATHER", "ALL_REDUCE", "ALL_TO_ALL")} <= recorded
    assert [line for use in recorded - RTX_ONLY if (line := fault(Use(*use), rtx, trt11))] == []


def test_only_what_tensorrt_11_lacks_is_exempt(recorded, rtx, trt11):
    assert recorded >= RTX_ONLY
    faults = [fault(Use(*use), rtx, trt11) or "" for use in RTX_ONLY]
    assert all(line.endswith(f"is not in {trt11.name}") for line in faults), faults


# The checks themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (Use(MODULE, "NoSuchClass"), "NoSuchClass is not in tensorrt_rtx .* and tensorrt_bindings"),
        (Use("ActivationType", "GELU_TANHH"), "ActivationType.GELU_TANHH is not in tensorrt_rtx"),
        (Use("Runtime", "engine_header_size"), "Runtime.engine_header_size is not in tensorrt_bindings"),
        (Use("INetworkDefinition", "add_attention_v2"), "add_attention_v2 differs: .* in tensorrt_rtx"),
        (Use("INetworkDefinition", "add_shape"), "add_shape is not in tensorrt_bindings"),
        (Use("IExecutionContext", "execute_async_v3", 0), "execute_async_v3 does not take 0 arguments"),
        (Use("IExecutionContext", "set_input_shape", 3), "set_input_shape does not take 3 arguments"),
        (Use("ICudaEngine", "num_io_tensors", 0), "num_io_tensors does not take 0 arguments"),
        (Use(MODULE, "Runtime", 0), "Runtime.__init__ does not take 0 arguments"),
        (Use("IProgressMonitor", "phase_start", 1), "phase_start does not take 1 arguments"),
    ],
)
def test_a_wrong_use_is_reported(rtx, trt11, use, expected):
    members = dict(trt11.classes["INetworkDefinition"])
    members["add_attention_v2"] = members.pop("add_shape")
    changed = trt11._replace(classes=trt11.classes | {"INetworkDefinition": members})
    assert re.search(expected, fault(use, rtx, changed) or "")


@pytest.mark.parametrize(
    ("old", "new", "reported"),
    [
        ("set_tensor_address(name, buffer.data_ptr())", "set_tensor_address(name)", {("set_tensor_address", 1)}),
        ("set_input_shape(name, shape)", "set_input_shape(name, shape=shape)", {("set_input_shape", "by keyword")}),
        ("context.set_tensor_address(", "context.infer_shapes(); context.set_tensor_address(", {("infer_shapes", 0)}),
        ("phase_finish(self, phase_name)", "phase_finish(self)", {("phase_finish", 0)}),
        ("set_communicator(", "set_communicators(", set()),
    ],
)
def test_a_change_of_the_source_is_reported(rtx, trt11, old, new, reported):
    assert old in SOURCE
    used, listed = used_names(SOURCE.replace(old, new), rtx, trt11), {(use.name, use.arguments) for use in LISTED}
    assert used != listed and used - listed == reported
