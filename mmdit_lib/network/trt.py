"""The TensorRT package of this environment: `tensorrt` where it is installed, else `tensorrt_rtx`.

Both have the same Python API. `trt` looks the package up at its first use, so that what only
describes a network (its parameters, its plan) works without TensorRT.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from types import ModuleType

import torch

PACKAGES = ("tensorrt", "tensorrt_rtx")


class TensorRT:
    """Stands for the package; every attribute is the package's own."""

    @cached_property
    def package(self) -> ModuleType:
        faults = []
        for name in PACKAGES:
            try:
                return importlib.import_module(name)
            except (ImportError, OSError) as error:
                faults.append(f"{name}: {str(error).splitlines()[0]}")
        raise ImportError(
            f"no TensorRT here ({'; '.join(faults)}); `pip install tensorrt-rtx-cu13` builds on any x86-64 Linux"
        )

    def __getattr__(self, name: str):
        return getattr(self.package, name)


trt = TensorRT()


def installed() -> str | None:
    """'tensorrt_rtx 1.7.1.116', or None."""
    try:
        return f"{trt.package.__name__} {trt.package.__version__}"
    except ImportError:
        return None


TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


def trt_dtype(name: str):
    """'bfloat16' -> `trt.DataType.BF16`."""
    members = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
    return getattr(trt.DataType, members[name])


def dtype_name(dtype) -> str:
    """The name of a torch or TensorRT data type: 'float32', 'int64', ..."""
    if isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    return next(name for name in TORCH_DTYPES if trt_dtype(name) == dtype)
