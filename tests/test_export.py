"""`export`: a checkpoint folder becomes the diffusers transformer that it was converted from, byte for byte."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from helpers import NO_NORM, TINY, diffusers_output, quiet, tiny_model
from safetensors.torch import load_file, save_file
from upstream import convert_like_upstream

from mmdit_lib import export
from mmdit_lib.checkpoint import diffusers_folder
from mmdit_lib.sd3 import SD3, SD3Config

WEIGHTS = "diffusion_pytorch_model.safetensors"
DTYPES = ("float32", "float16", "bfloat16")


def saved(folder: Path, dtype: str = "float32", **values) -> Path:
    """A random transformer as diffusers saves it. Some values are the smallest that the dtype has, or -0."""
    model = tiny_model(**values).to(getattr(torch, dtype))
    smallest = torch.finfo(model.dtype).smallest_normal / 4
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.view(-1)[::7] = -smallest
            tensor.view(-1)[::11] = -0.0
    model.save_pretrained(folder)
    return folder


def config_of(folder: Path) -> dict:
    """diffusers' config; private keys are bookkeeping."""
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if not key.startswith("_")}


def same_folder(found: Path, expected: Path) -> None:
    """The same files with the same bytes, and the same config."""
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())
    for path in expected.glob("diffusion_pytorch_model*"):
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name
    assert config_of(found) == config_of(expected)
    assert json.loads((found / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"


@pytest.fixture(scope="module", params=DTYPES)
def source(request, tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("source") / request.param, request.param)


@pytest.mark.parametrize("layout", ["megatron", "trtllm"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_way_back(source, tmp_path, tp, layout):
    quiet(source, tmp_path / "checkpoint", tp_size=tp, tp_layout=layout, cp_size=2, cfg_size=2)
    same_folder(export(tmp_path / "checkpoint", tmp_path / "back", progress=False), source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "checkpoint"]


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_the_way_back_from_tensorrt_llm(source, tmp_path, tp, cp):
    """A stand-in for the original converter wrote the folder; nothing in it comes from this library."""
    dtype = source.name
    model = SD3Transformer2DModel.from_pretrained(source, torch_dtype=getattr(torch, dtype))
    folder = convert_like_upstream(model, tmp_path / "checkpoint", dtype=dtype, tp=tp, cp=cp)
    same_folder(export(folder, tmp_path / "back", progress=False), source)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cast_checkpoint_comes_back_in_its_dtype(tmp_path, dtype):
    model = tiny_model()
    model.save_pretrained(tmp_path / "source")
    quiet(tmp_path / "source", tmp_path / "checkpoint", dtype=dtype, tp_size=2)
    export(tmp_path / "checkpoint", tmp_path / "back", progress=False)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "cast")
    same_folder(tmp_path / "back", tmp_path / "cast")


TWO_HEADS = NO_NORM | {"num_attention_heads": 2, "caption_projection_dim": 128}


@pytest.mark.parametrize("values", [TINY, TWO_HEADS], ids=["dual-qk-norm", "plain"])
def test_diffusers_loads_it_and_computes_the_same(tmp_path, values):
    model = tiny_model(**values)
    model.save_pretrained(tmp_path / "source")
    quiet(tmp_path / "source", tmp_path / "checkpoint", tp_size=2, tp_layout="trtllm")
    export(tmp_path / "checkpoint", tmp_path / "back", progress=False)
    loaded, report = SD3Transformer2DModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == torch.float32 and SD3Config.from_diffusers(loaded.config) == SD3Config(**TINY | values)
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (2, 16, 8, 12), "encoder_hidden_states": (2, 7, model.config.joint_attention_dim)}
    shapes |= {"pooled_projections": (2, model.config.pooled_projection_dim), "timestep": (2,)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    assert torch.equal(diffusers_output(loaded.eval(), inputs), diffusers_output(model, inputs))


def test_large_models_are_sharded_as_diffusers_does(tmp_path, monkeypatch):
    monkeypatch.setattr("mmdit_lib.checkpoint.exporting.SHARD_BYTES", 50_000)
    tiny_model().save_pretrained(tmp_path / "source", max_shard_size="50KB")
    quiet(tmp_path / "source", tmp_path / "checkpoint", tp_size=2)
    export(tmp_path / "checkpoint", tmp_path / "back", progress=False)
    assert len(list((tmp_path / "back").glob("*-of-*"))) > 2
    same_folder(tmp_path / "back", tmp_path / "source")


def test_a_config_older_than_sd35_gains_its_defaults(tmp_path):
    """SD3-medium's config on the hub lacks the two fields that SD3.5 introduced; diffusers reads both the same."""
    source = saved(tmp_path / "source", **NO_NORM)
    config = json.loads((source / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("dual_attention_layers", "qk_norm")} | {"out_channels": None}
    (source / "config.json").write_text(json.dumps(kept))
    quiet(source, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "back", progress=False)
    assert config_of(tmp_path / "back") == {k: v for k, v in config.items() if k[0] != "_"} | {"out_channels": 16}


def test_an_older_export_is_replaced_and_nothing_else(tmp_path):
    source = saved(tmp_path / "source")
    for name, seed in (("first", 0), ("second", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / f"source {name}")
        quiet(tmp_path / f"source {name}", tmp_path / name)
        export(tmp_path / name, tmp_path / "back", progress=False)
        same_folder(tmp_path / "back", tmp_path / f"source {name}")
    before = (source / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="contains something other than an exported transformer"):
        export(tmp_path / "first", source, progress=False)
    assert (source / WEIGHTS).read_bytes() == before


def refused(checkpoint: Path, *words: str) -> None:
    """`export` raises one line and leaves nothing behind."""
    beside = sorted(os.listdir(checkpoint.parent))
    with pytest.raises(ValueError) as error:
        export(checkpoint, checkpoint.parent / "back", progress=False)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
    assert sorted(os.listdir(checkpoint.parent)) == beside


@pytest.fixture
def upstream(tmp_path) -> Path:
    return convert_like_upstream(tiny_model(), tmp_path / "checkpoint", tp=2)


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_what_cannot_be_exported(upstream, tmp_path):
    rank1 = upstream / "rank1.safetensors"
    whole = rank1.read_bytes()
    tensors = load_file(rank1)
    tensors["norm_out.linear.bias"] = tensors["norm_out.linear.bias"] + 1
    save_file(tensors, rank1)
    refused(
        upstream, "rank1.safetensors: tensor 'norm_out.linear.bias' differs from the copy in rank0", "trtllm layout"
    )
    rank1.write_bytes(whole[:-2])
    refused(upstream, "rank1.safetensors", "truncated")
    rank1.unlink()
    refused(upstream, "rank1.safetensors is missing")
    edit(upstream, lambda config: config["quantization"].update(quant_algo="W4A16"))
    refused(upstream, "quantization")
    edit(upstream, lambda config: config.update(pretrained_config={}))
    refused(upstream, "is an engine folder, not a checkpoint")
    refused(tmp_path / "nowhere", "not a checkpoint folder")


def test_changed_bytes_are_found_before_anything_is_written(tmp_path):
    quiet(saved(tmp_path / "source"), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "rank0.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    refused(tmp_path / "checkpoint", "rank0.safetensors has changed", "sha256")


def test_a_full_disk_leaves_nothing(upstream, monkeypatch):
    free = shutil.disk_usage(upstream)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    refused(upstream, "disk full", "1000 are free")


def test_names_of_every_published_model_come_back(tmp_path):
    for name, model in SD3.known_models.items():
        (tmp_path / name).mkdir()
        files = diffusers_folder.describe_folder(tmp_path / name, SD3, model, "float16", diffusers_folder.SHARD_BYTES)
        with torch.device("meta"):
            expected = SD3Transformer2DModel(**model.to_diffusers()).state_dict()
        found = {n: stored for tensors in files.values() for n, stored in tensors.items()}
        assert list(found) == list(expected)  # order decides which tensor is in which file
        assert all(found[n].shape == tuple(t.shape) for n, t in expected.items())
        index = tmp_path / name / f"{WEIGHTS}.index.json"
        assert (len(files) == 2) == index.is_file() == ("large" in name)
        assert all(re.fullmatch(r"diffusion_pytorch_model(-0000\d-of-00002)?\.safetensors", file) for file in files)
