"""Reading an `INetworkDefinition` back, layer by layer, into a `Graph`.

`network.get_layer` returns a plain `ILayer`; its attributes can be read once `__class__` is set to the class
for its type.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..network.trt import dtype_name, trt
from .graph import Graph, Layer, Value


def read_network(definition, modules: dict[str, list[str]]) -> Graph:
    """Read every layer of a network.

    Args:
        definition: a TensorRT `INetworkDefinition`.
        modules: the names of the tensors that each module returned.

    Raises:
        ValueError: naming the first layer of a type that the graph file does not support.
    """
    layers = []
    attention_inputs: dict[str, tuple[str, ...]] = {}
    for index in range(definition.num_layers):
        layer = definition.get_layer(index)
        kind = layer.type.name
        inputs = tuple(tensor.name if (tensor := layer.get_input(i)) else None for i in range(layer.num_inputs))
        output = value(layer.get_output(0))
        if kind == "ATTENTION_INPUT":
            attention_inputs[output.name] = inputs
            continue
        if kind == "ATTENTION_OUTPUT":
            kind, inputs = "ATTENTION", attention_inputs[inputs[0]]
        layers.append(Layer(layer.name, kind, inputs, output, attributes(layer, kind)))
    return Graph(
        inputs=tuple(value(definition.get_input(i)) for i in range(definition.num_inputs)),
        outputs=tuple(definition.get_output(i).name for i in range(definition.num_outputs)),
        layers=tuple(layers),
        modules={path: tuple(names) for path, names in modules.items()},
    )


def value(tensor) -> Value:
    return Value(tensor.name, dtype_name(tensor.dtype), tuple(tensor.shape))


def attributes(layer, kind: str) -> dict:
    if kind not in READERS:
        raise ValueError(f"layer '{layer.name}': the graph file does not support layers of type {kind}")
    class_name, read = READERS[kind]
    layer.__class__ = getattr(trt, class_name)
    return read(layer)


def named(*names: str) -> Callable[[Any], dict]:
    """Reads these attributes: an enum's name, dimensions as a list, numbers as they are."""

    def plain(value):
        return getattr(value, "name", list(value) if isinstance(value, trt.Dims) else value)

    return lambda layer: {name: plain(getattr(layer, name)) for name in names}


def _metadata(layer) -> dict:
    return json.loads(layer.metadata)


def _activation(layer) -> dict:
    clip = {"alpha": layer.alpha, "beta": layer.beta} if layer.type == trt.ActivationType.CLIP else {}
    return {"kind": layer.type.name, **clip}


def _permutation(order, rank: int) -> list[int] | None:
    order = list(order)[:rank]
    return None if order == list(range(rank)) else order


def _shuffle(layer) -> dict:
    static = layer.num_inputs == 1 and layer.reshape_dims
    rank_in, rank_out = len(layer.get_input(0).shape), len(layer.get_output(0).shape)
    return {
        "first_transpose": _permutation(layer.first_transpose, rank_in),
        "reshape_dims": list(static) if static else None,
        "second_transpose": _permutation(layer.second_transpose, rank_out),
        "zero_is_placeholder": layer.zero_is_placeholder,
    }


def _slice(layer) -> dict:
    dynamic = layer.num_inputs > 1
    axes = layer.axes
    return {
        "axes": list(axes) if axes is not None else list(range(len(layer.stride))),
        "start": None if dynamic else list(layer.start),
        "shape": None if dynamic else list(layer.shape),
        "stride": list(layer.stride),
        "mode": layer.mode.name,
    }


def _attention(layer) -> dict:
    """Its inputs are queries, keys, values and, if the probabilities are quantized, None (a mask) and their scale."""
    found = named("norm_op", "causal_kind")(layer.attention)
    if layer.attention.normalization_quantize_scale is not None:
        found["normalization_quantize_to_type"] = dtype_name(layer.attention.normalization_quantize_to_type)
    return found


def _quantization(layer) -> dict:
    """Axis -1: one scale for the whole tensor."""
    return {"axis": layer.axis, "to_type": dtype_name(layer.to_type)}


READERS: dict[str, tuple[str, Callable]] = {
    "ACTIVATION": ("IActivationLayer", _activation),
    "ATTENTION": ("IAttentionOutputLayer", _attention),
    "CAST": ("ICastLayer", lambda layer: {"to_type": dtype_name(layer.to_type)}),
    "CONCATENATION": ("IConcatenationLayer", named("axis")),
    "CONSTANT": ("IConstantLayer", _metadata),
    "CONVOLUTION": ("IConvolutionLayer", named("stride_nd", "padding_nd", "dilation_nd", "num_groups")),
    "DEQUANTIZE": ("IDequantizeLayer", _quantization),
    "DIST_COLLECTIVE": ("IDistCollectiveLayer", _metadata),
    "ELEMENTWISE": ("IElementWiseLayer", named("op")),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", named("op0", "op1")),
    "NORMALIZATION": ("INormalizationLayer", named("axes", "epsilon")),
    "QUANTIZE": ("IQuantizeLayer", _quantization),
    "REDUCE": ("IReduceLayer", named("op", "axes", "keep_dims")),
    "SELECT": ("ISelectLayer", named()),
    "SHAPE": ("IShapeLayer", named()),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "SOFTMAX": ("ISoftMaxLayer", named("axes")),
    "UNARY": ("IUnaryLayer", named("op")),
}
"""By layer type: the class to read it as, and a function that reads its attributes."""
