"""The installed TensorRT package: `tensorrt` if available, else `tensorrt_rtx`.

Both have the same Python API. `trt` imports the package on first use, so code that only describes a
network (its parameters, how they are sharded) works without TensorRT.
"""

from __future__ import annotations

import importlib
from functools import cache, cached_property
from types import ModuleType
from typing import NamedTuple

import torch

from ..config import STORED_DTYPES

PACKAGES = ("tensorrt", "tensorrt_rtx")


class TensorRT:
    """A lazy proxy for the package."""

    @cached_property
    def package(self) -> ModuleType:
        faults = []
        for name in PACKAGES:
            try:
                return importlib.import_module(name)
            except (ImportError, OSError) as error:
                faults.append(f"{name}: {str(error).splitlines()[0]}")
        raise ImportError(
            f"no TensorRT ({'; '.join(faults)}); pip install tensorrt-rtx-cu13 (builds on any x86-64 Linux)"
        )

    def __getattr__(self, name: str):
        return getattr(self.package, name)


trt = TensorRT()


def installed() -> str | None:
    """For instance 'tensorrt_rtx 1.7.1.116'; None without TensorRT."""
    try:
        return f"{trt.package.__name__} {trt.package.__version__}"
    except ImportError:
        return None


class Features(NamedTuple):
    """Layers that a network can use: TensorRT 11 and TensorRT-RTX have all of them, 10.13 has none."""

    attention: bool
    collectives: bool
    normalization_v2: bool


def installed_features() -> Features:
    """Of the installed TensorRT."""
    names = "add_attention_v2", "add_dist_collective", "add_normalization_v2"
    return Features(*(hasattr(trt.INetworkDefinition, name) for name in names))


MEMBERS = {name: names.tensorrt for name, names in STORED_DTYPES.items()} | {"int64": "INT64", "bool": "BOOL"}
"""Members of `trt.DataType` by our names."""


def trt_dtype(name: str):
    """'bfloat16' -> `trt.DataType.BF16`."""
    return getattr(trt.DataType, MEMBERS[name])


@cache
def dtype_name(dtype) -> str:
    """The name of a torch or TensorRT data type: 'float32', 'int64', ..."""
    if isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    return next(name for name in MEMBERS if trt_dtype(name) == dtype)
