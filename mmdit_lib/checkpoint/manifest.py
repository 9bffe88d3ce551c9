"""`config.json` of a checkpoint folder: TensorRT-LLM's keys in the same order, then one key of our own.

The classes say what is read from the file and what is legal; the model's own fields are its `ModelConfig`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from .. import __version__
from ..architecture import Architecture, ModelConfig
from ..config import DTYPES, FileConfig, Layout, Text, TpLayout, VaeScaleFactor
from ..files.records import Files, Sha256, keys_in
from .quantization import NONE, Quantization

CONFIG_FILE = "config.json"
OWN_KEY = "mmdit_lib"
FORMAT_VERSION = 3
"""The latest that can be read: 1, 2 if the weights are quantized, or 3 if an engine's attention is too."""
PACKAGES = ("mmdit_lib", "torch", "diffusers", "safetensors")


def readable(version: int) -> int:
    """The format version of a config of this package. Raises `ValueError` for a later one."""
    if version > FORMAT_VERSION:
        raise ValueError(f"the folder has format {version}; this version reads up to {FORMAT_VERSION}")
    return version


FormatVersion = Annotated[int, Field(strict=True, ge=1), AfterValidator(readable)]


class ParallelSizes(FileConfig):
    """TensorRT-LLM's `mapping`."""

    tp_size: int = Field(strict=True)
    cp_size: int = Field(strict=True)


class PretrainedConfig(FileConfig):
    """TensorRT-LLM's keys that are read: of a checkpoint, and in an engine folder under `pretrained_config`."""

    architecture: Text
    dtype: Text
    mapping: ParallelSizes
    quantization: Quantization | None = None
    model_path: Text | None = None

    @property
    def quantized(self) -> Quantization:
        return self.quantization or NONE

    def check_dtype(self, where: object) -> None:
        """Raises `ValueError` if this library cannot read the weights."""
        algorithm = self.quantized.quant_algo
        if self.dtype not in DTYPES or algorithm not in (None, "FP8"):
            found = f"quant_algo {algorithm}" if algorithm else f"dtype {self.dtype}"
            raise ValueError(
                f"{where} has an unsupported quantization or dtype ({found}); supported are quant_algo FP8 and "
                f"{', '.join(DTYPES)}"
            )


class LoraRecord(FileConfig):
    """A LoRA that was fused into the weights."""

    source: Text
    """What the user gave: a path or a hub id."""
    file: Text
    revision: Text | None = None
    """The commit of a hub id."""
    sha256: Sha256
    scale: float = Field(allow_inf_nan=False)

    def __str__(self) -> str:
        return f"{self.source} (scale {self.scale:g}, sha256 {self.sha256[:12]})"


Loras = Annotated[tuple[LoraRecord, ...], Field(max_length=1024)]


class CalibrationRecord(FileConfig):
    """Where the activation scales of a quantized checkpoint come from."""

    prompts: int = Field(ge=1, strict=True)
    steps: int = Field(ge=1, strict=True)
    margin: float = Field(ge=1, allow_inf_nan=False)


class CheckpointManifest(FileConfig):
    """Our own key in the config of a checkpoint."""

    format_version: FormatVersion
    tp_layout: TpLayout
    cfg_size: Literal[1, 2]
    vae_scale_factor: VaeScaleFactor
    files: Files
    source: Text | None = None
    revision: Text | None = None
    """The commit of a hub id."""
    variant: Text | None = None
    source_dtype: Text | None = None
    versions: dict[Text, Text | None] = Field(default_factory=dict)
    loras: Loras = ()
    calibration: CalibrationRecord | None = None


class CheckpointConfig(PretrainedConfig):
    mmdit_lib: CheckpointManifest | None = None
    """None: TensorRT-LLM wrote the folder."""


def loras_entry(records: Iterable[LoraRecord]) -> dict[str, Any]:
    """The key that a manifest has if there are LoRAs."""
    content = [record.model_dump(exclude_none=True) for record in records]
    return {"loras": content} if content else {}


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def checkpoint_config(
    architecture: Architecture,
    model: ModelConfig,
    dtype: str,
    layout: Layout,
    model_path: str,
    own: dict[str, Any],
    quantization: Quantization = NONE,
) -> dict[str, Any]:
    """The content of `config.json`; `own` is stored under `OWN_KEY`."""
    return {
        "architecture": architecture.name,
        "dtype": dtype,
        **model.to_trtllm(model_path),
        "mapping": trtllm_mapping(layout),
        "quantization": {
            "quant_algo": quantization.quant_algo,
            "kv_cache_quant_algo": None,
            "group_size": 128,
            "smoothquant_val": 0.5,
            "clamp_val": None,
            "use_meta_recipe": False,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": quantization.exclude_modules and list(quantization.exclude_modules),
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
        # This package may only be on the path, say in a checkout.
        return __version__ if package == "mmdit_lib" else None


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` contains a checkpoint and nothing else."""
    names = {path.name for path in folder.iterdir()}
    ranks = {name for name in names if name.startswith("rank") and name.endswith(".safetensors")}
    return rank_file(0) in ranks and names == ranks | {CONFIG_FILE} and "architecture" in keys_in(folder / CONFIG_FILE)
