"""Invalid input: a one-line message that names the fault, and no output left behind."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import original_layout, quiet, tiny_model
from safetensors.torch import load_file, save_file

from mmdit_lib.checkpoint import Checkpoint, convert
from mmdit_lib.checkpoint.tensor_file import TensorFileWriter
from mmdit_lib.files import atomic

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "transformer"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def source(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "source"))


def refused(source, *words: str, output: Path | None = None, **options) -> None:
    """Converting must raise one line with all `words`, and leave the output folder as it was."""
    output = output or Path(source).parent / "place" / "out"
    before = sorted(output.parent.iterdir()) if output.parent.exists() else []
    with pytest.raises(ValueError) as error:
        convert(str(source), str(output), progress=False, **options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert (sorted(output.parent.iterdir()) if output.parent.exists() else []) == before


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("left", [1000, 100])
def test_truncated(source, left):
    path = source / WEIGHTS
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - left)
    refused(source, WEIGHTS, "truncated", str(size), str(size - left))
    with open(path, "r+b") as file:
        file.truncate(left)  # inside the header
    refused(source, WEIGHTS, "truncated", f"found {left}")


def test_not_safetensors(source):
    path = source / WEIGHTS
    with open(path, "wb") as file:
        pickle.dump({"weight": 1}, file)
    refused(source, WEIGHTS, "is not a safetensors file")
    data = b"not json" * 4
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    refused(source, WEIGHTS, "does not parse")


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def test_pickles_are_not_opened(source):
    (source / WEIGHTS).unlink()
    path = source / "diffusion_pytorch_model.bin"
    torch.save({"weight": Bomb()}, path)
    refused(source, path.name, "pickle", "safetensors")
    for name in ("sd3.ckpt", "sd3.pt"):
        shutil.copy(path, source / name)
        refused(source / name, name, "pickle")
    (source / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"proj_out.weight": path.name}}))
    refused(source, path.name, "pickle")


def test_missing_tensor(source):
    edit(source, lambda t: t.pop("transformer_blocks.1.ff.net.2.weight"))
    refused(source, "missing tensor 'transformer_blocks.1.ff.net.2.weight'", "[32, 128]")


def test_renamed_tensor(source):
    query = "transformer_blocks.1.attn.to_q.weight"
    edit(source, lambda t: t.update({query.replace("to_q", "to_query"): t.pop(query)}))
    refused(source, f"missing tensor '{query}'", "attn.to_query.weight is a name that the model's key table", "keys.py")


def test_unknown_tensor(source):
    edit(source, lambda t: t.update({"transformer_blocks.1.attn.to_z.weight": torch.ones(2, 3)}))
    refused(source, "unknown tensor 'transformer_blocks.1.attn.to_z.weight'", "[2, 3]")


def test_dropout_has_no_weights(source):
    edit(
        source,
        lambda t: t.update({"transformer_blocks.1.ff.net.1.weight": t.pop("transformer_blocks.1.ff.net.2.weight")}),
    )
    refused(source, "unknown", "'transformer_blocks.1.ff.net.1.weight'")


def test_wrong_shape(source):
    edit(source, lambda t: t.update({"transformer_blocks.1.attn.to_k.bias": torch.ones(31)}))
    refused(source, "wrongly shaped tensor 'transformer_blocks.1.attn.to_k.bias' [31]", "expected [32]")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"num_layers": 4}, "num_layers 4, its weights say 3"),
        ({"qk_norm": None}, "qk_norm None, its weights say rms_norm"),
        ({"dual_attention_layers": [0]}, "dual_attention_layers (0,), its weights say (0, 1)"),
        ({"joint_attention_dim": 48}, "joint_attention_dim 48, its weights say 24"),
        ({"pos_embed_max_size": 13}, "pos_embed_max_size 13, its weights say 12"),
        ({"num_attention_heads": 2, "caption_projection_dim": 16}, "num_attention_heads 2, its weights say 4"),
        ({"caption_projection_dim": 48}, "caption_projection_dim 48 must equal"),
        ({"num_heads": 4}, "num_heads"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
    ],
)
def test_config_against_weights(source, values, words):
    edit_config(source, **values)
    refused(source, words)


def test_float16_overflow(source):
    edit(source, lambda t: t["transformer_blocks.2.attn.to_v.weight"][3].fill_(7e4))
    refused(
        source, "'transformer_blocks.2.attn.to_v.weight' reaches 70000", "float16", "65504", "bfloat16", dtype="float16"
    )
    quiet(source, source.parent / "wide", dtype="bfloat16")
    edit(source, lambda t: t["transformer_blocks.2.attn.to_v.weight"][3].fill_(float("nan")))
    refused(source, "'transformer_blocks.2.attn.to_v.weight' contains values that are not finite", dtype="bfloat16")


def test_unconvertible_dtype(source):
    edit(source, lambda t: t.update({"proj_out.weight": t["proj_out.weight"].to(torch.float8_e4m3fn)}))
    refused(source, "'proj_out.weight' is F8_E4M3", "float32, float16, bfloat16")


def test_shards(good, tmp_path):
    source = tmp_path / "sharded"
    tiny_model().save_pretrained(source, max_shard_size="50KB")
    shard = sorted(source.glob("*-of-*"))[1]
    shutil.copy(sorted(source.glob("*-of-*"))[0], tmp_path / "first")
    shard.rename(tmp_path / "kept")
    refused(source, shard.name, "does not exist")
    shutil.copy(tmp_path / "first", shard)
    refused(source, "is in both", shard.name)


def test_variants_are_named(source):
    refused(source, "diffusion_pytorch_model.fp16.safetensors", "variants found: none", variant="fp16")
    (source / WEIGHTS).rename(source / "diffusion_pytorch_model.fp16.safetensors")
    refused(source, "variants found: fp16")


def test_places_that_hold_no_model(source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither a pipeline folder")
    refused(tmp_path / "absent" / "really" / "not", "does not exist")
    refused(source, "revision", revision="main")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no route\nto host"))
    )
    refused("someone/sd3", "someone/sd3", "cannot be downloaded", "no route", output=tmp_path / "place" / "out")


def test_refused_before_the_weights_are_fetched(good, tmp_path, monkeypatch):
    """Only a hub id's config is downloaded if tp_size is invalid, and nothing if the output folder is."""
    hub, fetched = tmp_path / "hub" / "commit", []
    (hub / "transformer").mkdir(parents=True)
    shutil.copy(good / "config.json", hub / "transformer")

    def snapshot_download(repository, *, revision, allow_patterns):
        fetched.extend(allow_patterns)
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    place = tmp_path / "place" / "out"
    refused("someone/sd3", "4 heads are not divisible by tp_size=3; use 1, 2 or 4", output=place, tp_size=3)
    assert fetched and not any("safetensors" in pattern for pattern in fetched)
    fetched.clear()
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("years of work")
    refused("someone/sd3", "contains something other than a checkpoint", output=place)
    assert fetched == []


def test_original_layout(tmp_path):
    path = tmp_path / "sd3.safetensors"
    tensors = original_layout(tiny_model())
    name = "model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    refused(path, str(path), "missing tensor 'joint_blocks.1.x_block.mlp.fc1.weight'")
    save_file(tensors | {"model.diffusion_model.control.weight": torch.ones(1)}, path)
    refused(path, "unknown tensor 'control.weight'")
    save_file(tensors | {name: torch.ones(5, 32)}, path)
    refused(path, "wrongly shaped tensor 'transformer_blocks.1.ff.net.0.proj.weight' [5, 32]")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tp_size": 3}, "4 heads are not divisible by tp_size=3; use 1, 2 or 4"),
        ({"tp_size": 0}, "tp_size"),
        ({"cfg_size": 3}, "cfg_size"),
        ({"dtype": "int8"}, "dtype int8"),
        ({"tp_layout": "rows"}, "tp_layout: Input should be 'megatron' or 'trtllm'"),
    ],
)
def test_options(source, options, words):
    refused(source, words, **options)


def test_nothing_foreign_is_overwritten(source, tmp_path):
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True)
    (place / "out" / "thesis.txt").write_text("years of work")
    refused(source, "contains something other than a checkpoint")
    (place / "file").write_text("")
    refused(source, "is a file", output=place / "file")
    (place / "out" / "thesis.txt").unlink()
    quiet(source, place / "out")  # empty folders are allowed
    (place / "out" / "thesis.txt").write_text("years of work")
    refused(source, "contains something other than a checkpoint")


def test_a_checkpoint_is_known_by_its_config(source, tmp_path):
    """A folder is not replaced merely because it has two files with the right names."""
    output = tmp_path / "place" / "out"
    output.mkdir(parents=True)
    (output / "rank0.safetensors").write_text("another program's")
    for text in ('{"model": "mine"}', "[]", "{"):
        (output / "config.json").write_text(text)
        refused(source, "contains something other than a checkpoint", output=output)
    assert (output / "rank0.safetensors").read_text() == "another program's"


def test_places_where_no_folder_can_be_made(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(ValueError) as error:
            convert(str(source), str(output), progress=False)
        assert str(error.value) == f"{tmp_path / 'file'} exists and is a file; give the name of a folder"
    # Root may write anywhere, so act as another user.
    monkeypatch.setattr(atomic.os, "access", lambda path, mode: Path(path) != tmp_path)
    refused(source, f"no permission to write in {tmp_path}", output=tmp_path / "place" / "out")
    assert not (tmp_path / "place").exists()


def test_a_mount_point_is_refused_at_once(source, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    monkeypatch.setattr(TensorFileWriter, "write", None)  # no work is done
    (tmp_path / "disk").mkdir()
    refused(source, "disk is a mount point", "give a folder inside it", output=tmp_path / "disk")


def test_an_older_checkpoint_is_replaced_when_the_new_one_is_complete(source, tmp_path):
    output = tmp_path / "place" / "out"
    old = quiet(source, output, tp_size=2)
    edit(source, lambda t: t["proj_out.weight"].fill_(1e6))
    refused(source, "reaches 1e+06", dtype="float16")
    assert Checkpoint.open(output, verify=True).files == old.files
    assert list(quiet(source, output).files) == ["rank0.safetensors"]
    assert os.listdir(output.parent) == ["out"]


def test_full_disk(good, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs privileges")
    try:
        refused(good, "disk full", "are needed", "are free", output=disk / "out")
        # Detected only while writing, as when another process fills the disk:
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
        refused(good, "disk full", "no room for out", output=disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


KILLED = """
import os, signal, sys
from mmdit_lib.checkpoint import convert
from mmdit_lib.files import atomic
from mmdit_lib.checkpoint.tensor_file import TensorFileWriter

write, rename, count = TensorFileWriter.write, os.rename, 0
def slow_write(self, name, tensor):
    global count
    count += 1
    if sys.argv[3] == "writing" and count == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, tensor)
def last_rename(source, target):
    if sys.argv[3] == "renaming" and str(source).endswith(".partial"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
TensorFileWriter.write, os.rename = slow_write, last_rename
convert(sys.argv[1], sys.argv[2], progress=False)
"""


def killed(source: Path, output: Path, where: str) -> None:
    command = [sys.executable, "-c", KILLED, source, output, where]
    run = subprocess.run(command, env={"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


@pytest.mark.slow
def test_kill_9(source, tmp_path):
    output = tmp_path / "place" / "out"
    killed(source, output, "writing")
    partial = output.parent / ".out.partial"
    assert sorted(os.listdir(output.parent)) == [".out.lock", ".out.partial"]
    with pytest.raises(ValueError, match=r"config\.json"):
        Checkpoint.open(partial)
    first = quiet(source, output)
    assert os.listdir(output.parent) == ["out"]  # the dead process's files are gone too

    edit(source, lambda t: t["proj_out.weight"].fill_(1.0))
    killed(source, output, "writing")
    assert Checkpoint.open(output, verify=True).files == first.files
    killed(source, output, "renaming")  # between the two renames, after the older checkpoint was moved aside
    assert not output.exists()
    edit(source, lambda t: t["proj_out.weight"].fill_(1e6))
    with pytest.raises(ValueError, match=r"reaches 1e\+06"):
        convert(str(source), str(output), dtype="float16", progress=False)
    assert Checkpoint.open(output, verify=True).files == first.files  # and the next run restores it
    second = quiet(source, output)
    assert second.files != first.files and os.listdir(output.parent) == ["out"]


def test_interrupt(source, tmp_path, monkeypatch):
    def interrupted(self, name, tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr(TensorFileWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), str(tmp_path / "place" / "out"), progress=False)
    assert os.listdir(tmp_path / "place") == []


def test_interrupt_between_the_renames(source, tmp_path, monkeypatch):
    output = tmp_path / "place" / "out"
    old = quiet(source, output)
    rename = os.rename

    def interrupted(first, second):
        if str(first).endswith(".partial"):
            raise KeyboardInterrupt
        rename(first, second)

    monkeypatch.setattr(atomic.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), str(output), tp_size=2, progress=False)
    assert os.listdir(output.parent) == ["out"]
    assert Checkpoint.open(output, verify=True).files == old.files
