"""Graph passes: layers of a network that was read back, rewritten into fewer and cheaper ones.

Each pass takes the layers in order and returns the layers in order. Only values inside a rewritten group
disappear, and only rounding changes: a fused operator rounds once where several layers rounded one by one.
TensorRT does the same when it builds the plan. `NUMERICS` are needed on every device (diffusers calls these
fused operators in the first place); `SPEED` pays on a GPU, where weights are copied to the device anyway.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import accumulate, takewhile
from typing import Any

from .graph import Graph, Layer, Value

Layers = list[Layer]
Pass = Callable[[Layers], Layers]


@dataclass(frozen=True)
class Index:
    """Who makes each tensor and how often it is read."""

    made_by: dict[str, Layer]
    uses: Counter

    @classmethod
    def of(cls, layers: Layers) -> Index:
        uses = Counter(name for layer in layers for name in layer.inputs)
        return cls({layer.output.name: layer for layer in layers}, uses)

    def find(self, name: str | None, layer_type: str) -> Layer | None:
        """The layer that makes `name`, if it has this type."""
        layer = self.made_by.get(name)
        return layer if layer and layer.type == layer_type else None

    def parts(self, name: str, axis: int) -> tuple[str, ...]:
        """What is joined along `axis` into `name`; `name` alone if it is not joined."""
        joined = self.find(name, "CONCATENATION")
        return joined.inputs if joined and joined.attributes["axis"] == axis else (name,)

    def constant(self, *names: str | None) -> bool:
        """Whether all of these tensors are constants."""
        return all(self.find(name, "CONSTANT") for name in names)

    def number(self, name: str | None) -> float | None:
        """The value of a scalar constant."""
        values = constant.attributes.get("values", ()) if (constant := self.find(name, "CONSTANT")) else ()
        return values[0] if len(values) == 1 else None


@dataclass(frozen=True)
class Op:
    """A pattern: a layer of this type with these attributes.

    An input is a name for the tensor, or the `Op` that makes it and whose output nothing else reads.
    """

    type: str
    inputs: tuple[str | Op, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    def match(self, layer: Layer | None, index: Index) -> dict[str, str | None] | None:
        """The tensors by their names in the pattern; None if it does not match. One name is one tensor everywhere."""
        if not layer or layer.type != self.type or not self.attributes.items() <= layer.attributes.items():
            return None
        found: dict[str, str | None] = {}
        for wanted, tensor in zip(self.inputs, layer.inputs, strict=False):
            if isinstance(wanted, str):
                inner = {wanted: tensor}
            else:
                inner = wanted.match(index.made_by.get(tensor), index) if index.uses[tensor] == 1 else None
            if inner is None or any(found.get(name, t) != t for name, t in inner.items()):
                return None
            found |= inner
        return found


def total(a: str | Op, b: str | Op) -> Op:
    return Op("ELEMENTWISE", (a, b), {"op": "SUM"})


def product(a: str | Op, b: str | Op) -> Op:
    return Op("ELEMENTWISE", (a, b), {"op": "PROD"})


def fusion(*patterns: Op) -> Callable[[Callable[..., Layer | None]], Pass]:
    """The decorated function becomes a pass: it gets the last layer of a match of one of `patterns`, the index, and
    the tensors by their names in the pattern, and returns the layer that replaces the match, or None."""

    def decorate(fuse: Callable[..., Layer | None]) -> Pass:
        @wraps(fuse)
        def rewrite(layers: Layers) -> Layers:
            index = Index.of(layers)
            rewritten = []
            for layer in layers:
                tensors = next(filter(None, (pattern.match(layer, index) for pattern in patterns)), None)
                rewritten.append((fuse(layer, index, **tensors) if tensors else None) or layer)
            return without_unread(rewritten, layers)

        return rewrite

    return decorate


def fused(layer: Layer, layer_type: str, *inputs: str, **attributes) -> Layer:
    """A layer in the place of `layer`."""
    return replace(layer, type=layer_type, inputs=inputs, attributes=attributes)


def without_unread(layers: Layers, before: Layers) -> Layers:
    """Drop layers that lost their last reader; those that had none before (outputs) stay."""
    outputs = {layer.output.name for layer in before} - {name for layer in before for name in layer.inputs}
    kept, wanted = [], set(outputs)
    for layer in reversed(layers):
        if layer.output.name in wanted:
            kept.append(layer)
            wanted.update(layer.inputs)
    return kept[::-1]


# Numerics --------------------------------------------------------------------------------------------


@fusion(Op("DEQUANTIZE", ("weight", "scale"), {"axis": -1}))
def dequantized(layer: Layer, index: Index, weight: str, scale: str) -> Layer | None:
    """A dequantized constant -> CONSTANT: without FP8 tensor cores, weights are dequantized once."""
    if not index.constant(weight, scale):
        return None
    factors = [index.made_by[name].attributes for name in (weight, scale)]
    return fused(layer, "CONSTANT", product=factors, dtype=layer.output.dtype)


@fusion(total(Op("MATRIX_MULTIPLY", ("x", "weight"), {"op0": "NONE", "op1": "TRANSPOSE"}), "bias"))
def linear(layer: Layer, index: Index, x: str, weight: str, bias: str) -> Layer | None:
    """x weight^T + bias, both constants -> LINEAR."""
    return fused(layer, "LINEAR", x, weight, bias) if index.constant(weight, bias) else None


@fusion(product("x", Op("ACTIVATION", ("x",), {"kind": "SIGMOID"})))
def silu(layer: Layer, index: Index, x: str) -> Layer:
    """x * sigmoid(x) -> SILU."""
    return fused(layer, "SILU", x)


@fusion(Op("ATTENTION", (product("q", "scale"), "k", "v")))
def attention_scale(layer: Layer, index: Index, q: str, scale: str, k: str, v: str) -> Layer | None:
    """attention of queries that are multiplied by a number -> ATTENTION with that scale."""
    number = index.number(scale)
    attributes = layer.attributes | {"scale": number}
    return None if number is None else fused(layer, "ATTENTION", q, k, v, *layer.inputs[3:], **attributes)


# Speed -----------------------------------------------------------------------------------------------


@fusion(Op("ACTIVATION", (Op("LINEAR", ("x", "weight", "bias")),), {"kind": "GELU_TANH"}))
def linear_gelu(layer: Layer, index: Index, x: str, weight: str, bias: str) -> Layer:
    """LINEAR, then GELU -> LINEAR_GELU: the activation in the GEMM's epilogue."""
    return fused(layer, "LINEAR_GELU", x, weight, bias)


MEAN_SQUARE = Op("REDUCE", (product("x", "x"),), {"op": "AVG"})
ROOT = Op("UNARY", (total(MEAN_SQUARE, "eps"),), {"op": "SQRT"})
NORMALIZED = product("x", Op("UNARY", (ROOT,), {"op": "RECIP"}))


@fusion(product(NORMALIZED, "weight"), product(Op("CAST", (NORMALIZED,)), "weight"))
def rms_norm(layer: Layer, index: Index, x: str, eps: str, weight: str) -> Layer | None:
    """x / sqrt(mean(x^2) + eps) * weight -> RMS_NORM, which casts x and the quotient itself."""
    number = index.number(eps)
    if number is None or not index.constant(weight):
        return None
    if index.made_by[weight].output.shape[-1:] != layer.output.shape[-1:]:  # kernels do not broadcast it
        return None
    wide = index.find(x, "CAST") if index.find(layer.inputs[0], "CAST") else None
    return fused(layer, "RMS_NORM", wide.inputs[0] if wide else x, weight, eps=number)


@fusion(total(product("x", total("scale", "one")), "shift"))
def modulate(layer: Layer, index: Index, x: str, scale: str, one: str, shift: str) -> Layer | None:
    """x * (scale + 1) + shift -> MODULATE."""
    return fused(layer, "MODULATE", x, scale, shift) if index.number(one) == 1.0 else None


@fusion(total("x", product("gate", "y")))
def gated_sum(layer: Layer, index: Index, x: str, gate: str, y: str) -> Layer | None:
    """x + gate * y -> GATED_SUM."""
    constants = any(map(index.constant, (x, gate, y)))
    return None if constants else fused(layer, "GATED_SUM", x, gate, y)


def merge(
    layers: Layers, mergeable: Callable[[Layer], bool], together: Callable[[Layers], tuple[Layers, list[str]]]
) -> Layers:
    """Replace layers that have the same first input: `together` gives their replacement and the new outputs' names."""
    groups: dict[str, Layers] = {}
    for layer in filter(mergeable, layers):
        groups.setdefault(layer.inputs[0], []).append(layer)
    instead: dict[str, Layers] = {}
    renamed: dict[str | None, str] = {}
    for members in groups.values():
        if len(members) > 1:
            made, names = together(members)
            outputs = [member.output.name for member in members]
            instead |= {outputs[0]: made} | {name: [] for name in outputs[1:]}
            renamed |= zip(outputs, names, strict=True)
    result = [new for layer in layers for new in instead.get(layer.output.name, [layer])]
    result = [replace(layer, inputs=tuple(renamed.get(name, name) for name in layer.inputs)) for layer in result]
    return without_unread(result, layers)


def shared_silu(layers: Layers) -> Layers:
    """SILU layers with one input (of the conditioning vector, in every block) are computed once."""

    def together(members: Layers) -> tuple[Layers, list[str]]:
        name = f"{members[0].inputs[0]}/silu"
        shared = replace(members[0], name=name, output=replace(members[0].output, name=name))
        return [shared], [name] * len(members)

    return merge(layers, lambda layer: layer.type == "SILU", together)


def merged_linears(layers: Layers) -> Layers:
    """LINEAR or FP8_LINEAR layers with one input -> one of them with their weights stacked, and a slice for each.

    Q, K and V of a stream become one GEMM, and so do the modulations of all blocks.
    """
    index = Index.of(layers)

    def mergeable(layer: Layer) -> bool:
        sources = [index.made_by[n].attributes for n in layer.inputs[1:] if n] if layer.type in LINEARS else [{}]
        return all("weight" in source or "product" in source for source in sources) and layer.inputs[-1] is not None

    return merge(layers, mergeable, lambda members: _stacked(members, index))


def _stacked(members: Layers, index: Index) -> tuple[Layers, list[str]]:
    """The merged layer and its slices. Slices that several blocks read get names outside any block."""
    names = [member.output.name for member in members]
    across = len({block_of(n) for n in names}) > 1
    name = f"{_common_path(names) if across else names[0]}/merged"
    if across:
        names = [f"{name}:{i}" for i in range(len(members))]
    weights, biases = ([index.made_by[member.inputs[i]] for member in members] for i in (1, -1))
    stack = [_stack(weights, f"{name}.weight", -2), _stack(biases, f"{name}.bias", -1)]
    first, scales = members[0], ()
    if first.type == "FP8_LINEAR":
        stack, scales = _with_one_scale(stack, [index.made_by[member.inputs[3]] for member in members], first)
    widths = [bias.output.shape[-1] for bias in biases]
    shape = (*members[0].output.shape[:-1], sum(widths))
    weight, bias = (layer.output.name for layer in stack[:2])
    output = replace(first.output, name=name, shape=shape)
    merged = Layer(name, first.type, (first.inputs[0], weight, *scales, bias), output, first.attributes)
    layers = [*stack, merged]
    for member, part, width, end in zip(members, names, widths, accumulate(widths), strict=True):
        attributes = {"axes": [len(shape) - 1], "start": [end - width], "shape": [width], "stride": [1]}
        attributes |= {"mode": "STRICT_BOUNDS"}
        layers.append(Layer(part, "SLICE", (name, None, None), replace(member.output, name=part), attributes))
    return layers, names


LINEARS = ("LINEAR", "FP8_LINEAR")


def _with_one_scale(stack: Layers, scales: Layers, first: Layer) -> tuple[Layers, tuple[str, str]]:
    """Weights of different scales, powers of two, all in terms of the largest; the names of both scales."""
    weight, bias = stack
    sources = [scale.attributes for scale in scales]
    weight = replace(weight, attributes={**weight.attributes, "scales": sources})
    name = f"{weight.output.name}_scale"
    one = replace(scales[0], name=name, output=replace(scales[0].output, name=name), attributes={"largest": sources})
    return [weight, bias, one], (first.inputs[2], name)


def _stack(constants: Layers, name: str, dim: int) -> Layer:
    shape = list(constants[0].output.shape)
    shape[dim] = sum(constant.output.shape[dim] for constant in constants)
    output = Value(name, constants[0].output.dtype, tuple(shape))
    return Layer(name, "CONSTANT", (), output, {"stack": [c.attributes for c in constants], "dim": dim})


def _common_path(names: list[str]) -> str:
    """'blocks.0.attn' of 'blocks.0.attn.to_q' and 'blocks.0.attn.to_k'."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(group[0] for group in takewhile(lambda group: len(set(group)) == 1, parts))


def block_of(name: str) -> str | None:
    """'blocks.3' of 'blocks.3.attn.to_q'; None outside a list of blocks."""
    found = re.match(r"\w+\.\d+(?=\.|$)", name)
    return found and found[0]


def hoisted(layers: Layers) -> Layers:
    """What depends on no block comes first, so that each block is one run of layers."""
    late: set[str] = set()
    for layer in layers:
        if block_of(layer.output.name) or late.intersection(layer.inputs):
            late.add(layer.output.name)
    return sorted(layers, key=lambda layer: layer.output.name in late)


NUMERICS: tuple[Pass, ...] = (dequantized, linear, silu, attention_scale)
SPEED: tuple[Pass, ...] = (linear_gelu, rms_norm, modulate, gated_sum, shared_silu, merged_linears, hoisted)


def apply(graph: Graph, passes: tuple[Pass, ...]) -> Layers:
    layers = list(graph.layers)
    for one in passes:
        layers = one(layers)
    return layers
