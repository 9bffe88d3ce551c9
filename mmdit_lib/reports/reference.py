"""Loading diffusers' transformer as the reference, from anything that `convert` accepts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from ..architecture import Architecture
from ..checkpoint.hub import TRANSFORMER_CONFIG, download, resolve_model
from ..checkpoint.lora import fuse, open_loras
from ..checkpoint.manifest import LoraRecord
from ..checkpoint.source import find_source
from ..engine.folder import EngineFolder


def load_reference(
    model_path: str | Path,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    variant: str | None = None,
    revision: str | None = None,
    loras: Iterable[LoraRecord] = (),
) -> torch.nn.Module:
    """diffusers' transformer in evaluation mode, from a folder, a file, a hub id, or tiny, with the given LoRAs fused.

    Raises `ValueError` also if a LoRA is not where it was or has changed.
    """
    model_path = resolve_model(model_path)
    path = Path(model_path)
    if not path.exists():
        download(model_path, [TRANSFORMER_CONFIG], revision)  # which says in one line why it cannot
    if path.suffix == ".json" and path.is_file():  # the index of a folder's shards
        path, variant = path.parent, re.fullmatch(r".*\.index\.?(.*)\.json", path.name)[1] or None
    config = find_source(path).model if path.is_file() else None
    where = str(path) if path.exists() else model_path
    reference = architecture.reference.load(where, dtype, variant=variant, revision=revision, config=config)
    fuse_recorded(reference, architecture, loras)
    return reference.eval().to(device)


def check_same_model(reference: torch.nn.Module, folder: EngineFolder) -> None:
    """Raises `ValueError` naming the fields in which diffusers' transformer and the engine's model differ."""
    theirs, ours = folder.architecture.config.from_diffusers(dict(reference.config)), folder.model
    differ = [name for name in type(ours).model_fields if getattr(theirs, name) != getattr(ours, name)]
    if differ:
        says = "; ".join(f"{name} {getattr(theirs, name)} and {getattr(ours, name)}" for name in differ)
        raise ValueError(f"model and engine do not match: {says}")


@torch.no_grad()
def fuse_recorded(reference: torch.nn.Module, architecture: Architecture, records: Iterable[LoraRecord]) -> None:
    """Fuse the LoRAs that a conversion recorded. Raises `ValueError` if one is not found or has changed."""
    if not (records := tuple(records)):
        return
    model = architecture.config.from_diffusers(dict(reference.config))
    loras = open_loras([(record.source, record.scale) for record in records], architecture, model)
    for record, lora in zip(records, loras, strict=True):
        if lora.record.sha256 != record.sha256:
            raise ValueError(f"LoRA {record.source} has changed since it was fused: its sha256 was {record.sha256}")
    for name, parameter in reference.named_parameters():
        parameter.copy_(fuse(architecture.keys.from_diffusers(name), parameter, loras))
