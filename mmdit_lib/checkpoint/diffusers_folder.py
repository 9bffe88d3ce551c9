"""A transformer folder as diffusers saves it: `config.json`, safetensors files, an index if there are several."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from ..architecture import Architecture, ModelConfig
from ..config import TORCH_DTYPES, Dtype
from ..files import write_synced
from ..files.records import keys_in
from .manifest import CONFIG_FILE, version_of
from .source import STEM
from .tensor_file import Stored

SHARD_BYTES = 10_000_000_000
"""diffusers' largest file; a larger tensor gets a file of its own."""
MARK = "_mmdit_lib"
"""A key of our own in `config.json`; diffusers ignores keys that start with an underscore."""
FILES = re.compile(rf"{re.escape(CONFIG_FILE)}|{STEM}(-\d+-of-\d+)?\.safetensors|{STEM}\.safetensors\.index\.json")


def describe_folder(
    folder: Path, architecture: Architecture, model: ModelConfig, dtype: Dtype, shard_bytes: int
) -> dict[str, dict[str, Stored]]:
    """Write `config.json` and, if needed, the index; returns the tensors of each weight file that must follow.

    Tensors have diffusers' names and order: files hold what `save_pretrained` would put there.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes = architecture.parameters(model)
    tensors = {architecture.keys.to_diffusers(name): Stored(dtype, shape) for name, shape in shapes.items()}
    sizes = {n: torch.empty(t.shape, dtype=TORCH_DTYPES[dtype], device="meta") for n, t in tensors.items()}
    split = split_torch_state_dict_into_shards(
        sizes, max_shard_size=shard_bytes, filename_pattern=f"{STEM}{{suffix}}.safetensors"
    )
    _write_json(
        folder / CONFIG_FILE,
        {"_class_name": architecture.name, MARK: version_of("mmdit_lib"), **model.to_diffusers()},
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / f"{STEM}.safetensors.index.json", index)
    return {file: {name: tensors[name] for name in names} for file, names in split.filename_to_tensors.items()}


def is_own_folder(folder: Path) -> bool:
    """Whether `folder` is a transformer that this library wrote, and contains nothing else."""
    return all(FILES.fullmatch(path.name) for path in folder.iterdir()) and MARK in keys_in(folder / CONFIG_FILE)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_synced(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
