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
from safetensors.torch import load_file, save_file

from mmdit_lib.checkpoint import Checkpoint, convert
from mmdit_lib.checkpoint.keys import from_diffusers
from mmdit_lib.config import ModelConfig
from mmdit_lib.network.plan import cut_dim
from mmdit_lib.tiny.random_pipeline import make_random_pipeline

TINY = {
    "sample_size": 32, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 40,
    "pos_embed_max_size": 12, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
}  # fmt: skip
NO_NORM = TINY | {
    "attention_head_dim": 64,
    "num_attention_heads": 1,
    "caption_projection_dim": 64,
    "dual_attention_layers": (),
    "qk_norm": None,
}


def tiny_model(seed: int = 0, **overrides) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(**TINY | overrides)
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def model() -> SD3Transformer2DModel:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "transformer"
    model.save_pretrained(folder)
    return folder


def quiet(source, output, **options) -> Checkpoint:
    return Checkpoint.open(convert(str(source), str(output), progress=False, **options), verify=True)


def assert_same(weights: dict, reference: SD3Transformer2DModel, dtype: torch.dtype = torch.float32) -> None:
    expected = {from_diffusers(name): tensor.to(dtype) for name, tensor in reference.state_dict().items()}
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].dtype == dtype
        assert torch.equal(weights[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_every_byte_arrives(model, folder, tmp_path):
    checkpoint = quiet(folder, tmp_path / "out")
    assert checkpoint.model == ModelConfig(**TINY) and checkpoint.dtype == "float32"
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
    assert checkpoint.mapping.world_size == 4 and checkpoint.config["mapping"]["world_size"] == 2
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
    # How the source is cut into files leaves no trace in the rank files.
    assert checkpoint.files == quiet(folder, tmp_path / "single").files


def test_single_file_in_diffusers_layout(model, folder, tmp_path):
    name = "diffusion_pytorch_model.safetensors"
    assert_same(quiet(folder / name, tmp_path / "with_config").weights(), model)
    shutil.copy(folder / name, tmp_path / "alone.safetensors")
    assert_same(quiet(tmp_path / "alone.safetensors", tmp_path / "alone").weights(), model)


# The original layout: name in a block, and diffusers' modules whose rows it joins.
STREAMS = {
    "x_block": {
        "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.proj": ("attn.to_out.0",),
        "attn.ln_q": ("attn.norm_q",), "attn.ln_k": ("attn.norm_k",),
        "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.proj": ("attn2.to_out.0",),
        "attn2.ln_q": ("attn2.norm_q",), "attn2.ln_k": ("attn2.norm_k",),
        "adaLN_modulation.1": ("norm1.linear",), "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",),
    },
    "context_block": {
        "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.proj": ("attn.to_add_out",),
        "attn.ln_q": ("attn.norm_added_q",), "attn.ln_k": ("attn.norm_added_k",),
        "adaLN_modulation.1": ("norm1_context.linear",),
        "mlp.fc1": ("ff_context.net.0.proj",), "mlp.fc2": ("ff_context.net.2",),
    },
}  # fmt: skip
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2", "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip


def original_layout(model: SD3Transformer2DModel, prefix: str = "model.diffusion_model.") -> dict[str, torch.Tensor]:
    state, out = model.state_dict(), {}

    def put(name: str, modules: tuple[str, ...], swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            if f"{modules[0]}.{kind}" in state:
                joined = torch.cat([state.pop(f"{m}.{kind}") for m in modules])
                # Stability AI keeps (shift, scale), diffusers (scale, shift).
                out[f"{prefix}{name}.{kind}"] = torch.cat(joined.chunk(2)[::-1]) if swap else joined

    out[f"{prefix}pos_embed"] = state.pop("pos_embed.pos_embed")
    for name, module in OUTSIDE.items():
        put(name, (module,), swap=module == "norm_out.linear")
    for i in range(model.config.num_layers):
        for stream, modules in STREAMS.items():
            for name, parts in modules.items():
                swap = i == model.config.num_layers - 1 and parts == ("norm1_context.linear",)
                put(f"joint_blocks.{i}.{stream}.{name}", tuple(f"transformer_blocks.{i}.{p}" for p in parts), swap)
    assert not state, sorted(state)
    return out


@pytest.mark.parametrize("values", [TINY, NO_NORM], ids=["dual-qk-norm", "plain"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_original_single_file(tmp_path, values, prefix):
    model = tiny_model(**values)
    extra = {"first_stage_model.decoder.conv_in.weight": torch.ones(2, 2)} if prefix else {}
    path = tmp_path / "sd3.5_tiny.safetensors"
    save_file(original_layout(model, prefix) | extra, path)
    checkpoint = quiet(path, tmp_path / "out", tp_size=1)
    assert_same(checkpoint.weights(), model)
    assert checkpoint.model == ModelConfig(**values | {"sample_size": 128})


def test_original_file_is_what_diffusers_loads(model, folder, tmp_path):
    """The file that the test above makes is the published layout: diffusers' own loader takes it."""
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
        dim = cut_dim(name, layout)
        parts = [rank[name] for rank in ranks]
        assert dim is not None or all(torch.equal(parts[0], p) for p in parts)
        whole[name] = parts[0] if dim is None else torch.cat(parts, dim)
    assert_same(whole, model)


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


def test_memory_stays_below_two_of_the_largest_tensor(tmp_path):
    """The checkpoint is more than 20 times its largest tensor; two of those (25 MB) and a little are in memory."""
    code = """
import sys, torch
from mmdit_lib.checkpoint import convert
from mmdit_lib.checkpoint.shapes import expected_shapes
from mmdit_lib.checkpoint.random_weights import write_random_transformer
from mmdit_lib.config import KNOWN_MODELS, ModelConfig
values = KNOWN_MODELS["stable-diffusion-3.5-medium"].model_dump()
small = dict(num_attention_heads=16, caption_projection_dim=1024, num_layers=4, dual_attention_layers=())
small["pos_embed_max_size"] = 64
model = ModelConfig(**values | small)
write_random_transformer(sys.argv[1], model)
warm = ModelConfig(**values | small | dict(num_attention_heads=1, caption_projection_dim=64, num_layers=1))
write_random_transformer(sys.argv[3], warm)
for dtype in ("float16", "bfloat16"):
    convert(sys.argv[3], sys.argv[4], dtype=dtype, progress=False)
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = peak()
convert(sys.argv[1], sys.argv[2], tp_size=2, dtype="bfloat16", progress=False)
largest = 2 * max(torch.Size(s).numel() for s in expected_shapes(model).values())
print(before, peak(), largest)
"""
    folders = [str(tmp_path / name) for name in ("source", "out", "warm", "warm_out")]
    run = subprocess.run([sys.executable, "-c", code, *folders], check=True, capture_output=True, text=True, env={
        "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"})  # fmt: skip
    before, peak, largest = map(int, run.stdout.split())
    total = sum(p.stat().st_size for p in (tmp_path / "source").glob("*.safetensors"))
    assert total > 20 * largest
    assert peak - before < 2 * largest + 60e6, (before, peak, largest)
