"""The contents of a checkpoint, against TensorRT-LLM's contract and diffusers' model. Shapes only, no weights."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from mmdit_lib.checkpoint.manifest import checkpoint_config
from mmdit_lib.config import Layout
from mmdit_lib.sd3 import KNOWN_MODELS, SD3
from mmdit_lib.sd3.keys import from_diffusers, to_diffusers
from mmdit_lib.sd3.tensor_parallel import SHARDINGS
from mmdit_lib.sd3.transformer import MMDiT

MEDIUM = KNOWN_MODELS["stable-diffusion-3.5-medium"]


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [
        ("stable-diffusion-3-medium", 683, 2_028_328_000),
        ("stable-diffusion-3.5-medium", 909, 2_243_171_520),
        ("stable-diffusion-3.5-large", 1227, 8_056_627_520),
    ],
)
def test_published_models(name, tensors, parameters):
    config = KNOWN_MODELS[name]
    shapes = SD3.parameters(config)
    assert len(shapes) == tensors
    assert sum(torch.Size(s).numel() for n, s in shapes.items() if n != "pos_embed.pos_embed") == parameters
    with torch.device("meta"):
        reference = SD3Transformer2DModel(**config.to_diffusers()).state_dict()
    assert {to_diffusers(n): tuple(s) for n, s in shapes.items()} == {n: tuple(t.shape) for n, t in reference.items()}
    assert {from_diffusers(n) for n in reference} == shapes.keys()
    assert SD3.infer_config(shapes, None) == config


def test_key_table_is_two_way():
    for name in (
        "transformer_blocks.10.ff.net.2",
        "transformer_blocks.1.ff_context.net.2.bias",
        "pos_embed.proj.weight",
    ):
        assert to_diffusers(from_diffusers(name)) == name
    assert from_diffusers("transformer_blocks.0.ff.net.2.weight") == "transformer_blocks.0.ff.net.1.weight"
    assert to_diffusers("transformer_blocks.7.ff_context.net.1") == "transformer_blocks.7.ff_context.net.2"
    same = [p for p, _ in MMDiT(MEDIUM).named_modules() if not p.endswith(".net.1")]
    assert [to_diffusers(p) for p in same] == same
    with pytest.raises(ValueError, match="dropout"):
        from_diffusers("transformer_blocks.0.ff.net.1.weight")
    with pytest.raises(ValueError, match="number 1 here"):
        to_diffusers("transformer_blocks.0.ff.net.2")


def test_modules_have_diffusers_paths():
    with torch.device("meta"):
        reference = {path for path, _ in SD3Transformer2DModel(**MEDIUM.to_diffusers()).named_modules()}
    ours = {to_diffusers(path) for path, module in MMDiT(MEDIUM).named_modules() if path}
    assert ours <= reference


def upstream_parts(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """The contract's table, row by row, independent of the library's tables."""
    module, kind = name.rsplit(".", 1)
    last = module.split(".")[-1]
    column = last in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "linear_1", "context_embedder")
    column |= last == "proj_out" or ".net." in module or module.endswith(".norm1.linear")
    row = last in ("linear_2", "to_add_out") or module.endswith("to_out.0")
    if column:
        return (shape[0] // tp, *shape[1:])
    return (shape[0], shape[1] // tp) if row and kind == "weight" else shape


def megatron_parts(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """Attention as upstream, the MLP colwise then rowwise, everything else replicated."""
    if ".ff" in name and ".net.1." in name:
        return (shape[0], shape[1] // tp) if name.endswith("weight") else shape
    if ".attn" in name or ".net.0." in name:
        return upstream_parts(name, shape, tp)
    return shape


@pytest.mark.parametrize("layout, parts", [("trtllm", upstream_parts), ("megatron", megatron_parts)])
def test_tensor_parallel_shapes_of_sd35_medium(layout, parts):
    cut = 0
    for name, shape in SD3.parameters(MEDIUM).items():
        assert SHARDINGS[layout].local_shape(name, shape, 2) == parts(name, shape, 2), name
        assert SHARDINGS[layout].local_shape(name, shape, 1) == shape
        cut += parts(name, shape, 2) != shape
    assert cut > 400


def test_config_has_the_keys_of_the_contract_in_its_order():
    config = checkpoint_config(
        SD3, MEDIUM, "float16", Layout(tp_size=2, cp_size=4), "models/sd35", {"format_version": 1}
    )
    assert list(config) == [
        "architecture", "dtype", "sample_size", "patch_size", "in_channels", "out_channels", "num_layers",
        "attention_head_dim", "num_attention_heads", "joint_attention_dim", "caption_projection_dim",
        "pooled_projection_dim", "pos_embed_max_size", "dual_attention_layers", "qk_norm", "skip_layers",
        "use_pretrained_pos_emb", "model_path", "logits_dtype", "vocab_size", "hidden_size", "num_hidden_layers",
        "num_key_value_heads", "hidden_act", "intermediate_size", "norm_epsilon", "position_embedding_type",
        "max_position_embeddings", "use_parallel_embedding", "embedding_sharding_dim", "head_size", "qk_layernorm",
        "rotary_embedding_dim", "runtime_defaults", "mapping", "quantization", "mmdit_lib",
    ]  # fmt: skip
    assert list(config["mapping"]) == [
        "world_size", "gpus_per_node", "cp_size", "tp_size", "pp_size", "moe_tp_size", "moe_cluster_size",
        "moe_ep_size", "attn_tp_size", "attn_cp_size", "cp_config", "enable_attention_dp", "enable_lm_head_tp_in_adp",
    ]  # fmt: skip
    assert list(config["quantization"]) == [
        "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe",
        "has_zero_point", "pre_quant_scale", "exclude_modules",
    ]  # fmt: skip
    assert config["architecture"] == "SD3Transformer2DModel" and config["dtype"] == "float16"
    assert (
        config["mapping"]["world_size"] == 8 and config["hidden_size"] == 1536 and config["intermediate_size"] == 6144
    )
    assert config["dual_attention_layers"] == list(range(13)) and config["pos_embed_max_size"] == 384
