"""Build options of trtexec and trtllm-build: passed to TensorRT, recorded in the folder, refused by name."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch

from mmdit_lib import EngineFolder, PlanOptions, build
from mmdit_lib.engine import builder_config as module
from mmdit_lib.engine.builder_config import builder_config, save_timing_cache
from mmdit_lib.engine.logger import logger
from mmdit_lib.engine.tensorrt_backend import TensorRTBackend
from mmdit_lib.network.trt import installed, trt


@pytest.fixture
def config():
    """An `IBuilderConfig` with given options."""
    builder = trt.Builder(logger())

    def make(**options):
        return builder_config(builder, "float16", {}, options=PlanOptions(**options))

    return make


def test_tensorrt_is_given_them(config):
    plain = config()
    assert config(builder_optimization_level=0).builder_optimization_level == 0 != plain.builder_optimization_level
    for text, nbytes in (("512", 512 << 20), ("64 MiB", 64 << 20), ("2gib", 2 << 30)):
        assert config(workspace=text).get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == nbytes
    verbose = config(profiling_verbosity="detailed").profiling_verbosity
    assert verbose == trt.ProfilingVerbosity.DETAILED != plain.profiling_verbosity
    for name, flag in (("refit", "REFIT"), ("weight_streaming", "WEIGHT_STREAMING"), ("strip_plan", "STRIP_PLAN")):
        member = getattr(trt.BuilderFlag, flag)
        assert config(**{name: True}).get_flag(member) and not plain.get_flag(member)


def test_every_option_has_its_member_in_the_api():
    assert set(module.NEEDS) == set(PlanOptions.model_fields)


@pytest.mark.slow
def test_they_are_recorded_and_the_timing_cache_is_written(tmp_path):
    cache = tmp_path / "timings.cache"
    options = PlanOptions(builder_optimization_level=1, weight_streaming=True, timing_cache=cache)
    case = helpers.case("sd3.5-medium")
    sizes = {f"{end}_resolution": str(2 * case.step) for end in ("min", "opt", "max")}
    folder = build(case.checkpoint(), tmp_path / "engine", plan_options=options, progress=False, **sizes)
    assert EngineFolder.open(folder).plan_options == options
    content = cache.read_bytes()
    assert content and sorted(path.name for path in tmp_path.iterdir()) == ["engine", "timings.cache"]
    build(case.checkpoint(), tmp_path / "engine", plan_options=options, progress=False, **sizes)
    assert cache.read_bytes() == content  # TensorRT-RTX times nothing when it builds


@pytest.mark.slow
def test_a_workspace_that_is_too_small(tmp_path):
    with pytest.raises(ValueError, match="no tactics to implement the operation within workspace limit"):
        case = helpers.case("sd3.5-medium")
        build(case.checkpoint(), tmp_path / "engine", plan_options=PlanOptions(workspace="1"), progress=False)


def refused(tmp_path, options: PlanOptions) -> str:
    with pytest.raises(ValueError) as error:
        build(tmp_path / "nothing", tmp_path / "engine", plan_options=options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(builder_optimization_level=6), "builder_optimization_level 6: use 0 to 5"),
        (dict(workspace="much"), "workspace 'much': give a size such as 512MiB or 8GiB"),
        (dict(workspace="0"), "workspace '0': give a size such as 512MiB"),
        (
            dict(timing_cache=Path("missing/file")),
            "timing_cache missing/file: give a file name in a folder that exists",
        ),
        (dict(timing_cache=Path()), "timing_cache .: give a file name"),
    ],
)
def test_wrong_values_are_named(tmp_path, options, words):
    assert words in refused(tmp_path, PlanOptions(**options))


def test_a_timing_cache_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = PlanOptions(timing_cache=Path("~/timings.cache"))
    assert options.timing_cache == tmp_path / "timings.cache"
    module.check_options(options)


def test_a_timing_cache_that_cannot_be_written_is_refused_before_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "access", lambda path, mode: Path(path) != tmp_path)
    said = refused(tmp_path, PlanOptions(timing_cache=tmp_path / "timings.cache"))
    assert said == f"timing_cache {tmp_path / 'timings.cache'}: no permission to write in {tmp_path}"


def test_a_timing_cache_that_is_not_written_does_not_lose_the_plan(tmp_path, caplog):
    class Config:
        def get_timing_cache(self):
            return SimpleNamespace(serialize=lambda: b"timings")

    save_timing_cache(Config(), tmp_path / "timings.cache")
    assert (tmp_path / "timings.cache").read_bytes() == b"timings" and not caplog.records
    save_timing_cache(Config(), tmp_path / "removed" / "timings.cache")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "the plan is complete, but timing_cache" in record.message


def test_what_this_tensorrt_does_not_have_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(module.NEEDS, "weight_streaming", ("BuilderFlag", "NO_SUCH_FLAG"))
    said = f"weight_streaming: {installed()} has no BuilderFlag.NO_SUCH_FLAG; build without this option"
    assert refused(tmp_path, PlanOptions(weight_streaming=True)) == said


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is refused without a GPU")
@pytest.mark.parametrize("name", ["refit", "strip_plan"])
def test_what_only_a_gpu_builds(tmp_path, name):
    assert refused(tmp_path, PlanOptions(**{name: True})).startswith(f"{name}: TensorRT builds such a plan only on")


def test_a_stripped_plan_is_not_run():
    folder = EngineFolder.open(Path(__file__).parent / "data" / "f36e368" / "engine")
    stripped = replace(folder, plan_options=PlanOptions(strip_plan=True))
    assert "has no weights: refit it first" in TensorRTBackend.refusal(stripped, torch.device("cpu"))
