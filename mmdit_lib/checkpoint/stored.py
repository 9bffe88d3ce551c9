"""Which tensors a rank file holds, in which order, and how each is stored."""

from __future__ import annotations

from ..architecture import Architecture, ModelConfig
from ..config import Dtype, Layout
from .tensor_file import Stored


def stored_tensors(architecture: Architecture, model: ModelConfig, layout: Layout, dtype: Dtype) -> dict[str, Stored]:
    """Every tensor of one tp rank's file; `dtype` is the network's."""
    return {name: Stored(dtype, shape) for name, shape in architecture.local_parameters(model, layout).items()}
