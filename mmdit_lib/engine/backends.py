"""The available backends, in order of preference, and choosing one."""

from __future__ import annotations

import torch

from ..config import either
from .backend import Backend
from .folder import EngineFolder
from .pytorch_backend import PyTorchBackend
from .tensorrt_backend import TensorRTBackend

BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (TensorRTBackend, PyTorchBackend)}


def choose_backend(folder: EngineFolder, asked: str, device: torch.device) -> tuple[type[Backend], str]:
    """Choose a backend; returns it and the reason. 'auto' takes the first that can run the folder.

    Raises:
        ValueError: the backend that was asked for, or every backend for 'auto', cannot run the folder on `device`.
    """
    if asked != "auto":
        if asked not in BACKENDS:
            raise ValueError(f"backend '{asked}': use {either(['auto', *BACKENDS])}")
        why_not = BACKENDS[asked].refusal(folder, device)
        if why_not:
            raise ValueError(f"backend {asked}: {why_not}")
        return BACKENDS[asked], "requested"
    refusals = []
    for backend in BACKENDS.values():
        why_not = backend.refusal(folder, device)
        if why_not is None:
            return backend, "; ".join(refusals) or f"{folder.tensorrt} can run the plan here"
        refusals.append(why_not)
    raise ValueError(f"no backend can run {folder.path}: {'; '.join(refusals)}")
