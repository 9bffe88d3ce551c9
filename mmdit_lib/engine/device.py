"""The device of a backend: which one it is, and as the process's current one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def usable_device(asked: str | torch.device | None) -> torch.device:
    """The device that was asked for; by default CUDA if available, otherwise the CPU.

    Raises `ValueError` if it is neither a CPU nor a GPU of this machine.
    """
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device '{asked}': use cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this machine has no CUDA GPU")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device {device}: this machine has only cuda:0{f' to cuda:{count - 1}' * (count > 1)}")
    return device


def numbered(device: torch.device | str) -> torch.device:
    """The same device; "cuda" becomes the GPU that is current now, as another thread may have another one."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def current(device: torch.device) -> AbstractContextManager:
    """A context in which `device` is the current CUDA device, the one to which Triton and TensorRT send their work."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
