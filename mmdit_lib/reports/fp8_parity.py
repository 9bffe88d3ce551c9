"""Layer parity of quantized engines.

The reference that an engine must agree with is diffusers' transformer in float32 with the same values rounded to FP8.
Besides, every module is compared with diffusers without this rounding: what FP8 costs, next to what the network's
dtype costs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import pandas as pd
import torch
from torch.overrides import TorchFunctionMode

from ..architecture import Architecture
from ..checkpoint.folder import Checkpoint
from ..config import TORCH_DTYPES
from ..engine.folder import EngineFolder
from ..engine.graph import Graph
from ..engine.kernels import through_fp8
from ..engine.lowering import value_of
from ..engine.torch_ops import SCORES
from ..network.functional import PROBABILITY_SCALE
from ..network.layers import ACTIVATION_SCALE, WEIGHT_SCALE

TOLERANCES = {"float32": 2e-2, "float16": 0.25, "bfloat16": 0.25}
"""Largest relative error that is accepted between two results with rounding to FP8, by the network's dtype.

Where rounding or another order of a sum moves an activation across the middle of two FP8 values, it gets the next one,
which is 1/16 to 1/8 away. Between float32 results this is rare, most of all on one rank and a CPU: to check every
layer, convert with --dtype float32. But one such value can start an avalanche through later layers (6e-2 was seen at
the tiny model's output): then try another seed. In half precision it happens to several percent of the values. A
swapped, missing or wrongly sharded weight causes an error of order one.
"""

Outputs = Mapping[str, list[torch.Tensor]]


@contextmanager
def rounding(
    reference: torch.nn.Module, architecture: Architecture, checkpoint: Checkpoint, graph: Graph | None = None
) -> Iterator[None]:
    """Inside, diffusers' transformer rounds the weights and inputs to FP8 that the checkpoint does, with its scales,
    and in attention what the graph does."""
    scales = checkpoint.weights()
    before, handles = {}, []
    attention = AttentionInFp8()
    for path, scale in (value_scales(graph, scales) if graph else {}).items():
        module = reference.get_submodule(architecture.keys.to_diffusers(path))
        handles.append(module.register_forward_pre_hook(partial(attention.enter, scale.to(reference.device))))
    for module in checkpoint.quantization.modules(architecture, checkpoint.model):
        linear = reference.get_submodule(architecture.keys.to_diffusers(module))
        of_weight, of_input = (
            scales[f"{module}.{kind}"].to(linear.weight) for kind in (WEIGHT_SCALE, ACTIVATION_SCALE)
        )
        before[linear] = linear.weight.data
        linear.weight.data = through_fp8(linear.weight.data, of_weight)
        handles.append(linear.register_forward_pre_hook(_round_input(of_input)))
    try:
        with attention:
            yield
    finally:
        for handle in handles:
            handle.remove()
        for linear, weight in before.items():
            linear.weight.data = weight


def value_scales(graph: Graph, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The scale of the values of each attention in FP8, by the path of its module."""
    found = [layer for layer in graph.layers if layer.type == "CONSTANT" and "largest" in layer.attributes]
    return {layer.name.rpartition("/")[0]: value_of(layer.attributes, weights).float() for layer in found}


class AttentionInFp8(TorchFunctionMode):
    """Inside, PyTorch's attention rounds to FP8 what `functional.attention` does.

    diffusers' attention modules all call the same function; `enter` is a hook that tells whose call comes next.
    """

    value_scale: torch.Tensor | None = None

    def enter(self, value_scale: torch.Tensor, *_) -> None:
        self.value_scale = value_scale

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.nn.functional.scaled_dot_product_attention or self.value_scale is None:
            return function(*args, **kwargs or {})
        one = torch.ones((), device=args[0].device)
        q, k, v = (through_fp8(x, s) for x, s in zip(args, (one, one, self.value_scale), strict=True))
        results = []
        for queries in q.split(max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2])), 2):
            probabilities = (queries @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            results.append(through_fp8(probabilities, PROBABILITY_SCALE * one) @ v)
        return torch.cat(results, 2)


def _round_input(scale: torch.Tensor):
    return lambda _, inputs: (through_fp8(inputs[0], scale), *inputs[1:])


def reference_outputs(
    reference: torch.nn.Module, folder: EngineFolder, checkpoint: Checkpoint, inputs: Mapping[str, torch.Tensor]
) -> tuple[Outputs, dict[str, str], dict[str, Outputs]]:
    """Every module's outputs with rounding to FP8, the reason for each omission, and the outputs without this rounding:
    'plain' as the reference is, 'dtype' in the engine's dtype."""
    architecture = folder.architecture
    record = architecture.reference.outputs
    plain, _ = record(reference, inputs, folder.model, folder.build_config)
    with rounding(reference, architecture, checkpoint, folder.graph(0)):
        theirs, left_out = record(reference, inputs, folder.model, folder.build_config)
    narrow = copy.deepcopy(reference)
    torch.nn.Module.to(narrow, TORCH_DTYPES[folder.dtype])  # diffusers' own `to` warns
    in_dtype, _ = record(narrow, inputs, folder.model, folder.build_config)
    return theirs, left_out, {"plain": plain, "dtype": in_dtype}


def summary(table: pd.DataFrame) -> str:
    """What FP8 adds, in one line."""
    known = table[table.fp8_error.notna()]
    last = known.iloc[known.depth.argmax()]
    worst = known.loc[known.fp8_error.idxmax()]
    return (
        f"without rounding to FP8, diffusers in float32 differs by {last.fp8_error:.2g} in {last.module} and at most "
        f"{worst.fp8_error:.2g} in {worst.module}; diffusers in {table.attrs['dtype']} by {last.dtype_error:.2g} in "
        f"{last.module}"
    )
