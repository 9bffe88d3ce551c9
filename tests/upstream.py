"""What TensorRT-LLM 1.2.1 writes for an SD3 transformer, from its documented contract alone.

Nothing here comes from the library: tables, names and config keys are written out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file


class Row(NamedTuple):
    """A tensor of the contract."""

    shape: tuple[int, ...]
    dim: int | None
    """The dimension that tensor parallelism cuts; None: replicated."""

    def local(self, tp: int) -> tuple[int, ...]:
        return tuple(size // tp if i == self.dim else size for i, size in enumerate(self.shape))


PUBLISHED = {
    # D, layers, dual attention layers, QK norm, position table, tensors in a file of one tp rank
    "stable-diffusion-3-medium": (1536, 24, 0, None, 192, 683),
    "stable-diffusion-3.5-medium": (1536, 24, 13, "rms_norm", 384, 909),
    "stable-diffusion-3.5-large": (2432, 38, 0, "rms_norm", 192, 1227),
}


def published_config(name: str) -> dict[str, Any]:
    """A published model's transformer config, as on the hub."""
    dim, layers, dual, norm, table, _ = PUBLISHED[name]
    return {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": layers,
        "attention_head_dim": 64, "num_attention_heads": dim // 64, "joint_attention_dim": 4096,
        "caption_projection_dim": dim, "pooled_projection_dim": 2048, "pos_embed_max_size": table,
        "dual_attention_layers": list(range(dual)), "qk_norm": norm,
    }  # fmt: skip


def narrow(config: dict[str, Any], heads: int = 4, head_dim: int = 8) -> dict[str, Any]:
    """The same layers, few channels: a model of any published architecture in a megabyte or two."""
    sizes = {"num_attention_heads": heads, "attention_head_dim": head_dim, "caption_projection_dim": heads * head_dim}
    return config | sizes | {"joint_attention_dim": 40, "pooled_projection_dim": 48, "pos_embed_max_size": 12}


def table(config: dict[str, Any]) -> dict[str, Row]:
    """Name -> full shape and cut of every tensor in a checkpoint."""
    rows: dict[str, Row] = {}
    dim, head = config["num_attention_heads"] * config["attention_head_dim"], config["attention_head_dim"]
    patch, layers = config["patch_size"], config["num_layers"]

    def linear(name: str, out: int, into: int, cut: str) -> None:
        weight, bias = {"column": (0, 0), "row": (1, None), "replicated": (None, None)}[cut]
        rows[f"{name}.weight"], rows[f"{name}.bias"] = Row((out, into), weight), Row((out,), bias)

    def attention(name: str, *, text: bool, text_out: bool) -> None:
        projections = ["to_q", "to_k", "to_v"] + ["add_q_proj", "add_k_proj", "add_v_proj"] * text
        for projection in projections:
            linear(f"{name}.{projection}", dim, dim, "column")
        if config["qk_norm"]:
            for norm in ["norm_q", "norm_k"] + ["norm_added_q", "norm_added_k"] * text:
                rows[f"{name}.{norm}.weight"] = Row((head,), None)
        linear(f"{name}.to_out.0", dim, dim, "row")
        if text_out:
            linear(f"{name}.to_add_out", dim, dim, "row")

    rows["pos_embed.pos_embed"] = Row((1, config["pos_embed_max_size"] ** 2, dim), None)
    rows["pos_embed.proj.weight"] = Row((dim, config["in_channels"], patch, patch), None)
    rows["pos_embed.proj.bias"] = Row((dim,), None)
    for embedder, into in (("timestep_embedder", 256), ("text_embedder", config["pooled_projection_dim"])):
        linear(f"time_text_embed.{embedder}.linear_1", dim, into, "column")
        linear(f"time_text_embed.{embedder}.linear_2", dim, dim, "row")
    linear("context_embedder", dim, config["joint_attention_dim"], "column")
    for i in range(layers):
        block, dual, last = f"transformer_blocks.{i}", i in config["dual_attention_layers"], i == layers - 1
        linear(f"{block}.norm1.linear", (9 if dual else 6) * dim, dim, "column")
        linear(f"{block}.norm1_context.linear", (2 if last else 6) * dim, dim, "replicated")
        attention(f"{block}.attn", text=True, text_out=not last)
        if dual:
            attention(f"{block}.attn2", text=False, text_out=False)
        for mlp in ["ff"] + ["ff_context"] * (not last):
            linear(f"{block}.{mlp}.net.0.proj", 4 * dim, dim, "column")
            linear(f"{block}.{mlp}.net.1", dim, 4 * dim, "column")
    linear("norm_out.linear", 2 * dim, dim, "replicated")
    linear("proj_out", patch**2 * config["out_channels"], dim, "column")
    return rows


def config_json(config: dict[str, Any], dtype: str, tp: int, cp: int, model_path: str) -> dict[str, Any]:
    """The whole `config.json`, keys in the contract's order."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    order = (
        "sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim",
        "num_attention_heads", "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim",
        "pos_embed_max_size", "dual_attention_layers", "qk_norm",
    )  # fmt: skip
    return {
        "architecture": "SD3Transformer2DModel", "dtype": dtype, **{key: config[key] for key in order},
        "skip_layers": None, "use_pretrained_pos_emb": True, "model_path": model_path,
        "logits_dtype": "float32", "vocab_size": None, "hidden_size": heads * head,
        "num_hidden_layers": config["num_layers"], "num_key_value_heads": heads, "hidden_act": "gelu",
        "intermediate_size": 4 * heads * head, "norm_epsilon": 1e-5, "position_embedding_type": "learned_absolute",
        "max_position_embeddings": None, "use_parallel_embedding": False, "embedding_sharding_dim": 0,
        "head_size": head, "qk_layernorm": False, "rotary_embedding_dim": head, "runtime_defaults": None,
        "mapping": {
            "world_size": tp * cp, "gpus_per_node": 8, "cp_size": cp, "tp_size": tp, "pp_size": 1, "moe_tp_size": tp,
            "moe_cluster_size": 1, "moe_ep_size": 1, "attn_tp_size": tp * cp, "attn_cp_size": 1, "cp_config": {},
            "enable_attention_dp": False, "enable_lm_head_tp_in_adp": False,
        },
        "quantization": {
            "quant_algo": None, "kv_cache_quant_algo": None, "group_size": 128, "smoothquant_val": 0.5,
            "clamp_val": None, "use_meta_recipe": False, "has_zero_point": False, "pre_quant_scale": False,
            "exclude_modules": None,
        },
    }  # fmt: skip


def contract_name(name: str) -> str:
    """The contract's name of diffusers' tensor: a feed-forward's `net.2` is `net.1`."""
    return name.replace(".net.2.", ".net.1.")


def convert_like_upstream(model, folder: Path, *, dtype: str = "float16", tp: int = 1, cp: int = 1) -> Path:
    """A checkpoint folder of a diffusers transformer as the original converter writes it: a file for every rank."""
    folder.mkdir(parents=True)
    config = dict(model.config)
    rows = table(config)
    state = {contract_name(n): t.to(getattr(torch, dtype)) for n, t in model.state_dict().items()}
    assert state.keys() == rows.keys()
    for rank in range(tp * cp):
        parts = {n: t if rows[n].dim is None else t.chunk(tp, rows[n].dim)[rank % tp] for n, t in state.items()}
        save_file({n: t.contiguous() for n, t in parts.items()}, folder / f"rank{rank}.safetensors")
    content = config_json(config, dtype, tp, cp, "source")
    (folder / "config.json").write_text(json.dumps(content, indent=4))
    return folder
