"""Reading checkpoint folders: ours, TensorRT-LLM's, and damaged ones."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY, assert_same, quiet, tiny_model
from safetensors.torch import load_file

from mmdit_lib.checkpoint import Checkpoint, random_weights
from mmdit_lib.checkpoint.random_weights import write_random_transformer
from mmdit_lib.config import Layout
from mmdit_lib.sd3 import SD3Config
from mmdit_lib.sd3.tensor_parallel import SHARDINGS


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("made")
    tiny_model().save_pretrained(place / "source")
    quiet(place / "source", place / "one")
    quiet(place / "source", place / "two", tp_size=2, cp_size=2, tp_layout="trtllm")
    return {name: place / name for name in ("one", "two")}


@pytest.fixture
def one(made, tmp_path) -> Path:
    return Path(shutil.copytree(made["one"], tmp_path / "one"))


@pytest.fixture
def upstream(made, tmp_path) -> Path:
    """Two tp ranks without our key, as TensorRT-LLM writes them."""
    folder = Path(shutil.copytree(made["two"], tmp_path / "two"))
    edit_config(folder, lambda config: config.pop("mmdit_lib"))
    return folder


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, *words: str, **options) -> None:
    with pytest.raises(ValueError) as error:
        Checkpoint.open(folder, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_weights_are_mapped_not_copied(tmp_path):
    folder = tmp_path / "big"
    folder.mkdir()
    wide = SD3Config(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=64,
        num_attention_heads=8, joint_attention_dim=512, caption_projection_dim=512, pooled_projection_dim=64,
        pos_embed_max_size=384, dual_attention_layers=(), qk_norm=None,
    )  # fmt: skip
    write_random_transformer(tmp_path / "source", wide)
    checkpoint = quiet(tmp_path / "source", tmp_path / "out")
    before = resident()
    weights = checkpoint.weights()
    total = sum(t.nbytes for t in weights.values())
    assert total > 150e6 and resident() - before < 20e6
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "rank0.safetensors" in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for name, tensor in weights.items():
        assert any(first <= tensor.data_ptr() < last for first, last in ranges), name


def test_upstream_checkpoint(made, upstream):
    checkpoint = Checkpoint.open(upstream, verify=True)
    assert checkpoint.layout == Layout(tp_size=2, cp_size=2, tp_layout="trtllm")
    assert checkpoint.files == {} and checkpoint.vae_scale_factor == 8
    ranks = [checkpoint.weights(r) for r in range(2)]
    dims = {name: SHARDINGS["trtllm"].shard_dim(name) for name in ranks[0]}
    assert_same(
        {n: ranks[0][n] if d is None else torch.cat([r[n] for r in ranks], d) for n, d in dims.items()}, tiny_model()
    )
    for rank in (2, 3):  # upstream writes a file for each cp rank too
        shutil.copy(upstream / f"rank{rank - 2}.safetensors", upstream / f"rank{rank}.safetensors")
    assert Checkpoint.open(upstream).weights(1).keys() == ranks[1].keys()
    with pytest.raises(ValueError, match="tp rank 2 does not exist"):
        checkpoint.weights(2)


def test_unknown_keys_are_kept_with_a_warning(upstream):
    edit_config(upstream, lambda config: config.update(producer="someone"))
    with pytest.warns(UserWarning, match="producer"):
        assert Checkpoint.open(upstream).config["producer"] == "someone"


def test_megatron_and_upstream_files_are_not_confused(made, tmp_path):
    quiet(made["one"].parent / "source", tmp_path / "out", tp_size=2)
    edit_config(tmp_path / "out", lambda config: config.pop("mmdit_lib"))
    refused(tmp_path / "out", "wrongly shaped tensor", "expected")


def test_changed_bytes(one):
    path = one / "rank0.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    Checkpoint.open(one)
    refused(one, "rank0.safetensors has changed", "sha256", verify=True)
    path.write_bytes(data[:-4])
    refused(one, "rank0.safetensors has changed", f"expected {len(data)} bytes, found {len(data) - 4}")
    path.unlink()
    refused(one, "rank0.safetensors is missing")


def test_truncated_without_a_manifest(upstream):
    path = upstream / "rank1.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(upstream, "rank1.safetensors", "truncated")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.pop("architecture"), "architecture"),
        (lambda c: c.update(architecture="LlamaForCausalLM"), "LlamaForCausalLM"),
        (lambda c: c.pop("num_layers"), "num_layers"),
        (lambda c: c.update(num_layers=4), "missing tensor 'transformer_blocks.2."),
        (lambda c: c.update(dtype="float16"), "is F32, its config says float16"),
        (lambda c: c["quantization"].update(quant_algo="FP8"), "weights_scaling_factor' [1] (and"),
        (lambda c: c["quantization"].update(quant_algo="W4A16"), "quant_algo W4A16"),
        (lambda c: c["mapping"].update(tp_size=2), "rank"),
        (lambda c: c["mapping"].update(tp_size=3), "4 heads are not divisible by tp_size=3"),
        (lambda c: c["mmdit_lib"].update(format_version=4), "format 4"),
        (lambda c: c["mmdit_lib"].update(tp_layout="rows"), "tp_layout: Input should be 'megatron' or 'trtllm'"),
        (lambda c: c.update(mapping=None), "not the config of a checkpoint"),
        (lambda c: c.update(pretrained_config={}), "is an engine folder, not a checkpoint"),
    ],
)
def test_config_that_does_not_fit(one, change, words):
    edit_config(one, change)
    refused(one, words)


def test_unreadable(one, tmp_path):
    refused(tmp_path / "absent", "not a checkpoint folder")
    (one / "config.json").write_text("{")
    refused(one, "config.json cannot be read as JSON")
    (one / "config.json").write_text("[]")
    refused(one, "JSON object")


def test_random_weights_appear_when_complete(tmp_path, monkeypatch):
    model, folder = SD3Config(**TINY), tmp_path / "transformer"
    write_random_transformer(folder, model)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(*_):
        raise ValueError("out of luck")

    monkeypatch.setattr(random_weights, "draw_weight", fails)
    for output in (folder, tmp_path / "new"):
        with pytest.raises(ValueError, match="out of luck"):
            write_random_transformer(output, model, seed=1)
    assert os.listdir(tmp_path) == ["transformer"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="contains something other than a transformer folder"):
        write_random_transformer(tmp_path, model)


def test_random_weights(tmp_path):
    model = SD3Config(**TINY)
    write_random_transformer(tmp_path / "a", model, "bfloat16", shard_bytes=60_000)
    assert len(list((tmp_path / "a").glob("*-of-*"))) > 2
    write_random_transformer(tmp_path / "b", model, "bfloat16")
    assert quiet(tmp_path / "a", tmp_path / "out_a").files == quiet(tmp_path / "b", tmp_path / "out_b").files
    write_random_transformer(tmp_path / "c", model, "bfloat16", seed=1)
    b, c = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in "bc")
    assert all(not torch.equal(b[name], c[name]) for name in b)
    matrices = [t.float() for name, t in b.items() if t.ndim == 2]
    assert all(0.5 < m.std() * m.shape[1] ** 0.5 < 1.5 for m in matrices)
    assert len({t.float().sum().item() for t in matrices}) == len(matrices)
