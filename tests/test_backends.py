"""Which backend runs, where and from what: moved folders, no TensorRT, no GPU, a changed checkpoint."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import get_args

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit_lib import MMDiTRunner
from mmdit_lib.checkpoint import convert
from mmdit_lib.engine import host_memory, tensorrt_backend, warm_up
from mmdit_lib.engine.backend import BackendName, RunnerOptions
from mmdit_lib.engine.backends import BACKENDS
from mmdit_lib.engine.build import build
from mmdit_lib.engine.capability import refused_capability
from mmdit_lib.engine.device import numbered
from mmdit_lib.engine.folder import EngineFolder
from mmdit_lib.engine.lowering import lower
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.engine.tensorrt_backend import TensorRTBackend, refusal
from mmdit_lib.network.trt import installed

REPOSITORY = Path(__file__).parents[1]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is refused without a GPU")


@pytest.fixture(scope="module")
def case() -> helpers.Case:
    return helpers.case("sd3.5-medium")


@pytest.fixture
def moved(case, tmp_path) -> Path:
    """Engine folder and checkpoint, moved side by side to another place."""
    shutil.copytree(case.checkpoint(), tmp_path / "elsewhere" / "checkpoint-float32")
    shutil.copytree(case.engine(), tmp_path / "elsewhere" / "engine")
    return tmp_path / "elsewhere"


@NO_GPU
def test_without_a_gpu(case):
    runner = MMDiTRunner.from_engine(case.engine())
    assert runner.backend.name == "pytorch" and runner.reason == "this machine has no CUDA GPU"
    with pytest.raises(ValueError) as error:
        MMDiTRunner.from_engine(case.engine(), backend="tensorrt")
    assert str(error.value) == "backend tensorrt: this machine has no CUDA GPU"
    with pytest.raises(ValueError, match=r"rank0\.engine cannot run here: this machine has no CUDA GPU"):
        TensorRTBackend.open(EngineFolder.open(case.engine()), RunnerOptions())
    runner = MMDiTRunner.from_engine(case.engine(), backend="pytorch")
    assert (runner.backend.name, runner.reason) == ("pytorch", "requested")


@pytest.mark.parametrize(
    ("gpus", "device", "said"),
    [
        (0, "cuda", "device cuda: this machine has no CUDA GPU"),
        (0, "cuda:7", "device cuda:7: this machine has no CUDA GPU"),
        (0, "gpu", "device 'gpu': use cpu, cuda or cuda:N"),
        (0, torch.device("meta"), "device 'meta': use cpu, cuda or cuda:N"),
        (1, "cuda:7", "device cuda:7: this machine has only cuda:0"),
        (2, "cuda:7", "device cuda:7: this machine has only cuda:0 to cuda:1"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, case, gpus, device, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"^{said}$"):
        MMDiTRunner.from_engine(case.engine(plan=False), device=device)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert RunnerOptions().torch_device == RunnerOptions(device="cpu").torch_device == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^cuda_graph needs a CUDA device, but this run uses cpu$"):
        RunnerOptions(cuda_graph=True).check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert RunnerOptions().torch_device == torch.device("cuda")
    assert RunnerOptions(device="cuda:1").torch_device == torch.device("cuda:1")
    RunnerOptions(cuda_graph=True).check()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [str(numbered(x)) for x in ("cuda", "cuda:0", torch.device("cpu"))] == ["cuda:1", "cuda:0", "cpu"]


def test_refusals_name_what_is_there(monkeypatch):
    assert "built with --no-plan" in refusal(None)
    other = refusal("tensorrt 10.13.3")
    assert "built with tensorrt 10.13.3" in other and f"{installed()} is installed" in other
    monkeypatch.setattr(tensorrt_backend, "installed", lambda: None)
    assert refusal("tensorrt 11.4.0") == "the plan was built with tensorrt 11.4.0, and no TensorRT is installed"
    assert refused_capability("tensorrt_rtx", (9, 0)).endswith("and this GPU has 9.0")
    assert refused_capability("tensorrt_rtx", (12, 1)) is None and refused_capability("tensorrt", (9, 0)) is None


def test_an_unknown_layer_is_named(case):
    graph = case.runner().backend.graph
    weights = case.runner().folder.open_checkpoint().weights()

    def lowered(layer_type: str, attributes: dict):
        def change(layer):
            return replace(layer, type=layer_type, attributes=attributes) if layer.type == "UNARY" else layer

        return lower(replace(graph, layers=tuple(map(change, graph.layers))), weights)

    with pytest.raises(ValueError, match=r"^layer '.*': the pytorch backend has no operator for layers of type LRN$"):
        lowered("LRN", {})
    with pytest.raises(ValueError, match=r"^layer '.*': the pytorch backend does not support UNARY with TANH$"):
        lowered("UNARY", {"op": "TANH"})


def test_the_command_offers_every_backend():
    assert get_args(BackendName) == ("auto", *BACKENDS)


def test_unknown_backend(case):
    with pytest.raises(ValueError, match="backend 'onnx': use auto, tensorrt or pytorch"):
        MMDiTRunner.from_engine(case.engine(), backend="onnx")
    with pytest.raises(ValueError, match="runner option 'cudagraph': use checkpoint_dir, backend, device, compile, "):
        MMDiTRunner.from_engine(case.engine(), cudagraph=True)


ONLY_TORCH = """
import sys

BLOCKED = sys.argv[4].split(",")
class Without:  # a finder that does not see what is blocked, as if it were not installed
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)

import torch
from safetensors.torch import load_file, save_file
inputs = load_file(sys.argv[2])
if "diffusers" in BLOCKED:  # the network alone
    from mmdit_lib.engine.folder import EngineFolder
    from mmdit_lib.engine.pytorch_backend import PyTorchBackend
    folder = EngineFolder.open(sys.argv[1])
    output = PyTorchBackend(folder.graph(0), folder.open_checkpoint().weights())(inputs)
else:
    from mmdit_lib import MMDiTRunner
    runner = MMDiTRunner.from_engine(sys.argv[1], device="cpu")
    print(runner.reason)
    output = runner.run(inputs)
save_file({"output": output}, sys.argv[3])
assert not {name.split(".")[0] for name in sys.modules} & set(BLOCKED)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "blocked", ["tensorrt,tensorrt_rtx,tensorrt_bindings", "tensorrt,tensorrt_rtx,diffusers,transformers,matplotlib"]
)
def test_a_moved_folder_runs_where_there_is_no_tensorrt(case, moved, tmp_path, blocked):
    inputs = case.inputs()
    save_file(inputs, tmp_path / "inputs.safetensors")
    command = [
        sys.executable,
        "-c",
        ONLY_TORCH,
        moved / "engine",
        tmp_path / "inputs.safetensors",
        tmp_path / "out.safetensors",
        blocked,
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if "diffusers" not in blocked:
        assert "no TensorRT is installed" in run.stdout
    # Another process may have a different memory layout and pick other kernels: float32 rounding, as in test_network.
    assert helpers.relative_error(load_file(tmp_path / "out.safetensors")["output"], case.runner().run(inputs)) <= 5e-6


def test_checkpoint_elsewhere(case, moved, tmp_path):
    os.rename(moved / "checkpoint-float32", tmp_path / "renamed")
    with pytest.raises(
        ValueError, match=r"'checkpoint-float32', which is not at .*; give its path with --checkpoint_dir"
    ):
        MMDiTRunner.from_engine(moved / "engine", backend="pytorch")
    runner = MMDiTRunner.from_engine(
        moved / "engine", backend="pytorch", checkpoint_dir=tmp_path / "renamed", device="cpu"
    )
    assert torch.equal(runner.run(case.inputs()), case.runner().run(case.inputs()))


def test_checkpoint_changed_after_the_build(case, moved):
    path = moved / "checkpoint-float32" / "rank0.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank0\.safetensors has changed: its sha256 is "):
        MMDiTRunner.from_engine(moved / "engine", backend="pytorch")
    MMDiTRunner.from_engine(moved / "engine", backend="pytorch", verify=False)
    path.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"truncated|has changed: expected"):
        MMDiTRunner.from_engine(moved / "engine", backend="pytorch")


def test_only_this_ranks_file_is_verified(case, moved, monkeypatch):
    convert(str(case.transformer), str(moved / "halved"), tp_size=2, progress=False)
    folder = EngineFolder.open(build(str(moved / "halved"), str(moved / "two"), plan=False, progress=False))
    path = moved / "halved" / "rank1.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    folder.open_checkpoint(tp_rank=0)
    for tp_rank in (1, None):
        with pytest.raises(ValueError, match=r"rank1\.safetensors has changed: its sha256 is "):
            folder.open_checkpoint(tp_rank=tp_rank)
    monkeypatch.setattr("mmdit_lib.files.records.sha256_of", None)  # no checksum is computed
    folder.open_checkpoint(verify=False)
    folder.graph(0, verify=False)


def test_checkpoint_below_the_home_folder(moved, monkeypatch):
    monkeypatch.setenv("HOME", str(moved))
    checkpoint = EngineFolder.open(moved / "engine").open_checkpoint("~/checkpoint-float32")
    assert checkpoint.path == moved / "checkpoint-float32"


def test_checkpoint_converted_anew(case, moved):
    other = helpers.random_transformer(case.config, seed=1)
    other.save_pretrained(moved / "other")
    convert(str(moved / "other"), str(moved / "checkpoint-float32"), progress=False)
    with pytest.raises(ValueError, match=r"is not the file that .*engine was built from; build again"):
        MMDiTRunner.from_engine(moved / "engine", backend="pytorch", verify=False)


def test_damaged_engine_is_refused(moved):
    path = moved / "engine" / "rank0.graph.json"
    path.write_text(path.read_text().replace('"SUM"', '"SUB"', 1))
    with pytest.raises(ValueError, match=r"rank0\.graph\.json has changed: its sha256 is"):
        MMDiTRunner.from_engine(moved / "engine", backend="pytorch")


def test_graph_only_folder(case, tmp_path):
    build(str(case.checkpoint()), str(tmp_path / "engine"), plan=False, progress=False)
    runner = MMDiTRunner.from_engine(tmp_path / "engine", device="cpu")
    assert "--no-plan" in runner.reason
    assert torch.equal(runner.run(case.inputs()), case.runner().run(case.inputs()))


def test_weights_stay_mapped_from_disk(case):
    """On the CPU the pytorch backend copies no weight except the crop of the position table."""
    weights = case.runner().folder.open_checkpoint().weights()
    module = PyTorchBackend(case.runner().backend.graph, weights).module
    addresses = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    ours = {node.meta["weight"]: getattr(module, node.target) for node in module.graph.nodes if node.meta.get("weight")}
    assert all(tensor.untyped_storage().data_ptr() in addresses for tensor in ours.values())


def test_freed_memory_is_returned_when_sizes_change(case, monkeypatch):
    calls = []
    monkeypatch.setattr("mmdit_lib.engine.pytorch_backend.return_freed_memory", lambda: calls.append(1))
    runner = case.open()
    for patches, count in (((8, 8), 1), ((8, 8), 1), ((4, 6), 2), ((8, 8), 3)):
        runner.run(case.inputs(patches=patches))
        assert len(calls) == count


def test_returning_freed_memory_needs_glibc(monkeypatch):
    host_memory.return_freed_memory()
    host_memory._malloc_trim.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # a C library without malloc_trim
    host_memory.return_freed_memory()
    host_memory._malloc_trim.cache_clear()


@pytest.mark.parametrize("method", ["__call__", "intermediates", "profile", "replace_weights"])
def test_what_follows_waits_for_the_thread_that_compiles_kernels(case, method):
    backend = PyTorchBackend.open(case.runner().folder, RunnerOptions(device="cpu"))
    assert not warm_up._running, "only on a GPU"
    inputs, entered, go, order = case.runner().prepare(case.inputs())[0], threading.Event(), threading.Event(), []

    def slow() -> None:
        entered.set()
        go.wait(60)
        order.append("kernels")

    arguments = {"profile": (inputs, 1), "replace_weights": ((), None)}.get(method, (inputs,))
    warm_up.start(slow)
    assert entered.wait(60)
    threading.Timer(0.2, go.set).start()
    getattr(backend, method)(*arguments)
    assert order == ["kernels"] and not warm_up._running


def test_several_threads_wait():
    go, ended = threading.Event(), []
    for number in range(3):
        warm_up.start(lambda number=number: go.wait(60) and ended.append(number))
    found = []

    def waits() -> None:
        warm_up.wait()
        found.append(sorted(ended))

    threads = [threading.Thread(target=waits) for _ in range(4)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(60)
    assert found == [[0, 1, 2]] * 4 and not warm_up._running


def test_a_step_that_compiles_kernels(case, caplog):
    """It is a step; if it fails, that is left to the program's own steps."""
    backend = PyTorchBackend.open(case.runner().folder, RunnerOptions(device="cpu"))
    inputs = case.runner().prepare(case.inputs())[0]
    with caplog.at_level(logging.DEBUG, "mmdit_lib"):
        backend.warm_up(inputs)
        backend.warm_up({name: value[..., :1] for name, value in inputs.items()})
        found = backend(inputs)
    assert torch.equal(found, case.runner().backend(inputs))
    assert caplog.text.count("a step that compiles kernels failed") == 1
