"""Bugs to find: each is planted where it says, and parity in float32 sees it."""

import fp8
import pytest
import torch

from mmdit_lib import Checkpoint, MMDiTRunner
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.tiny.bugs import BUGS, plant, plant_scale

PLACES = {
    "A": "transformer_blocks.4.norm1_context:0",
    "B": "transformer_blocks.2.ff.net.0",
    "C": "transformer_blocks.0.norm1.norm",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    from mmdit_lib import build, convert, tiny

    folder = tmp_path_factory.mktemp("bugs")
    checkpoint = convert(tiny.model_path(), folder / "checkpoint", dtype="float32", progress=False)
    return build(checkpoint, folder / "engine", plan=False, progress=False)


def values(folder):
    runner = MMDiTRunner.from_engine(folder, backend="pytorch", device="cpu")
    return runner.intermediates(sample_inputs(runner.folder, resolution="64", text_tokens=77, batch=1))


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_where_it_says(engine, bug):
    correct, wrong = values(engine), values(plant(engine, engine.parent / f"engine-{bug}", bug))
    modules = [name for name in correct if "/" not in name]
    differ = [name for name in modules if not torch.equal(correct[name], wrong[name])]
    assert differ[0] == PLACES[bug]


def test_an_edit_that_changes_nothing_is_refused(engine):
    with pytest.raises(ValueError, match="the edit changes none of the"):
        plant(engine, engine.parent / "engine-same", lambda layer: layer)


def test_only_another_engine_folder_is_replaced(engine, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="contains something other than an engine folder; nothing there is over"):
        plant(engine, tmp_path, "A")
    assert (tmp_path / "thesis.txt").read_text() == "all of it"
    (tmp_path / "link").symlink_to(engine)
    before = sorted(path.name for path in engine.iterdir())
    for same in (engine, tmp_path / "link"):
        with pytest.raises(ValueError, match="is the folder to copy; give the name of another one"):
            plant(engine, same, "A")
    assert sorted(path.name for path in engine.iterdir()) == before


def test_only_another_checkpoint_is_replaced(tmp_path):
    checkpoint = fp8.checkpoint("sd3.5-large")
    with pytest.raises(ValueError, match="is the folder to copy; give the name of another one"):
        plant_scale(checkpoint, checkpoint)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="contains something other than a checkpoint; nothing there is overwritten"):
        plant_scale(checkpoint, tmp_path)


def test_one_scale_of_a_checkpoint(tmp_path):
    correct = fp8.checkpoint("sd3.5-large")
    wrong = Checkpoint.open(plant_scale(correct, tmp_path / "wrong")).weights()
    changed = {name: x / wrong[name] for name, x in Checkpoint.open(correct).weights().items() if x.numel() == 1}
    assert {name: x.item() for name, x in changed.items() if x != 1} == {
        "transformer_blocks.3.attn.to_out.0.activation_scaling_factor": 32.0
    }
