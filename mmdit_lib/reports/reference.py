"""Loading diffusers' transformer as the reference, from anything that `convert` accepts."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..architecture import Architecture
from ..checkpoint.hub import resolve_model
from ..checkpoint.source import find_source


def load_reference(
    model_path: str | Path,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    variant: str | None = None,
    revision: str | None = None,
) -> torch.nn.Module:
    """diffusers' transformer in evaluation mode, from a folder, a file, a hub id, or tiny."""
    model_path = resolve_model(model_path)
    path = Path(model_path).expanduser()
    if path.suffix == ".json" and path.is_file():  # the index of a folder's shards
        path, variant = path.parent, re.fullmatch(r".*\.index\.?(.*)\.json", path.name)[1] or None
    config = find_source(path).model if path.is_file() else None
    where = str(path) if path.exists() else model_path
    reference = architecture.reference.load(where, dtype, variant=variant, revision=revision, config=config)
    return reference.eval().to(device)
