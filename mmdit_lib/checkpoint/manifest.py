"""`config.json` of a checkpoint folder: TensorRT-LLM's keys in the same order, then one key of our own."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from ..architecture import Architecture, ModelConfig
from ..config import Layout
from ..files.records import keys_in

CONFIG_FILE = "config.json"
OWN_KEY = "mmdit_lib"
FORMAT_VERSION = 1
PACKAGES = ("mmdit_lib", "torch", "diffusers", "safetensors")


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def checkpoint_config(
    architecture: Architecture, model: ModelConfig, dtype: str, layout: Layout, model_path: str, own: dict[str, Any]
) -> dict[str, Any]:
    """The content of `config.json`; `own` is stored under `OWN_KEY`."""
    return {
        "architecture": architecture.name,
        "dtype": dtype,
        **model.to_trtllm(model_path),
        "mapping": trtllm_mapping(layout),
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


def trtllm_mapping(layout: Layout) -> dict[str, Any]:
    """TensorRT-LLM has no CFG parallelism, so its `world_size` covers the ranks of one cfg rank."""
    tp, cp = layout.tp_size, layout.cp_size
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


def known_keys(architecture: Architecture, model: ModelConfig) -> set[str]:
    return set(checkpoint_config(architecture, model, "float32", Layout(), "", {}))


def versions() -> dict[str, str | None]:
    """Versions of the packages that a conversion depends on."""
    return {package: version_of(package) for package in PACKAGES}


def version_of(package: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` contains a checkpoint and nothing else."""
    names = {path.name for path in folder.iterdir()}
    ranks = {name for name in names if name.startswith("rank") and name.endswith(".safetensors")}
    return rank_file(0) in ranks and names == ranks | {CONFIG_FILE} and "architecture" in keys_in(folder / CONFIG_FILE)
