"""All TensorRT API that the library uses is, with the same signatures, in TensorRT-RTX and in TensorRT 11.

Most of it is recorded during a build. What only a GPU can run is listed here, and the list is compared with
the source. TensorRT 11's binding is read without its libraries.
"""

import ast
import importlib.util
import json
import re
import shutil
from pathlib import Path

import fp8
import pytest
from trt_api import MODULE, Api, argument_counts, make_stand_ins, read_api

import mmdit_lib
from mmdit_lib.checkpoint import convert
from mmdit_lib.config import PlanOptions
from mmdit_lib.engine import build as build_module
from mmdit_lib.engine.build import build
from mmdit_lib.network.trt import Features, trt
from training.random_pipeline import make_random_pipeline

RTX, TRT11 = "tensorrt_rtx", "tensorrt_bindings"
TRT10 = json.loads((Path(__file__).parent / "data" / "tensorrt_10.13.3.9.json").read_text())
"""By class: its members in `tensorrt-cu12-bindings` 10.13.3.9, read with `trt_api.py` in an environment of its own."""
ENGINE = Path(mmdit_lib.__file__).parent / "engine"
SOURCE = "\n".join((ENGINE / name).read_text() for name in ("tensorrt_backend.py", "refit.py", "logger.py"))

LISTED = {
    MODULE: {
        "Runtime": 1, "TensorIOMode": None, "ILogger": None, "IProgressMonitor": None, "IProfiler": None,
        "Refitter": 2, "Weights": 3, "WeightsRole": None,
    },
    "WeightsRole": {"CONSTANT": None},
    "Refitter": {"set_weights": 3, "get_missing": 0, "refit_cuda_engine": 0},
    "TensorIOMode": {"INPUT": None},
    "Runtime": {"deserialize_cuda_engine": 1},
    "ICudaEngine": {
        "create_execution_context": 0, "num_io_tensors": None,
        "get_tensor_name": 1, "get_tensor_mode": 1, "get_tensor_dtype": 1,
    },
    "IExecutionContext": {
        "set_communicator": 1, "set_input_shape": 2, "get_tensor_shape": 1,
        "set_tensor_address": 2, "execute_async_v3": 1, "profiler": None,
    },
    "ILogger": {"Severity": None, "log": 2},
    "ILogger.Severity": {"INTERNAL_ERROR": None, "ERROR": None, "WARNING": None},
    "IProfiler": {"report_layer_time": 2},
    "IProgressMonitor": {"phase_start": 3, "phase_finish": 1, "step_complete": 2},
}  # fmt: skip
"""The members that `SOURCE` calls or overrides, with the number of positional arguments; None if it only reads them."""

OURS = {"engine", "name"}
"""Attributes of the library's own objects in `SOURCE` that happen to have a TensorRT member's name."""

RTX_ONLY = {
    (MODULE, "ComputeCapability"), ("ComputeCapability", "SM89"),
    ("IBuilderConfig", "num_compute_capabilities"), ("IBuilderConfig", "set_compute_capability"),
}  # fmt: skip
"""`build.py` asks `hasattr(options, "set_compute_capability")` first: TensorRT 11 builds for the GPU at hand only."""


@pytest.fixture(scope="module")
def apis(tmp_path_factory) -> tuple[Api, Api]:
    """Of TensorRT-RTX and of TensorRT 11."""
    pytest.importorskip(RTX, reason="tensorrt_rtx is not installed (pip install tensorrt-rtx-cu13)")
    if not shutil.which("gcc") or not importlib.util.find_spec(TRT11):
        pytest.skip("reading TensorRT 11's API takes gcc and its binding (pip install tensorrt-cu13-bindings)")
    return read_api(RTX), read_api(TRT11, make_stand_ins(tmp_path_factory.mktemp("stand_ins")))


def fault(apis: tuple[Api, Api], owner: str, name: str, arguments: int | None = None) -> str | None:
    """What prevents this use in one of the packages, in one line; None if nothing does."""
    what = f"{owner}.{name}".lstrip(".")
    rtx, trt11 = (api.get(owner, {}).get(name) for api in apis)
    lacking = [package for package, found in ((RTX, rtx), (TRT11, trt11)) if found is None]
    if lacking:
        return f"{what} is not in {' and '.join(lacking)}"
    if not set(rtx.splitlines()) <= set(trt11.splitlines()):
        return f"{what} differs: {rtx} in {RTX}, {trt11} in {TRT11}"
    if arguments is None:
        return None
    if rtx == "class":
        return fault(apis, name, "__init__", arguments)
    fits = any(arguments in argument_counts(line) for line in rtx.splitlines())
    return None if fits else f"{what} does not take {arguments} arguments: {rtx}"


def names_used(members: set[str]) -> set[tuple]:
    """(name, number of arguments) of each attribute and method in `SOURCE` that has the name of one of `members`."""
    nodes = list(ast.walk(ast.parse(SOURCE)))
    calls = {n.func: "by keyword" if n.keywords else len(n.args) for n in nodes if isinstance(n, ast.Call)}
    found = {(n.attr, calls.get(n)) for n in nodes if isinstance(n, ast.Attribute)}
    methods = [f for n in nodes if isinstance(n, ast.ClassDef) for f in n.body if isinstance(f, ast.FunctionDef)]
    found |= {(f.name, len(f.args.args) - 1) for f in methods}
    return {(name, arguments) for name, arguments in found if name in members - OURS - {"__init__"}}


def complaints(apis: tuple[Api, Api], listed: dict[str, dict]) -> list[str]:
    """A line for each difference between a list and `SOURCE`, and for each of its members that a package lacks."""
    uses = [(owner, *use) for owner, members in listed.items() for use in members.items()]
    used = names_used({name for api in apis for owner in listed for name in api.get(owner, ())})
    names = {(name, arguments) for _, name, arguments in uses}
    differ = [f"{name} (arguments: {n}) is only in the source" for name, n in used - names]
    differ += [f"{name} (arguments: {n}) is only in the list" for name, n in names - used]
    return [*differ, *filter(None, (fault(apis, *use) for use in uses))]


def test_the_list_fits_the_source_and_both_packages(apis):
    assert complaints(apis, LISTED) == []


@pytest.mark.parametrize(
    ("owner", "members", "expected"),
    [
        ("Runtime", {"deserialise": 1}, "Runtime.deserialise is not in tensorrt_rtx and tensorrt_bindings"),
        ("Runtime", {}, "deserialize_cuda_engine .arguments: 1. is only in the source"),
        ("Runtime", {"engine_header_size": None}, "Runtime.engine_header_size is not in tensorrt_bindings"),
        ("IExecutionContext", {"set_input_shape": 3}, "set_input_shape does not take 3 arguments"),
        ("IExecutionContext", {"set_input_shape": 3}, "set_input_shape .arguments: 2. is only in the source"),
        (MODULE, {"Runtime": 0}, "Runtime.__init__ does not take 0 arguments"),
        ("INetworkDefinition", {"add_shape": 1}, "add_shape differs: .* in tensorrt_rtx"),
    ],
)
def test_a_wrong_list_is_reported(apis, owner, members, expected):
    rtx, trt11 = apis
    changed = {"INetworkDefinition": {"add_shape": "add_shape(self: INetworkDefinition) -> IShapeLayer"}}
    assert re.search(expected, "\n".join(complaints((rtx, trt11 | changed), LISTED | {owner: members})))


class Recorded:
    """Takes the place of the package or of one of its enums, and adds to `used` what is taken from it."""

    def __init__(self, used: set, owner: str, target):
        self._recorded = used, owner, target

    def __getattr__(self, name: str):
        used, owner, target = self._recorded
        if name[:2] != "__":
            used.add((owner, name))
        value = getattr(target, name)
        return Recorded(used, name, value) if isinstance(value, type) and hasattr(value, "__members__") else value


def record(package, monkeypatch) -> set[tuple[str, str]]:
    """The set to which each (class, member) is added from now on when it is used."""
    used: set[tuple[str, str]] = set()

    def recording(cls: type, name: str, function):
        def call(*args, **kwargs):
            used.add((cls.__name__, name))
            return function(*args, **kwargs)

        return call

    binding = importlib.import_module(package.ILogger.__module__)
    members = [(c, *m) for c in vars(binding).values() if isinstance(c, type) for m in vars(c).items()]
    for cls, name, member in members:
        if type(member) is property and not hasattr(cls, "__members__"):
            parts = (part and recording(cls, name, part) for part in (member.fget, member.fset))
            monkeypatch.setattr(cls, name, property(*parts))
        elif type(member).__name__ == "instancemethod" and (name[0] != "_" or name == "__init__"):
            monkeypatch.setattr(cls, name, recording(cls, name, member))
    monkeypatch.setitem(vars(trt), "package", Recorded(used, MODULE, package))
    return used


@pytest.mark.slow
def test_what_a_build_uses_is_in_both(apis, tmp_path, monkeypatch):
    """A build with its plan, the networks of a layout that has every collective, and one in FP8."""
    quantized = fp8.checkpoint("sd3.5-medium")
    model = str(make_random_pipeline(tmp_path / "model"))
    whole = convert(model, str(tmp_path / "whole"), dtype="float32", progress=False)
    split = convert(model, str(tmp_path / "split"), dtype="float16", tp_size=2, progress=False)
    used = record(importlib.import_module(RTX), monkeypatch)
    build(str(whole), str(tmp_path / "plan"), cp_size=2, compute_capability=("8.9",), progress=False)
    build(str(split), str(tmp_path / "graphs"), cp_size=2, cp_method="ulysses", plan=False, progress=False)
    build(quantized, tmp_path / "fp8", plan=False, progress=False)
    assert {("INetworkDefinition", "add_quantize"), ("IDequantizeLayer", "axis"), ("DataType", "FP8")} <= used
    assert {("CollectiveOperation", name) for name in ("ALL_GATHER", "ALL_REDUCE", "ALL_TO_ALL")} <= used
    assert {("INetworkDefinition", "add_dist_collective"), ("IShuffleLayer", "reshape_dims"), *RTX_ONLY} <= used
    faults = {use: line for use in used if (line := fault(apis, *use))}
    assert faults == {use: f"{'.'.join(use).lstrip('.')} is not in {TRT11}" for use in RTX_ONLY}


@pytest.mark.slow
def test_what_one_rank_uses_is_in_tensorrt_10(tmp_path, monkeypatch):
    """Its fallbacks included, which `Features` selects."""
    whole = convert(str(make_random_pipeline(tmp_path / "model")), str(tmp_path / "whole"), progress=False)
    quantized = fp8.checkpoint("sd3.5-medium")
    monkeypatch.setattr(build_module, "installed_features", lambda: Features(False, False, False))
    used = record(importlib.import_module(RTX), monkeypatch)
    options = PlanOptions(builder_optimization_level=3, workspace="1GiB", profiling_verbosity="detailed")
    build(str(whole), str(tmp_path / "plan"), plan_options=options, progress=False)
    build(quantized, tmp_path / "fp8", plan=False, progress=False)
    assert {("INetworkDefinition", name) for name in ("add_softmax", "add_normalization")} <= used
    used |= {(owner, name) for owner, members in LISTED.items() for name in members}
    assert {use for use in used if use[1] not in TRT10[use[0]]} == {("IExecutionContext", "set_communicator")}
