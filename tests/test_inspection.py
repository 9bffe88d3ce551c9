"""What `mmdit inspect` shows for engine folders and checkpoints."""

import io
import math

import helpers
import pytest
from rich.console import Console
from safetensors import safe_open

from mmdit_lib.checkpoint import convert
from mmdit_lib.engine.build import build
from mmdit_lib.reports.inspection import CheckpointReport, EngineReport, describe, inspect, print_inspection, size


@pytest.fixture(scope="module")
def case() -> helpers.Case:
    return helpers.case("sd3.5-medium")


def printed(folder) -> str:
    console = Console(width=160, file=io.StringIO())
    print_inspection(folder, console)
    return console.file.getvalue()


def test_engine_folder(case):
    report = inspect(case.engine())
    assert isinstance(report, EngineReport)
    assert [(v.name, v.dtype, v.shape) for v in report.inputs] == [
        ("hidden_states", "float32", (-1, 16, -1, -1)), ("encoder_hidden_states", "float32", (-1, -1, 40)),
        ("pooled_projections", "float32", (-1, 48)), ("timestep", "float32", (-1,)),
    ]  # fmt: skip
    assert [(v.name, v.shape) for v in report.outputs] == [("output", (-1, 16, -1, -1))]
    assert report.profile["hidden_states"] == [(1, 16, 4, 4), (2, 16, 16, 16), (3, 16, 40, 40)]
    assert report.profile["encoder_hidden_states"] == [(1, 77, 40), (2, 333, 40), (3, 589, 40)]
    assert report.layers["ATTENTION"] == 5  # three joint, two more in the dual blocks
    assert sum(report.layers.values()) == report.builds[0].layers
    assert report.files == {path.name: path.stat().st_size for path in case.engine().iterdir()}
    text = printed(case.engine())
    for said in (
        "tensorrt",
        "?x16x?x?",
        "3x589x40",
        "rank0.engine",
        "32x32 to 320x320 pixels, optimized for 128x128",
        "3 blocks, dual attention in 2, 4 heads of 16, QK norm rms_norm",
        "1 (tp 1, cp 1, cfg 1)",
        "checkpoint-float32",
        "process's peak memory",
        "GPU memory  per rank, at batch 3, 320x320 pixels and 589 text tokens (pytorch backend): weights ",
        " MB, activations ",
        " MB, computed ahead ",
    ):
        assert said in text, said


def test_checkpoint(case):
    report = inspect(case.checkpoint())
    assert isinstance(report, CheckpointReport)
    with safe_open(case.checkpoint() / "rank0.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: tensor.shape for name, tensor in report.tensors.items()} == shapes
    assert report.parameters == sum(math.prod(shape) for shape in shapes.values())
    assert report.largest(1)[0][0] == "pos_embed.pos_embed"
    text = printed(case.checkpoint())
    for said in (
        f"{len(shapes)} tensors, {report.parameters:,} parameters",
        "source_dtype float32",
        "1x2304x64",
        "pos_embed_max_size",
    ):
        assert said in text, said


def test_parallel_layout_and_no_plan(case, tmp_path):
    convert(str(case.transformer), str(tmp_path / "c"), tp_size=2, progress=False)
    build(str(tmp_path / "c"), str(tmp_path / "e"), cp_size=2, plan=False, progress=False)
    text = printed(tmp_path / "e")
    assert "4 (tp 2, cp 2, cfg 1; weights sharded as megatron; cp by allgather)" in text
    assert "no plan; network defined with" in text and "rank3.graph.json" in text and "DIST_COLLECTIVE" in text
    assert describe(inspect(tmp_path / "c")) is not None


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither an engine folder nor a checkpoint folder"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not the config of a checkpoint"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(12, "12 B"), (4_568_772_380, "4.57 GB"), (12_345, "12.3 kB"), (1e6, "1 MB")]
)
def test_size(nbytes, text):
    assert size(nbytes) == text
