"""Which GPUs TensorRT and TensorRT-RTX plans run on, as documented and measured; and what GPU and CPU compute fast."""

from __future__ import annotations

import torch

RTX_CAPABILITIES = {(7, 5), (8, 0), (8, 6), (8, 9)}
"""Besides these, TensorRT-RTX runs on every compute capability 12.x. It rejects 9.0."""


def refused_capability(package: str, capability: tuple[int, int]) -> str | None:
    """Why `package` ('tensorrt' or 'tensorrt_rtx') does not support this compute capability; None if it does."""
    if package == "tensorrt_rtx":
        fine = capability in RTX_CAPABILITIES or capability[0] == 12
        legal = "7.5, 8.0, 8.6, 8.9 and 12.x"
    else:
        fine = (7, 5) <= capability
        legal = "7.5 and later"
    major, minor = capability
    return None if fine else f"{package} runs on compute capability {legal}, and this GPU has {major}.{minor}"


FP8_CAPABILITY = (8, 9)
"""The first compute capability with FP8 tensor cores."""


def has_fp8(device: torch.device) -> bool:
    """Whether a device has FP8 tensor cores, and instructions that convert to FP8."""
    cuda = device.type == "cuda" and torch.cuda.is_available()
    return cuda and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def refused_fp8(capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability does not multiply in FP8; None if it does."""
    if capability >= FP8_CAPABILITY:
        return None
    return "FP8 needs compute capability 8.9 or later, and this GPU has {}.{}".format(*capability)


CPU_SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""PyTorch's functions that say whether this CPU has instructions to multiply in a dtype."""
SLOW_ON_CPU = frozenset(x for x, name in CPU_SUPPORT.items() if not getattr(torch.ops.mkldnn, name, bool)())
"""Without them, products in these dtypes take PyTorch several times as long as in float32."""


def slow_on_cpu(x: torch.Tensor) -> bool:
    """Whether to multiply in float32 and to round the result once, as a GPU does."""
    return x.dtype in SLOW_ON_CPU and x.device.type == "cpu"


def plan_runs_here(package: str, device: torch.device | str = "cuda") -> str | None:
    """Why a plan of `package` cannot run on `device`, in one line; None if it can."""
    device = torch.device(device)
    if not torch.cuda.is_available():
        return "this machine has no CUDA GPU"
    if device.type != "cuda":
        return f"plans run on CUDA devices, not on {device}"
    return refused_capability(package, torch.cuda.get_device_capability(device))
