"""Whatever the library touches of TensorRT's API exists, with the same signature, in TensorRT-RTX and in TensorRT 11.

What it touches is collected twice, never listed by hand: by reading the source (`trt_touches.py`),
which also covers what needs a GPU, and by recording a real build. TensorRT 11's binding is read
without its libraries.
"""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trt_api import MODULE, RTX, TRT11, Api, make_stand_ins, read_api
from trt_touches import Touch, faults, one_sided, strings_in, touches_in, touches_of

import mmdit_lib
from mmdit_lib.network.trt import trt

BINDING = "tensorrt-cu13-bindings==11.4.0.106"
SOURCES = sorted(Path(mmdit_lib.__file__).parent.rglob("*.py"))


@pytest.fixture(scope="module")
def rtx() -> Api:
    pytest.importorskip(RTX, reason="tensorrt_rtx is not installed (pip install tensorrt-rtx-cu13)")
    return read_api(RTX)


@pytest.fixture(scope="module")
def trt11(tmp_path_factory, pytestconfig) -> Api:
    if shutil.which("gcc") is None:
        pytest.skip("TensorRT 11's binding needs stand-in libraries, and there is no gcc to compile them")
    stand_ins = make_stand_ins(tmp_path_factory.mktemp("stand_ins"))
    try:
        return read_api(TRT11, stand_ins)
    except ImportError:
        return read_api(TRT11, stand_ins, downloaded_binding(pytestconfig.cache.mkdir("tensorrt11")))


def downloaded_binding(folder: Path) -> Path:
    """The binding in a folder of its own, for an environment without the `dev` extra."""
    if not (folder / TRT11).exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), BINDING]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"TensorRT 11's binding is not installed and cannot be had (pip install {BINDING})")
    return folder


def test_everything_the_source_touches_is_in_both(rtx, trt11):
    touches = touches_of(SOURCES, rtx)
    assert {"engine", "network"} <= {Path(touch.where).parent.name for touch in touches}
    assert len({(touch.owners, touch.name) for touch in touches}) > 100, "the reader has gone blind"
    assert faults(touches, rtx, trt11) == []


# A real build, recorded ---------------------------------------------------------------------------


class Recorder:
    """Notes every member of TensorRT's classes that is used while it is installed."""

    def __init__(self, package, monkeypatch):
        self.package = package
        self.monkeypatch = monkeypatch
        self.used: set[tuple[str, str]] = set()

    def install(self) -> None:
        binding = importlib.import_module(self.package.ILogger.__module__)
        for name, cls in vars(binding).items():
            if isinstance(cls, type) and not hasattr(cls, "__members__"):
                self._wrap_class(name, cls)
        self.monkeypatch.setitem(vars(trt), "package", Noting(self, MODULE, self.package))

    def _wrap_class(self, owner: str, cls: type) -> None:
        for name, member in list(vars(cls).items()):
            if type(member) is property:  # not a static one, which cannot be replaced
                wrapped = property(
                    self._noting(owner, name, member.fget), member.fset and self._noting(owner, name, member.fset)
                )
            elif type(member).__name__ == "instancemethod" and (name[0] != "_" or name == "__init__"):
                wrapped = self._noting(owner, name, member)
            else:
                continue
            self.monkeypatch.setattr(cls, name, wrapped)

    def _noting(self, owner: str, name: str, function):
        def noting(*args, **kwargs):
            self.used.add((owner, name))
            return function(*args, **kwargs)

        return noting


class Noting:
    """Stands for the package or one of its enums, and notes what is taken from it."""

    def __init__(self, recorder: Recorder, owner: str, target):
        self._noting = recorder, owner, target

    def __getattr__(self, name: str):
        recorder, owner, target = self._noting
        value = getattr(target, name)
        if not name.startswith("__"):
            recorder.used.add((owner, name))
        return Noting(recorder, name, value) if hasattr(value, "__members__") and isinstance(value, type) else value


@pytest.fixture
def recorded_build(rtx, tmp_path, monkeypatch) -> set[tuple[str, str]]:
    """(class, member) of all that building a tiny model for two ranks uses."""
    from mmdit_lib.checkpoint import convert
    from mmdit_lib.engine.build import build
    from training.random_pipeline import make_random_pipeline

    model = make_random_pipeline(tmp_path / "model")
    checkpoint = convert(str(model), str(tmp_path / "checkpoint"), dtype="float16", progress=False)
    recorder = Recorder(importlib.import_module(RTX), monkeypatch)
    recorder.install()
    build(str(checkpoint), str(tmp_path / "engine"), cp_size=2, compute_capability=("8.9",))
    return recorder.used


def test_everything_a_build_uses_is_in_both_and_was_seen_in_the_source(recorded_build, rtx, trt11):
    used = {(owner, name) for owner, name in recorded_build if owner == MODULE or owner in rtx.classes}
    assert {("INetworkDefinition", "add_dist_collective"), ("ActivationType", "GELU_TANH")} <= used
    touches = touches_of(SOURCES, rtx)
    # What a function asks for by `hasattr` first, and the members of such an enum, need not be in both.
    guarded = {touch.name for touch in touches if touch.guards} & one_sided(rtx, trt11)
    used = {(owner, name) for owner, name in used if not guarded & {owner, name}}
    seen = {touch.name for touch in touches} | {"__init__"}
    assert sorted((owner, name) for owner, name in used if name not in seen) == [], "the reader missed these"
    assert faults([Touch("the recorded build", frozenset({o}), n) for o, n in used], rtx, trt11) == []


# The reader itself --------------------------------------------------------------------------------


def complaints_about(source: str, rtx: Api, trt11: Api) -> str:
    tree = ast.parse("from .trt import trt\n" + source)
    return "\n".join(faults(touches_in(tree, "sample.py", rtx, strings_in(tree)), rtx, trt11))


CAPABILITY = "config.num_compute_capabilities = 1; config.set_compute_capability(trt.ComputeCapability.SM89, 0)"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("trt.NoSuchClass", "sample.py:2: NoSuchClass is not in tensorrt_rtx .* and tensorrt_bindings"),
        ("trt.ActivationType.GELU_TANHH", "ActivationType.GELU_TANHH is not in"),
        ("trt.ComputeCapability.SM89", "ComputeCapability is not in tensorrt_bindings"),
        ("getattr(trt.BuilderFlag, {'user': 'REQUIRE_USER_ALLOCATION'}[x])", "REQUIRE_USER_ALLOCATION is not in"),
        ("def f(network):\n  cast = network.add_cast(x, y)\n  cast.too_type = z", ":4: ICastLayer.too_type is not in"),
        ("trt.Runtime(log).deserialize_cuda_engine(x).create_context()", "ICudaEngine.create_context is not in"),
        ("trt.Runtime(log).engine_header_size", "Runtime.engine_header_size is not in tensorrt_bindings"),
        ("engine.load_weights(x)", "ICudaEngine.load_weights is not in tensorrt_bindings"),
        ("context.execute_async_v3(stream=1)", r"execute_async_v3 does not take .*\['stream'\]"),
        ("context.execute_async_v3()", "execute_async_v3 does not take 0 arguments"),
        ("class M(trt.IProgressMonitor):\n  def phase_start(self, name): ...", "phase_start does not take 1 arguments"),
        ("class B:\n  def __init__(self):\n    self.e = trt.Runtime(l).deserialize_cuda_engine(x)\n"
         "  def go(self):\n    self.e.no_such()", "sample.py:6: ICudaEngine.no_such is not in"),
        (f"def f(config):\n  {CAPABILITY}", "sample.py:3: IBuilderConfig.set_compute_capability is not in tensorrt_"),
    ],
)  # fmt: skip
def test_the_reader_reports(rtx, trt11, source, expected):
    assert re.search(expected, complaints_about(source, rtx, trt11)), complaints_about(source, rtx, trt11)


@pytest.mark.parametrize(
    "source",
    [
        f"def f(config):\n  if hasattr(config, 'set_compute_capability'):\n    {CAPABILITY}",
        "def f(runtime):\n  return runtime.engine_header_size if hasattr(runtime, 'engine_header_size') else 64",
        "member = getattr(trt.BuilderFlag, 'REQUIRE_USER_ALLOCATION', None)",
        "trt.Weights(trt.DataType.HALF, pointer, count)",
        "builder = trt.Builder(log); builder.build_serialized_network(network, builder.create_builder_config())",
        "path.name; file.read(3); tensor.dtype; names.pop(0)",
    ],
)
def test_the_reader_accepts(rtx, trt11, source):
    assert complaints_about(source, rtx, trt11) == ""
