"""Folders written by an earlier version (f36e368) still open and give the same results."""

from pathlib import Path

import pytest
from helpers import relative_error
from safetensors.torch import load_file

from mmdit_lib import Checkpoint, EngineFolder, Layout, MMDiTRunner

OLD = Path(__file__).parent / "data" / "f36e368"
LAYOUTS = {
    "engine": Layout(),
    "engine_cp2": Layout(cp_size=2, cfg_size=2, cp_method="ulysses"),
    "engine_tp2": Layout(tp_size=2, tp_layout="trtllm"),
}


@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    [("checkpoint", "float32", Layout()), ("checkpoint_tp2", "float16", LAYOUTS["engine_tp2"])],
)
def test_checkpoints(name, dtype, layout):
    checkpoint = Checkpoint.open(OLD / name, verify=True)
    assert (checkpoint.dtype, checkpoint.layout) == (dtype, layout)
    assert len(checkpoint.files) == layout.tp_size
    for rank in range(layout.tp_size):
        assert checkpoint.weights(rank)["proj_out.weight"].shape == (64 // layout.tp_size, 16)


@pytest.mark.parametrize("name", LAYOUTS)
def test_engine_folders(name):
    folder = EngineFolder.open(OLD / name)
    folder.verify()
    assert folder.layout == LAYOUTS[name] and folder.build_config.max_batch_size == 2
    assert folder.open_checkpoint().dtype == folder.dtype
    graphs = [folder.graph(mapping.rank) for mapping in folder.layout.ranks()]
    collectives = {layer.type for graph in graphs for layer in graph.layers} & {"DIST_COLLECTIVE"}
    assert bool(collectives) == (folder.layout.world_size > 1)


def test_the_output_is_the_same():
    stored = load_file(OLD / "run.safetensors")
    expected = stored.pop("output")
    found = MMDiTRunner.from_engine(OLD / "engine", backend="pytorch", device="cpu").run(stored)
    # float32 rounding: another machine may pick other kernels.
    assert relative_error(found, expected) <= 5e-6
