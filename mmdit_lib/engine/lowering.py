"""Lowering a graph file and a checkpoint's tensors to a `torch.fx.GraphModule`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import fx

from ..config import TORCH_DTYPES
from .graph import Graph, Layer
from .torch_ops import KINDS, OPS, SHAPE_OPS


def lower(
    graph: Graph,
    weights: Mapping[str, torch.Tensor],
    *,
    device: torch.device | str = "cpu",
    groups: Mapping[tuple[int, ...], str] | None = None,
) -> fx.GraphModule:
    """Translate each layer of `graph` into a call to its operator in `torch_ops`.

    Args:
        weights: the checkpoint tensors of this rank; on the CPU they are used without a copy.
        groups: process group names, by ranks, for every group that the collectives use.

    Returns:
        A module that takes the graph's inputs in order. Each node's `meta['tensor']` is the name of the TensorRT
        tensor that it computes.

    Raises:
        ValueError: naming the first layer whose type has no operator.
    """
    root = torch.nn.Module()
    target = fx.Graph()
    values: dict[str | None, fx.Node | tuple[int, ...] | None] = {None: None}
    for value in graph.inputs:
        values[value.name] = _named(target.placeholder(value.name), value.name)
    for layer in fuse(graph):
        if layer.type == "CONSTANT":
            if layer.output.dtype == "int64":
                values[layer.output.name] = tuple(layer.attributes["values"])
                continue
            name = f"w{len(root._buffers)}"
            root.register_buffer(name, constant(layer, weights).to(device))
            node = target.get_attr(name)
            node.meta["weight"] = layer.attributes.get("weight")
        else:
            attributes = dict(layer.attributes)
            if layer.type == "DIST_COLLECTIVE":
                ranks = tuple(attributes["group"])
                attributes |= {"group": (groups or {})[ranks], "size": len(ranks)}
            node = target.call_function(operator_of(layer), tuple(values[i] for i in layer.inputs), attributes)
        values[layer.output.name] = _named(node, layer.output.name)
    target.output(values[graph.outputs[0]])
    target.eliminate_dead_code()
    return fx.GraphModule(root, target)


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
    source = layer.attributes
    if "values" in source:
        return torch.tensor(source["values"], dtype=TORCH_DTYPES[source["dtype"]]).expand(source["shape"])
    tensor = weights[source["weight"]].reshape(source["shape"])
    for dim, (start, size) in source.get("crop", {}).items():
        tensor = tensor.narrow(int(dim), start, size)
    return tensor


# These fusions also change rounding. TensorRT fuses the same pairs, and diffusers calls the fused operators.
# Only the value between the two layers is no longer available.


def fuse(graph: Graph) -> list[Layer]:
    """The graph's layers, with matmul + bias, x * sigmoid(x) and scale + attention each fused into one layer."""
    made_by = {layer.output.name: layer for layer in graph.layers}
    uses = Counter(name for layer in graph.layers for name in layer.inputs)
    fused = (_linear(layer, made_by, uses) or _silu(layer, made_by) or _scale(layer, made_by) or layer
             for layer in graph.layers)  # fmt: skip
    return list(fused)


def _is(layer: Layer | None, layer_type: str, /, **attributes) -> bool:
    if layer is None or layer.type != layer_type:
        return False
    return all(layer.attributes.get(name) == wanted for name, wanted in attributes.items())


def _linear(layer: Layer, made_by: dict[str, Layer], uses: Counter) -> Layer | None:
    if not _is(layer, "ELEMENTWISE", op="SUM"):
        return None
    product, bias = (made_by.get(name) for name in layer.inputs)
    if not (_is(product, "MATRIX_MULTIPLY", op0="NONE", op1="TRANSPOSE") and _is(bias, "CONSTANT")):
        return None
    if not _is(made_by.get(product.inputs[1]), "CONSTANT") or uses[product.output.name] > 1:
        return None
    return replace(layer, type="LINEAR", inputs=(*product.inputs, bias.output.name), attributes={})


def _silu(layer: Layer, made_by: dict[str, Layer]) -> Layer | None:
    if not _is(layer, "ELEMENTWISE", op="PROD"):
        return None
    x, gate = layer.inputs
    sigmoid = made_by.get(gate)
    if not (_is(sigmoid, "ACTIVATION", kind="SIGMOID") and sigmoid.inputs == (x,)):
        return None
    return replace(layer, type="SILU", inputs=(x,), attributes={})


def _scale(layer: Layer, made_by: dict[str, Layer]) -> Layer | None:
    if not _is(layer, "ATTENTION"):
        return None
    product = made_by.get(layer.inputs[0])
    if not _is(product, "ELEMENTWISE", op="PROD"):
        return None
    scale = made_by.get(product.inputs[1])
    if not (_is(scale, "CONSTANT") and len(scale.attributes.get("values", [])) == 1):
        return None
    attributes = layer.attributes | {"scale": scale.attributes["values"][0]}
    return replace(layer, inputs=(product.inputs[0], *layer.inputs[1:]), attributes=attributes)
