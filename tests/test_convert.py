"""Conversion of good checkpoints: every layout that diffusers and Stability AI publish, read back byte for byte."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from helpers import NO_NORM, TINY, assert_same, original_layout, quiet, tiny_model
from safetensors.torch import load_file, save_file

from mmdit_lib import tiny
from mmdit_lib.checkpoint import Checkpoint
from mmdit_lib.checkpoint.hub import resolve_model
from mmdit_lib.sd3 import SD3Config
from mmdit_lib.sd3.tensor_parallel import SHARDINGS
from training.random_pipeline import make_random_pipeline


@pytest.fixture(scope="module")
def model() -> SD3Transformer2DModel:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "transformer"
    model.save_pretrained(folder)
    return folder


def test_every_byte_arrives(model, folder, tmp_path):
    checkpoint = quiet(folder, tmp_path / "out")
    assert checkpoint.model == SD3Config(**TINY) and checkpoint.dtype == "float32"
    assert_same(checkpoint.weights(0), model)
    assert_same(load_file(tmp_path / "out" / "rank0.safetensors"), model)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_manifest(folder, tmp_path):
    checkpoint = quiet(folder, tmp_path / "out", dtype="float16", cp_size=2, cfg_size=2)
    own = checkpoint.config["mmdit_lib"]
    data = (tmp_path / "out" / "rank0.safetensors").read_bytes()
    assert own["files"] == {"rank0.safetensors": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    assert own["source"] == str(folder) and own["source_dtype"] == "float32" and own["format_version"] == 1
    assert torch.__version__.startswith(own["versions"]["torch"]) and own["revision"] is None
    assert checkpoint.layout.world_size == 4 and checkpoint.config["mapping"]["world_size"] == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "rank0.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(model, folder, tmp_path, dtype):
    checkpoint = quiet(folder, tmp_path / "out", dtype=dtype)
    assert_same(checkpoint.weights(), model, getattr(torch, dtype))
    again = tmp_path / "again"
    tiny_model().to(getattr(torch, dtype)).save_pretrained(again)
    assert quiet(again, tmp_path / "auto").files == checkpoint.files


def test_auto_follows_most_of_a_mixed_source(model, folder, tmp_path):
    mixed = Path(shutil.copytree(folder, tmp_path / "mixed"))
    name = mixed / "diffusion_pytorch_model.safetensors"
    tensors = {n: t.to(torch.bfloat16 if t.ndim > 1 else torch.float32) for n, t in load_file(name).items()}
    save_file(tensors, name)
    checkpoint = quiet(mixed, tmp_path / "out")
    assert checkpoint.dtype == "bfloat16"
    assert_same(checkpoint.weights(), model, torch.bfloat16)


def test_pipeline_folder_with_its_vae(tmp_path):
    pipeline = make_random_pipeline(tmp_path / "pipeline", dtype="bfloat16")
    checkpoint = quiet(pipeline, tmp_path / "out")
    blocks = json.loads((pipeline / "vae" / "config.json").read_text())["block_out_channels"]
    assert checkpoint.vae_scale_factor == 2 ** (len(blocks) - 1)
    assert checkpoint.dtype == "bfloat16"
    assert_same(checkpoint.weights(), SD3Transformer2DModel.from_pretrained(pipeline / "transformer"), torch.bfloat16)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants_are_not_mixed(model, folder, tmp_path, variant):
    source = tmp_path / "both" / "transformer"
    tiny_model(seed=1).save_pretrained(source, variant=None if variant else "fp16")
    model.save_pretrained(source, variant=variant, max_shard_size="50KB")
    assert len(list(source.glob("*-of-*"))) > 2
    checkpoint = quiet(source.parent, tmp_path / "out", variant=variant)
    assert_same(checkpoint.weights(), model)
    # How the source is split into files does not affect the rank files.
    assert checkpoint.files == quiet(folder, tmp_path / "single").files


def test_single_file_in_diffusers_layout(model, folder, tmp_path):
    name = "diffusion_pytorch_model.safetensors"
    assert_same(quiet(folder / name, tmp_path / "with_config").weights(), model)
    shutil.copy(folder / name, tmp_path / "alone.safetensors")
    assert_same(quiet(tmp_path / "alone.safetensors", tmp_path / "alone").weights(), model)


@pytest.mark.parametrize("values", [TINY, NO_NORM], ids=["dual-qk-norm", "plain"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_original_single_file(tmp_path, values, prefix):
    model = tiny_model(**values)
    extra = {"first_stage_model.decoder.conv_in.weight": torch.ones(2, 2)} if prefix else {}
    path = tmp_path / "sd3.5_tiny.safetensors"
    save_file(original_layout(model, prefix) | extra, path)
    checkpoint = quiet(path, tmp_path / "out", tp_size=1)
    assert_same(checkpoint.weights(), model)
    assert checkpoint.model == SD3Config(**values | {"sample_size": 128})


def test_original_file_is_what_diffusers_loads(model, folder, tmp_path):
    """The file written by the test above has the published layout: diffusers' loader accepts it."""
    path = tmp_path / "sd3.5_tiny.safetensors"
    save_file(original_layout(model), path)
    loaded = SD3Transformer2DModel.from_single_file(path, config=str(folder), local_files_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("layout", ["megatron", "trtllm"])
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_side_by_side_are_the_whole(model, folder, tmp_path, layout, tp):
    checkpoint = quiet(folder, tmp_path / "out", tp_size=tp, tp_layout=layout, cp_size=2)
    assert sorted(checkpoint.files) == [f"rank{r}.safetensors" for r in range(tp)]
    ranks = [checkpoint.weights(r) for r in range(tp)]
    whole = {}
    for name in ranks[0]:
        dim = SHARDINGS[layout].shard_dim(name)
        parts = [rank[name] for rank in ranks]
        assert dim is not None or all(torch.equal(parts[0], p) for p in parts)
        whole[name] = parts[0] if dim is None else torch.cat(parts, dim)
    assert_same(whole, model)


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny") == str(tiny.model_path())
    assert resolve_model("~/tiny") == "~/tiny" and resolve_model("owner/name") == "owner/name"
    (tmp_path / "tiny").mkdir()
    assert resolve_model("~/tiny") == str(tmp_path / "tiny") and resolve_model(Path("tiny")) == "tiny"
    assert resolve_model("~nobody-of-this-name/tiny") == "~nobody-of-this-name/tiny"


@pytest.mark.slow
def test_hub_id_from_the_local_cache(model, folder, tmp_path):
    """As after an earlier download: the cache's layout on disk, no network."""
    repository = tmp_path / "hub" / "models--someone--sd3-tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / commit / "transformer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = "import sys; from mmdit_lib.checkpoint import convert; convert(sys.argv[1], sys.argv[2], progress=False)"
    command = [sys.executable, "-c", code, "someone/sd3-tiny", tmp_path / "out"]
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(command, check=True, env=environment)
    checkpoint = Checkpoint.open(tmp_path / "out", verify=True)
    assert_same(checkpoint.weights(), model)
    assert checkpoint.config["mmdit_lib"]["revision"] == commit


def test_only_the_transformer_is_fetched(folder, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(repository, *, revision, allow_patterns):
        calls.append((repository, revision, allow_patterns))
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    quiet("someone/sd3-tiny", tmp_path / "out", revision="v1")
    (repository, revision, configs), (again, same, weights) = calls
    assert repository == again == "someone/sd3-tiny" and revision == same == "v1"
    published = [
        "transformer/config.json",
        "vae/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    ]
    others = [
        "sd3.5_medium.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
    ]
    fetched = huggingface_hub.utils.filter_repo_objects(published + others, allow_patterns=configs + weights)
    assert list(fetched) == published


@pytest.mark.slow
def test_memory_stays_below_two_of_the_largest_tensor(tmp_path):
    """The checkpoint is more than 20 times its largest tensor; memory grows by about two of those (25 MB)."""
    code = """
import sys, torch
from mmdit_lib.checkpoint import convert, export
from mmdit_lib.checkpoint.random_weights import write_random_transformer
from mmdit_lib.sd3 import KNOWN_MODELS, SD3, SD3Config
values = KNOWN_MODELS["stable-diffusion-3.5-medium"].model_dump()
small = dict(num_attention_heads=16, caption_projection_dim=1024, num_layers=4, dual_attention_layers=())
small["pos_embed_max_size"] = 64
model = SD3Config(**values | small)
write_random_transformer(sys.argv[1], model)
warm = SD3Config(**values | small | dict(num_attention_heads=1, caption_projection_dim=64, num_layers=1))
write_random_transformer(sys.argv[3], warm)
for dtype in ("float16", "bfloat16"):
    convert(sys.argv[3], sys.argv[4], dtype=dtype, progress=False)
    export(sys.argv[4], sys.argv[5], progress=False)
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
def growth(work, *arguments, **options):
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    before = peak()
    work(*arguments, **options, progress=False)
    return peak() - before
print(growth(convert, sys.argv[1], sys.argv[2], tp_size=2, dtype="bfloat16"), growth(export, sys.argv[2], sys.argv[6]))
print(2 * max(torch.Size(s).numel() for s in SD3.parameters(model).values()))
"""
    folders = [str(tmp_path / name) for name in ("source", "out", "warm", "warm_out", "warm_back", "back")]
    run = subprocess.run([sys.executable, "-c", code, *folders], check=True, capture_output=True, text=True, env={
        "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"})  # fmt: skip
    *growth, largest = map(int, run.stdout.split())
    total = sum(p.stat().st_size for p in (tmp_path / "source").glob("*.safetensors"))
    assert total > 20 * largest
    assert max(growth) < 2 * largest + 60e6, (growth, largest)
