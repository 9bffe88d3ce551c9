"""Graph passes for GPUs with FP8 tensor cores: Q/DQ around a linear layer becomes a GEMM in FP8.

`FP8_GEMMS` come before all other passes, `FP8_KERNELS` and `FP8_EPILOGUES` after them: the kernel or the GEMM that
computes an activation also rounds it, so that it is written to memory once, in one byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..config import FP8
from .attention import LARGEST_HEAD
from .graph import Layer
from .passes import Index, Layers, Op, Pass, fused, without_unread

ALIGNED = 16
"""Tensor cores need inner sizes that are multiples of this."""


def fp8_linear(layers: Layers) -> Layers:
    """dequantize(quantize(x)) dequantize(weight)^T (+ bias) -> FP8_LINEAR of quantize(x) and weight."""
    index, result = Index.of(layers), []
    for layer in layers:
        found = _with_bias(layer, index) or _product(layer, index)
        result += _gemm(layer, index, *found) if found else [layer]
    return without_unread(result, layers)


def _with_bias(layer: Layer, index: Index) -> tuple[str, str, str | None] | None:
    if layer.type != "ELEMENTWISE" or layer.attributes["op"] != "SUM" or not index.constant(layer.inputs[1]):
        return None
    product, bias = layer.inputs
    found = _product(index.made_by.get(product), index) if index.uses[product] == 1 else None
    return found and (*found[:2], bias)


def _product(layer: Layer | None, index: Index) -> tuple[str, str, None] | None:
    """The two dequantized inputs, if tensor cores can multiply them."""
    if not layer or layer.type != "MATRIX_MULTIPLY" or layer.attributes["op1"] != "TRANSPOSE":
        return None
    x, weight = (index.find(name, "DEQUANTIZE") for name in layer.inputs)
    if not x or not weight or {x.attributes["axis"], weight.attributes["axis"]} != {-1}:
        return None
    stored = index.find(weight.inputs[0], "CONSTANT")
    quantized = index.find(x.inputs[0], "QUANTIZE") and index.constant(x.inputs[1], weight.inputs[1])
    aligned = stored and all(size % ALIGNED == 0 for size in stored.output.shape[-2:])
    return (*layer.inputs, None) if quantized and aligned and layer.output.dtype != "float32" else None


def _gemm(layer: Layer, index: Index, x: str, weight: str, bias: str | None) -> Layers:
    inputs, scales = [], []
    for name in (x, weight):
        stored, scale = index.made_by[name].inputs
        inputs.append(stored)
        scales.append(_in_float32(index.made_by[scale], f"{layer.output.name}/{len(scales)}/scale"))
    names = (scale.output.name for scale in scales)
    return [*scales, fused(layer, "FP8_LINEAR", *inputs, *names, bias, to_type=layer.output.dtype)]


def _in_float32(scale: Layer, name: str) -> Layer:
    output = replace(scale.output, name=name, dtype="float32")
    return replace(scale, name=name, output=output, attributes={**scale.attributes, "dtype": "float32"})


ROUNDED = Op("DEQUANTIZE", (Op("QUANTIZE", ("x", "scale"), {"axis": -1}), "factor"), {"axis": -1})


def fp8_attention(layers: Layers) -> Layers:
    """ATTENTION in bfloat16 whose inputs and probabilities are rounded to FP8 -> FP8_ATTENTION of what is rounded.

    Its kernel has scale 1 for queries and keys, another for values, and rounds probabilities in its own way. It returns
    attention to the values without their mean, and the mean, which a SUM adds.
    """
    index, result = Index.of(layers), []
    for layer in layers:
        in_fp8 = layer.type == "ATTENTION" and layer.attributes.get("normalization_quantize_to_type") == FP8
        found = [ROUNDED.match(index.made_by.get(name), index) for name in layer.inputs[:3]] if in_fp8 else [None]
        size = layer.output.shape[-1] if layer.output.shape else 0
        if all(found) and layer.output.dtype == "bfloat16" and size % ALIGNED == 0 and size <= LARGEST_HEAD:
            q, k, v = found
            ones = [index.number(x) for x in (q["scale"], k["scale"], k["factor"])]
            scale = index.number(q["factor"])
            if ones == [1.0, 1.0, 1.0] and scale and v["scale"] == v["factor"] and index.constant(v["scale"]):
                result.append(_in_float32(index.made_by[v["scale"]], f"{layer.output.name}/value_scale"))
                result += _without_mean(layer, q["x"], k["x"], v["x"], result[-1].output.name, scale=scale)
                continue
        result.append(layer)
    return without_unread(result, layers)


def _without_mean(layer: Layer, *inputs: str, scale: float) -> Layers:
    """FP8_ATTENTION, an ITEM for each of its two results, and their SUM."""
    output, name = layer.output, layer.output.name
    both = fused(replace(layer, output=replace(output, name=f"{name}/both")), "FP8_ATTENTION", *inputs, scale=scale)
    items = [
        replace(both, type="ITEM", inputs=(both.output.name,), output=replace(output, name=f"{name}/{part}"),
                attributes={"index": i})
        for i, part in enumerate(("without_mean", "mean"))
    ]  # fmt: skip
    return [both, *items, fused(layer, "ELEMENTWISE", *(item.output.name for item in items), op="SUM")]


# Kernels ---------------------------------------------------------------------------------------------


def quantized_activations(layers: Layers) -> Layers:
    """QUANTIZE of the result of a norm or of GELU that nothing else reads -> one operator."""
    index, instead = Index.of(layers), {}
    for layer in layers:
        if layer.type == "QUANTIZE" and layer.attributes["axis"] == -1 and index.uses[layer.inputs[0]] == 1:
            for old, new in _fused(layer, index):
                instead[old] = new
    return without_unread([instead.get(layer.output.name, layer) for layer in layers], layers)


def _fused(layer: Layer, index: Index) -> Iterator[tuple[str, Layer]]:
    """Layers to replace: the name of a tensor, and what computes it instead."""
    made, scale = index.made_by.get(layer.inputs[0]), layer.inputs[1]
    if made is None:
        return
    if made.type == "NORM_MODULATE":
        yield layer.output.name, fused(layer, "NORM_MODULATE_FP8", *made.inputs, scale, **made.attributes)
    elif made.type == "ACTIVATION" and made.attributes["kind"] == "GELU_TANH":
        yield layer.output.name, fused(layer, "GELU_FP8", *made.inputs, scale)
    elif made.type == "ITEM" and made.attributes["index"] == 1:
        both = index.find(made.inputs[0], "GATED_NORM") or index.find(made.inputs[0], "REDUCED_GATED_NORM")
        if both:
            yield both.output.name, replace(both, type=f"{both.type}_FP8", inputs=(*both.inputs, scale))
            yield layer.output.name, fused(layer, "ITEM", both.output.name, index=1)


def mean_added_activations(layers: Layers) -> Layers:
    """QUANTIZE of merged heads to which their mean is added before -> ADD_MEAN_FP8."""
    index, instead = Index.of(layers), {}
    for layer in layers:
        quantize = layer.type == "QUANTIZE" and layer.attributes["axis"] == -1
        first = _first_of_merged_heads(layer.inputs[0], index) if quantize else None
        items = _items(index.made_by.get(first.inputs[0]), index) if first else None
        if items:
            without_mean, mean = items
            instead[first.output.name] = replace(first, inputs=(without_mean, *first.inputs[1:]))
            instead[layer.output.name] = fused(layer, "ADD_MEAN_FP8", *layer.inputs, mean)
    return without_unread([instead.get(layer.output.name, layer) for layer in layers], layers)


def _first_of_merged_heads(name: str, index: Index) -> Layer | None:
    """The first of the layers that make `name`: a SLICE of some tokens or none, a transpose, a reshape.

    From [B, heads, tokens, head_size] to [B, tokens, heads head_size]; nothing else may read what is between.
    """
    merged = index.find(name, "SHUFFLE")
    transposed = index.find(merged.inputs[0], "SHUFFLE") if merged else None
    if not transposed or len(merged.inputs) != 1 or len(transposed.inputs) != 1:
        return None
    shapes = [(x.attributes["first_transpose"], x.attributes["reshape_dims"]) for x in (transposed, merged)]
    if shapes != [([0, 2, 1, 3], None), (None, [0, 0, merged.output.shape[-1]])]:
        return None
    part = index.find(transposed.inputs[0], "SLICE")
    if part and (part.attributes["axes"], part.attributes["mode"]) != ([2], "STRICT_BOUNDS"):
        return None
    chain = [merged, transposed, *([part] if part else [])]
    return chain[-1] if all(index.uses[x.output.name] == 1 for x in chain) else None


def _items(total: Layer | None, index: Index) -> tuple[str, str] | None:
    """The two results of attention in FP8, if `total` is their SUM."""
    if not total or total.type != "ELEMENTWISE" or total.attributes["op"] != "SUM":
        return None
    items = [index.find(name, "ITEM") for name in total.inputs]
    if not all(items) or [item.attributes["index"] for item in items] != [0, 1] or items[0].inputs != items[1].inputs:
        return None
    attention = index.made_by[items[0].inputs[0]].type
    return total.inputs if attention in ("FP8_ATTENTION", "QKV_ATTENTION", "PROJECTED_ATTENTION") else None


def scales_first(layers: Layers) -> Layers:
    """Scales come first, so that an operator before the one that now reads a scale can read it."""
    return sorted(layers, key=lambda layer: not (layer.type == "CONSTANT" and layer.output.shape == ()))


LINEAR_GELU = Op("GELU_FP8", (Op("FP8_LINEAR", ("x", "weight", "x_scale", "weight_scale", "bias")), "scale"))


def fp8_linear_gelu(layers: Layers) -> Layers:
    """FP8_LINEAR with a bias, then GELU_FP8 -> FP8_LINEAR_GELU, which also has the inverse of the scale."""
    index, result = Index.of(layers), []
    for layer in layers:
        found = LINEAR_GELU.match(layer, index)
        if found and index.constant(found["bias"], found["scale"]):
            to_type = index.made_by[layer.inputs[0]].attributes["to_type"]
            scale, name = index.made_by[found["scale"]], f"{layer.output.name}/inverse"
            output = replace(scale.output, name=name, dtype="float32")
            result.append(replace(scale, name=name, output=output, attributes={"inverse": scale.attributes}))
            layer = fused(layer, "FP8_LINEAR_GELU", *found.values(), name, to_type=to_type)
        result.append(layer)
    return without_unread(result, layers)


FP8_GEMMS: tuple[Pass, ...] = (fp8_linear,)
FP8_KERNELS: tuple[Pass, ...] = (scales_first, quantized_activations, mean_added_activations)
FP8_EPILOGUES: tuple[Pass, ...] = (fp8_linear_gelu,)
FP8_ATTENTION: tuple[Pass, ...] = (fp8_attention,)
"""First of all, where FlashAttention-3 can run."""
