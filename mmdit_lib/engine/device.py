"""The device of a backend as the process's current one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def current(device: torch.device) -> AbstractContextManager:
    """A context in which `device` is the current CUDA device, the one to which Triton and TensorRT send their work."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
