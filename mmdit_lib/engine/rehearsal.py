"""Rehearsal: every layer of a graph file runs once on shapes alone, before anything is allocated or generated.

A graph file is untrusted data. Its operators come from the fixed table of `torch_ops.py`, and this check finds what
an operator would not accept: missing, unknown or invalid attributes, wrong shapes, a weight that is not in the
checkpoint, a collective over ranks of another group, a result far larger than the network's inputs and weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ..architecture import Architecture, ModelConfig
from ..checkpoint.quantization import NONE, Quantization, stored_tensors
from ..config import TORCH_DTYPES, Dtype, Layout, RankMapping, shown
from .collectives import without_ranks
from .graph import Graph, Layer
from .inputs import Engine, Shape, profile_shapes, shape_of
from .lowering import constant, operator_of
from .torch_ops import FUSED

GROWTH = 256
"""No tensor may have more elements than this many times the inputs and weights together."""

Result = torch.Tensor | tuple[int, ...]


def rehearse(
    engine: Engine, graph: Graph, weights: Mapping[str, torch.Tensor], mapping: RankMapping, where: Path
) -> None:
    """Run `graph` on torch's meta device at both ends of the engine's profile.

    Args:
        weights: the checkpoint tensors of this rank; only shapes and dtypes matter.

    Raises:
        ValueError: naming `where` and the first layer that cannot run or whose result is not the declared one.
    """
    placed = {name: torch.empty_like(weight, device="meta") for name, weight in weights.items()}
    profile = profile_shapes(engine.architecture, engine.model, engine.build_config, engine.layout.cfg_size)
    for end in (0, -1):
        sizes = engine.build_config.sizes(engine.layout.cfg_size)[end]
        found = _run(graph, {name: shapes[end] for name, shapes in profile.items()}, placed, mapping, where)
        output = engine.architecture.output
        expected = shape_of(output, engine.model, sizes, engine.build_config.vae_scale_factor)
        if tuple(found.shape) != expected:
            raise ValueError(
                f"{where}: {output.name} has shape {list(found.shape)} for {sizes}, expected {list(expected)}"
            )


def meta_weights(
    architecture: Architecture, model: ModelConfig, layout: Layout, dtype: Dtype, quantization: Quantization = NONE
) -> dict[str, torch.Tensor]:
    """One rank's weights without data."""
    stored = stored_tensors(architecture, model, layout, dtype, quantization)
    return {name: torch.empty(x.shape, dtype=TORCH_DTYPES[x.dtype], device="meta") for name, x in stored.items()}


def _run(
    graph: Graph, shapes: Mapping[str, Shape], weights: Mapping[str, torch.Tensor], mapping: RankMapping, where: Path
) -> torch.Tensor:
    values: dict[str | None, Result | None] = {None: None}
    for value in graph.inputs:
        values[value.name] = torch.empty(shapes[value.name], dtype=TORCH_DTYPES[value.dtype], device="meta")
    known = [*weights.values(), *(x for x in values.values() if x is not None)]
    limit = GROWTH * sum(x.numel() for x in known)
    done: dict[tuple, Result] = {}  # blocks repeat the same operators on the same shapes
    for layer in graph.layers:
        try:
            inputs = [values[name] for name in layer.inputs]
            key = (layer.type, layer.output.dtype, repr(layer.attributes), *map(_signature, inputs))
            result = done[key] if key in done else _result(layer, inputs, weights, mapping)
            done[key] = result
            _compare(layer, result, limit)
        except Exception as error:  # an operator may raise anything for attributes that are not its own
            reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split())
            raise ValueError(f"{where}: layer {shown(layer.name)} of type {shown(layer.type)}: {reason}") from None
        values[layer.output.name] = result
    return values[graph.outputs[0]]


def _signature(value: Result | None) -> object:
    """All that the shape of an operator's result depends on in this input."""
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


def _result(layer: Layer, inputs: list, weights: Mapping[str, torch.Tensor], mapping: RankMapping) -> Result:
    if layer.type == "CONSTANT":
        if layer.output.dtype == "int64":
            return tuple(layer.attributes["values"])
        _check_source(layer.attributes)
        return constant(layer, weights).to("meta")
    if layer.type == "DIST_COLLECTIVE":
        return _collective(*inputs, **layer.attributes, mapping=mapping)
    if "group" in layer.attributes:
        raise ValueError("only a collective has a group")
    if layer.type in FUSED:  # their kernels rely on what the passes have checked
        raise ValueError("a graph file has no layers of this type; only graph passes insert them")
    return operator_of(layer)(*inputs, **layer.attributes)


def _check_source(source: dict) -> None:
    """Raises `ValueError` for a constant that only graph passes make, or the largest of anything but scales."""
    if found := {"stack", "scales", "product", "inverse"} & source.keys():
        raise ValueError(f"a graph file has no constants of kind {min(found)}; only graph passes insert them")
    scales, times = source.get("largest", ()), source.get("times", 1.0)
    if any(scale.keys() != {"weight", "shape"} or scale["shape"] for scale in scales):
        raise ValueError("the largest of something else than scales")
    if isinstance(times, bool) or not isinstance(times, (int, float)) or not 0 < times < math.inf:
        raise ValueError(f"times {shown(times)} is not a positive number")


def _collective(x: torch.Tensor, *, operation: str, group: list[int], mapping: RankMapping) -> torch.Tensor:
    """The shape of a collective's result, without the other ranks."""
    if tuple(group) not in mapping.groups:
        raise ValueError(f"rank {mapping.rank} has no group {shown(group)}")
    if operation not in ("ALL_REDUCE", "ALL_GATHER", "ALL_TO_ALL"):
        raise ValueError(f"unknown collective {shown(operation)}")
    if operation == "ALL_TO_ALL" and x.shape[0] % len(group):
        raise ValueError(f"{x.shape[0]} rows cannot be scattered over {len(group)} ranks")
    return without_ranks(x, operation, len(group))


def _compare(layer: Layer, result: Result, limit: int) -> None:
    """Raises `ValueError` unless `result` is what the file declares."""
    declared = layer.output
    if isinstance(result, tuple):
        if not all(type(size) is int for size in result):
            raise ValueError(f"gives {shown(result)}, but sizes must be integers")
        shape, dtype = (len(result),), "int64"
    else:
        shape, dtype = tuple(result.shape), str(result.dtype).removeprefix("torch.")
    if dtype != declared.dtype or len(shape) != len(declared.shape):
        raise ValueError(f"gives {dtype} {list(shape)}, but the file declares {declared}")
    if any(size not in (-1, found) for size, found in zip(declared.shape, shape, strict=True)):
        raise ValueError(f"gives {dtype} {list(shape)}, but the file declares {declared}")
    if math.prod(shape) > limit:
        raise ValueError(f"gives {list(shape)}, more than {GROWTH} times the inputs and weights together")
