"""`config.json` of a checkpoint folder: TensorRT-LLM's keys in its order, then one key of our own."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from ..config import ARCHITECTURE, Mapping, ModelConfig
from .source import read_json

CONFIG_FILE = "config.json"
OWN_KEY = "mmdit_lib"
FORMAT_VERSION = 1
PACKAGES = ("mmdit_lib", "torch", "diffusers", "safetensors")


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def checkpoint_config(model: ModelConfig, dtype: str, mapping: Mapping, model_path: str, own: dict[str, Any]) -> dict:
    """The contents of `config.json`; `own` goes under the key of our own."""
    return {
        "architecture": ARCHITECTURE,
        "dtype": dtype,
        **model.model_dump(mode="json"),
        "skip_layers": None,
        "use_pretrained_pos_emb": True,
        "model_path": model_path,
        **_base_keys(model),
        "mapping": _mapping(mapping),
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": None,
            "group_size": 128,
            "smoothquant_val": 0.5,
            "clamp_val": None,
            "use_meta_recipe": False,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": None,
        },
        OWN_KEY: own,
    }


def _base_keys(model: ModelConfig) -> dict:
    """What TensorRT-LLM's config of any transformer asks for; nothing here reads them."""
    return {
        "logits_dtype": "float32",
        "vocab_size": None,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_attention_heads,
        "hidden_act": "gelu",
        "intermediate_size": 4 * model.hidden_size,
        "norm_epsilon": 1e-5,
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": None,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "head_size": model.attention_head_dim,
        "qk_layernorm": False,
        "rotary_embedding_dim": model.attention_head_dim,
        "runtime_defaults": None,
    }


def _mapping(mapping: Mapping) -> dict:
    """TensorRT-LLM knows no CFG parallelism: its world is one half of ours then."""
    tp, cp = mapping.tp_size, mapping.cp_size
    return {
        "world_size": tp * cp,
        "gpus_per_node": 8,
        "cp_size": cp,
        "tp_size": tp,
        "pp_size": 1,
        "moe_tp_size": tp,
        "moe_cluster_size": 1,
        "moe_ep_size": 1,
        "attn_tp_size": tp * cp,
        "attn_cp_size": 1,
        "cp_config": {},
        "enable_attention_dp": False,
        "enable_lm_head_tp_in_adp": False,
    }


def known_keys(model: ModelConfig) -> set[str]:
    return set(checkpoint_config(model, "float32", Mapping(), "", {}))


def versions() -> dict[str, str | None]:
    """Of the packages that a conversion depends on."""
    return {package: version_of(package) for package in PACKAGES}


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint and nothing else."""
    names = {path.name for path in folder.iterdir()}
    ranks = {name for name in names if name.startswith("rank") and name.endswith(".safetensors")}
    return rank_file(0) in ranks and names == ranks | {CONFIG_FILE} and "architecture" in keys_in(folder / CONFIG_FILE)


def keys_in(path: Path) -> set[str]:
    """The keys of a JSON object; none where the file holds anything else."""
    try:
        return set(read_json(path))
    except ValueError:
        return set()
