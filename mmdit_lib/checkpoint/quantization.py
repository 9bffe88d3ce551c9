"""FP8 checkpoints: which tensors are quantized, and what their scales are.

The weight W of a quantized linear layer is stored as round(W / s) in FP8, and its inputs x are rounded the same way
when it runs. Names and shapes are TensorRT-LLM's for its algorithm "FP8": one scale for all of W in
`weights_scaling_factor` [1], one for x in `activation_scaling_factor` [1], both float32. Every scale is a power of
two: dividing by it and multiplying by it are exact in every dtype, so all that FP8 adds is its own rounding, and how
a kernel applies a scale does not matter. FP8 is a floating-point format, so this costs no accuracy (`docs/fp8.md`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from pydantic import Field

from ..architecture import Architecture, ModelConfig
from ..config import FP8, STORED_DTYPES, Dtype, FileConfig, Layout, Text, shown
from ..network.layers import ACTIVATION_SCALE, WEIGHT_SCALE, Linear
from .tensor_file import Stored

Algorithm = Literal["fp8"]
"""What `convert` can quantize to."""
ALGORITHMS = get_args(Algorithm)
LARGEST = torch.finfo(STORED_DTYPES[FP8].torch).max
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 2.0**15
"""Powers of two that float16 represents exactly."""
MARGIN = 4.0
"""Headroom of activations over the largest value of the calibration run; larger values saturate. In a floating-point
format it costs nothing: 64 gives the same error as 1 (`benchmarks/fp8_quality.py layers`)."""


class Quantization(FileConfig):
    """TensorRT-LLM's key `quantization`, in the config of a checkpoint or an engine."""

    quant_algo: Text | None = None
    """'FP8', or None if nothing is quantized."""
    exclude_modules: tuple[Text, ...] | None = Field(None, max_length=1024)
    """Patterns of linear layers that are not quantized."""

    @classmethod
    def fp8(cls, architecture: Architecture) -> Quantization:
        return cls(quant_algo="FP8", exclude_modules=tuple(kept.pattern for kept in architecture.full_precision))

    @property
    def format_version(self) -> int:
        """The first format of a checkpoint or engine folder that can describe it."""
        return 1 if self.quant_algo is None else 2

    def modules(self, architecture: Architecture, model: ModelConfig) -> list[str]:
        """Paths of the quantized linear layers."""
        if self.quant_algo is None:
            return []
        linears = (path for path, module in architecture.module(model).named_modules() if isinstance(module, Linear))
        return [path for path in linears if not any(fnmatchcase(path, x) for x in self.exclude_modules or ())]


NONE = Quantization()
SCALES = f".{WEIGHT_SCALE}", f".{ACTIVATION_SCALE}"
"""Ends of the names of scales."""


def stored_tensors(
    architecture: Architecture, model: ModelConfig, layout: Layout, dtype: Dtype, quantization: Quantization = NONE
) -> dict[str, Stored]:
    """Every tensor of one tp rank's file, in its order; `dtype` is the network's."""
    found = {name: Stored(dtype, shape) for name, shape in architecture.local_parameters(model, layout).items()}
    quantized = {f"{module}.weight" for module in quantization.modules(architecture, model)}
    if not quantized:
        return found
    stored = {}
    for name, tensor in found.items():
        if name in quantized:
            module = name.removesuffix("weight")
            stored[name] = Stored(FP8, tensor.shape)
            stored |= {f"{module}{kind}": Stored("float32", (1,)) for kind in (WEIGHT_SCALE, ACTIVATION_SCALE)}
        else:
            stored[name] = tensor
    return stored


def scale_for(largest: float, what: str) -> float:
    """The smallest power of two with which values up to `largest` do not saturate.

    Raises `ValueError` naming `what` if `largest` is not finite.
    """
    if not math.isfinite(largest):
        raise ValueError(f"{what} contains NaN or infinity")
    if largest == 0:
        return 1.0
    fraction, exponent = math.frexp(largest / LARGEST)
    return min(max(2.0 ** (exponent - (fraction == 0.5)), SMALLEST_SCALE), LARGEST_SCALE)


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale in FP8: clipped and rounded to the nearest value, ties to even. `scale` broadcasts."""
    return (x.float() / scale.float()).clamp(-LARGEST, LARGEST).to(STORED_DTYPES[FP8].torch)


def quantized_weight(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in FP8, and its scale [1]. Raises `ValueError` naming it if it is not finite."""
    scale = torch.tensor([scale_for(weight.float().abs().max().item(), f"tensor '{name}'")], device=weight.device)
    return rounded(weight, scale), scale


def stored_parts(
    name: str, tensor: torch.Tensor, largest: Mapping[str, float], spelled: str
) -> dict[str, torch.Tensor] | None:
    """What is stored of the full tensor `name` of a quantized layer; None if it is stored as it is.

    Args:
        largest: the largest input of each quantized linear layer.
        spelled: the tensor's name, for messages. Raises `ValueError` if it, or a largest input, is not finite.
    """
    module, _, kind = name.rpartition(".")
    if kind != "weight" or module not in largest:
        return None
    weight, scale = quantized_weight(tensor, spelled)
    activation = scale_for(MARGIN * largest[module], f"the input of '{module}'")
    return {
        name: weight,
        f"{module}.{WEIGHT_SCALE}": scale,
        f"{module}.{ACTIVATION_SCALE}": torch.tensor([activation]),
    }


def check_scales(weights: Mapping[str, torch.Tensor], where: object) -> None:
    """Raises `ValueError` naming the first scale that is not a power of two within the limits."""
    for name, tensor in weights.items():
        if name.endswith(SCALES):
            value = tensor.item()
            legal = math.isfinite(value) and SMALLEST_SCALE <= value <= LARGEST_SCALE and math.frexp(value)[0] == 0.5
            if not legal:
                raise ValueError(f"{where}: scale '{name}' is {shown(value)}, not a power of two from 2^-14 to 2^15")
