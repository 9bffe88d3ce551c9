"""The tensorrt backend on a fake runtime: which plans are trusted, what the context is given, times of layers."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import fake_tensorrt
import helpers
import pytest
import torch

from mmdit_lib import MMDiTRunner
from mmdit_lib.engine.folder import EngineFolder, plan_file
from mmdit_lib.reports.profile import profile_step

BY_TENSORRT = dict(backend="tensorrt", device="cpu")


@pytest.fixture(scope="module")
def case() -> helpers.Case:
    return helpers.case("sd3.5-medium")


@pytest.fixture
def engine(case, tmp_path) -> Path:
    return Path(shutil.copytree(case.engine(), tmp_path / "engine"))


@pytest.fixture
def plan(case, monkeypatch) -> fake_tensorrt.Plan:
    graph = EngineFolder.open(case.engine()).graph(0)
    tensors = {value.name: (value.dtype, value.shape) for value in graph.inputs}
    return fake_tensorrt.install(monkeypatch, tensors | {"output": tensors["hidden_states"]})


def tamper(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_plan_gets_its_inputs_where_it_was_told(case, engine, plan):
    inputs = case.inputs(batch=3)
    runner = MMDiTRunner.from_engine(engine, **BY_TENSORRT)
    assert plan.deserialized == [(engine / plan_file(0)).read_bytes()]
    assert torch.equal(runner.run(inputs), inputs["hidden_states"])
    assert all(torch.equal(plan.seen[name], value) for name, value in inputs.items())


@pytest.mark.parametrize("options", [{}, dict(verify=False)])
def test_a_tampered_plan_is_refused_before_it_is_deserialized(engine, plan, options):
    tamper(engine / plan_file(0))
    with pytest.raises(ValueError, match=r"rank0\.engine has changed: .*; a plan is code: --trust runs it") as error:
        MMDiTRunner.from_engine(engine, **BY_TENSORRT, **options)
    assert "\n" not in str(error.value) and plan.deserialized == []
    MMDiTRunner.from_engine(engine, trust=True, **BY_TENSORRT)
    assert plan.deserialized == [(engine / plan_file(0)).read_bytes()]


@pytest.mark.parametrize("backend", ["pytorch", "tensorrt"])
def test_work_goes_to_the_backends_device(backend, case, engine, plan, monkeypatch):
    """Triton and TensorRT send it to the current CUDA device, which may be another one."""
    options = dict(backend=backend, device="cpu", checkpoint_dir=case.checkpoint())
    runner, inputs, entered = MMDiTRunner.from_engine(engine, **options), case.inputs(), []
    opened, names = runner.backend, [x.name for x in runner.folder.inputs]
    runner.run(inputs)  # memory for the plan's inputs, on the CPU
    monkeypatch.setattr(opened, "device", torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(entered.append(device)))
    calls = [lambda: opened({name: inputs[name] for name in names})]
    if backend == "pytorch":
        calls.append(lambda: opened.intermediates(inputs))
    for call in calls:
        entered.clear()
        call()
        assert set(entered) == {torch.device("cuda:1")}


def test_an_option_of_the_other_backend_is_refused(engine, plan):
    with pytest.raises(ValueError, match=r"^compile is an option of the pytorch backend: use --backend pytorch"):
        MMDiTRunner.from_engine(engine, compile=True, **BY_TENSORRT)


def test_another_users_folder_is_refused(engine, plan, monkeypatch):
    if os.geteuid() == 0:
        os.chown(engine / "config.json", 4321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(ValueError, match=r"config\.json belongs to another user; a plan is code"):
        MMDiTRunner.from_engine(engine, **BY_TENSORRT)
    assert plan.deserialized == []
    MMDiTRunner.from_engine(engine, trust=True, **BY_TENSORRT)


def test_trust_is_about_plans_only(case, engine):
    """The graph file is data: its checksum is verified, and `trust` does not change that."""
    tamper(engine / plan_file(0))
    MMDiTRunner.from_engine(engine, backend="pytorch", checkpoint_dir=case.checkpoint(), device="cpu")
    tamper(engine / "rank0.graph.json")
    with pytest.raises(ValueError, match=r"rank0\.graph\.json has changed"):
        MMDiTRunner.from_engine(engine, backend="pytorch", checkpoint_dir=case.checkpoint(), trust=True)


def test_an_input_that_the_model_does_not_have(engine, plan):
    plan.tensors = {"workspace": ("int64", (4,)), **plan.tensors}
    with pytest.raises(ValueError, match="has an input workspace, which SD3Transformer2DModel does not have"):
        MMDiTRunner.from_engine(engine, **BY_TENSORRT)


def test_times_of_layers_are_means_by_module(engine, plan):
    runner = MMDiTRunner.from_engine(engine, **BY_TENSORRT)
    size = runner.folder.build_config.opt_resolution
    times = profile_step(runner, resolution=size, batch=2, text_tokens=154, repeats=3)
    assert list(times.ms) == [2.0, 1.0] and list(times.module) == ["transformer_blocks.0.attn", "proj_out"]
