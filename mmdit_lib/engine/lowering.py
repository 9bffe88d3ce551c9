"""Lowering a graph file and a checkpoint's tensors to a `torch.fx.GraphModule`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from ..config import TORCH_DTYPES
from .graph import Graph, Layer
from .passes import NUMERICS, Pass, apply
from .torch_ops import KINDS, OPS, SHAPE_OPS


def lower(
    graph: Graph,
    weights: Mapping[str, torch.Tensor],
    *,
    device: torch.device | str = "cpu",
    groups: Mapping[tuple[int, ...], str] | None = None,
    passes: tuple[Pass, ...] = NUMERICS,
) -> fx.GraphModule:
    """Translate each layer of `graph` into a call to its operator in `torch_ops`.

    Args:
        weights: the checkpoint tensors of this rank; on the CPU they are used without a copy.
        groups: process group names, by ranks, for every group that the collectives use.
        passes: rewrite the layers first (see `passes.py`).

    Returns:
        A module that takes the graph's inputs in order. Each node's `meta['tensor']` is the name of the TensorRT
        tensor that it computes.

    Raises:
        ValueError: naming the first layer whose type has no operator.
    """
    return fx.GraphModule(*lowered(graph, weights, device=device, groups=groups, passes=passes))


def lowered(
    graph: Graph,
    weights: Mapping[str, torch.Tensor],
    *,
    device: torch.device | str,
    groups: Mapping[tuple[int, ...], str] | None,
    passes: tuple[Pass, ...],
) -> tuple[torch.nn.Module, fx.Graph]:
    """What `lower` makes its module of: the constants, and the calls, for which no Python code is generated."""
    root = torch.nn.Module()
    target = fx.Graph()
    values: dict[str | None, fx.Node | tuple[int, ...] | None] = {None: None}
    for value in graph.inputs:
        values[value.name] = _named(target.placeholder(value.name), value.name)
    for layer in apply(graph, passes):
        if layer.type == "CONSTANT":
            if layer.output.dtype == "int64":
                values[layer.output.name] = tuple(layer.attributes["values"])
                continue
            name = f"w{len(root._buffers)}"
            root.register_buffer(name, constant(layer, weights).to(device))
            node = target.get_attr(name)
            node.meta["weight"] = layer.attributes.get("weight")
            node.meta["source"] = layer.attributes
        else:
            attributes = dict(layer.attributes)
            if "group" in attributes:
                ranks = tuple(attributes["group"])
                attributes |= {"group": (groups or {})[ranks], "size": len(ranks)}
            node = target.call_function(operator_of(layer), tuple(values[i] for i in layer.inputs), attributes)
        values[layer.output.name] = _named(node, layer.output.name)
    target.output(values[graph.outputs[0]])
    target.eliminate_dead_code()
    return root, target


def placed_parts(module: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Every checkpoint tensor that a lowered graph holds in full, by name, as a view of what its operators read."""
    for node in module.graph.find_nodes(op="get_attr"):
        source, tensor = node.meta["source"], getattr(module, node.target)
        if "stack" in source and all("weight" in part for part in source["stack"]) and "scales" not in source:
            parts, dim = source["stack"], source["dim"]
            widths = [part["shape"][dim] for part in parts]
            yield from zip((part["weight"] for part in parts), tensor.split(widths, dim), strict=True)
        elif "weight" in source and not {"crop", "dtype"} & source.keys():
            yield source["weight"], tensor


def placed_weights(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The checkpoint tensors that a lowered graph holds in full, by name, on its device; no copies."""
    return dict(placed_parts(module))


def operator_of(layer: Layer) -> Callable:
    ops = SHAPE_OPS if layer.output.dtype == "int64" else OPS
    if layer.type not in ops:
        raise ValueError(f"layer '{layer.name}': the pytorch backend has no operator for layers of type {layer.type}")
    attribute, supported = KINDS.get(layer.type, ("", ()))
    kind = layer.attributes.get(attribute)
    if attribute and kind not in supported:
        raise ValueError(f"layer '{layer.name}': the pytorch backend does not support {layer.type} with {kind}")
    return ops[layer.type]


def _named(node: fx.Node, name: str) -> fx.Node:
    node.meta["tensor"] = name
    return node


def constant(layer: Layer, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The value of a CONSTANT layer: a view of a checkpoint tensor, or values stored in the graph."""
    return value_of(layer.attributes, weights)


def value_of(source: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "scales" in source:  # FP8
        scales = [value_of(scale, weights) for scale in source["scales"]]
        parts = [value_of(part, weights) for part in source["stack"]]
        return torch.cat([_rescaled(*pair, max(scales)) for pair in zip(parts, scales, strict=True)], source["dim"])
    if "stack" in source:
        return torch.cat([value_of(part, weights) for part in source["stack"]], source["dim"])
    if "largest" in source:
        largest = torch.stack([value_of(scale, weights).float() for scale in source["largest"]]).max()
        return (largest * source.get("times", 1.0)).to(TORCH_DTYPES[source.get("dtype", "float32")])
    if "inverse" in source:
        return value_of(source["inverse"], weights).float().reciprocal()
    if "product" in source:
        weight, scale = (value_of(factor, weights).float() for factor in source["product"])
        return (weight * scale).to(TORCH_DTYPES[source["dtype"]])
    if "values" in source:
        values, shape = source["values"], source["shape"]
        return torch.tensor(values if shape else values[0], dtype=TORCH_DTYPES[source["dtype"]]).expand(shape)
    tensor = weights[source["weight"]].reshape(source["shape"])
    if "dtype" in source:
        tensor = tensor.to(TORCH_DTYPES[source["dtype"]])
    for dim, (start, size) in source.get("crop", {}).items():
        tensor = tensor.narrow(int(dim), start, size)
    return tensor


def _rescaled(part: torch.Tensor, scale: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """An FP8 weight in terms of a larger scale. Both are powers of two: exact but for the smallest values."""
    return part if scale == to else (part.float() * (scale / to)).to(part.dtype)
