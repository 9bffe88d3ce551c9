"""Graph passes: layers of a network that was read back, rewritten into fewer and cheaper ones.

Each pass takes the layers in order and returns the layers in order. Only values inside a rewritten group
disappear, and only rounding changes: a fused operator rounds once where several layers rounded one by one.
TensorRT does the same when it builds the plan. `numerics` are needed on every device (diffusers calls these
fused operators in the first place); `speed` pays on a GPU, where weights are copied to the device anyway.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile

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

    def find(self, name: str | None, layer_type: str, /, **attributes) -> Layer | None:
        """The layer that makes `name`, if it has this type and these attributes."""
        layer = self.made_by.get(name)
        if layer is None or layer.type != layer_type:
            return None
        return layer if all(layer.attributes.get(key) == wanted for key, wanted in attributes.items()) else None

    def inner(self, name: str | None, layer_type: str, /, **attributes) -> Layer | None:
        """As `find`, if nothing else reads the tensor."""
        return self.find(name, layer_type, **attributes) if self.uses[name] == 1 else None

    def number(self, name: str | None) -> float | None:
        """The value of a scalar constant."""
        values = constant.attributes.get("values", ()) if (constant := self.find(name, "CONSTANT")) else ()
        return values[0] if len(values) == 1 else None


def rewrite(layers: Layers, match: Callable[[Layer, Index], Layer | None]) -> Layers:
    """Replace each layer that `match` recognizes as the last of a group, and drop what nothing reads any more."""
    index = Index.of(layers)
    return without_unread([match(layer, index) or layer for layer in layers], layers)


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


def linear(layers: Layers) -> Layers:
    """matmul by a transposed constant, plus a constant bias -> LINEAR."""

    def match(layer: Layer, index: Index) -> Layer | None:
        if layer.type != "ELEMENTWISE" or layer.attributes["op"] != "SUM":
            return None
        product = index.inner(layer.inputs[0], "MATRIX_MULTIPLY", op0="NONE", op1="TRANSPOSE")
        if not (product and index.find(product.inputs[1], "CONSTANT") and index.find(layer.inputs[1], "CONSTANT")):
            return None
        return replace(layer, type="LINEAR", inputs=(*product.inputs, layer.inputs[1]), attributes={})

    return rewrite(layers, match)


def silu(layers: Layers) -> Layers:
    """x * sigmoid(x) -> SILU."""

    def match(layer: Layer, index: Index) -> Layer | None:
        if layer.type != "ELEMENTWISE" or layer.attributes["op"] != "PROD":
            return None
        x, gate = layer.inputs
        sigmoid = index.find(gate, "ACTIVATION", kind="SIGMOID")
        if not (sigmoid and sigmoid.inputs == (x,)):
            return None
        return replace(layer, type="SILU", inputs=(x,), attributes={})

    return rewrite(layers, match)


def attention_scale(layers: Layers) -> Layers:
    """attention of queries that are multiplied by a number -> ATTENTION with that scale."""

    def match(layer: Layer, index: Index) -> Layer | None:
        product = index.find(layer.inputs[0], "ELEMENTWISE", op="PROD") if layer.type == "ATTENTION" else None
        scale = index.number(product.inputs[1]) if product else None
        if scale is None:
            return None
        attributes = layer.attributes | {"scale": scale}
        return replace(layer, inputs=(product.inputs[0], *layer.inputs[1:]), attributes=attributes)

    return rewrite(layers, match)


# Speed -----------------------------------------------------------------------------------------------


def linear_gelu(layers: Layers) -> Layers:
    """LINEAR, then GELU -> LINEAR_GELU: the activation in the GEMM's epilogue."""

    def match(layer: Layer, index: Index) -> Layer | None:
        if layer.type != "ACTIVATION" or layer.attributes["kind"] != "GELU_TANH":
            return None
        inner = index.inner(layer.inputs[0], "LINEAR")
        return replace(layer, type="LINEAR_GELU", inputs=inner.inputs, attributes={}) if inner else None

    return rewrite(layers, match)


def rms_norm(layers: Layers) -> Layers:
    """x / sqrt(mean(x^2) + eps) * weight -> RMS_NORM."""

    def match(layer: Layer, index: Index) -> Layer | None:
        if layer.type != "ELEMENTWISE" or layer.attributes["op"] != "PROD":
            return None
        if not index.find(layer.inputs[1], "CONSTANT"):
            return None
        narrow = index.inner(layer.inputs[0], "CAST")
        quotient = index.inner(narrow.inputs[0] if narrow else layer.inputs[0], "ELEMENTWISE", op="PROD")
        reciprocal = index.inner(quotient.inputs[1], "UNARY", op="RECIP") if quotient else None
        root = index.inner(reciprocal.inputs[0], "UNARY", op="SQRT") if reciprocal else None
        total = index.inner(root.inputs[0], "ELEMENTWISE", op="SUM") if root else None
        mean = index.inner(total.inputs[0], "REDUCE", op="AVG") if total else None
        square = index.inner(mean.inputs[0], "ELEMENTWISE", op="PROD") if mean else None
        eps = index.number(total.inputs[1]) if total else None
        if square is None or eps is None or square.inputs != (quotient.inputs[0],) * 2:
            return None
        wide = index.find(quotient.inputs[0], "CAST")
        x = wide.inputs[0] if wide and narrow else quotient.inputs[0]
        return replace(layer, type="RMS_NORM", inputs=(x, layer.inputs[1]), attributes={"eps": eps})

    return rewrite(layers, match)


def modulate(layers: Layers) -> Layers:
    """x * (scale + 1) + shift -> MODULATE."""

    def match(layer: Layer, index: Index) -> Layer | None:
        if layer.type != "ELEMENTWISE" or layer.attributes["op"] != "SUM":
            return None
        product = index.inner(layer.inputs[0], "ELEMENTWISE", op="PROD")
        scale = index.inner(product.inputs[1], "ELEMENTWISE", op="SUM") if product else None
        if scale is None or index.number(scale.inputs[1]) != 1.0:
            return None
        inputs = (product.inputs[0], scale.inputs[0], layer.inputs[1])
        return replace(layer, type="MODULATE", inputs=inputs, attributes={})

    return rewrite(layers, match)


def gated_sum(layers: Layers) -> Layers:
    """x + gate * y -> GATED_SUM."""

    def match(layer: Layer, index: Index) -> Layer | None:
        if layer.type != "ELEMENTWISE" or layer.attributes["op"] != "SUM":
            return None
        product = index.inner(layer.inputs[1], "ELEMENTWISE", op="PROD")
        if product is None or any(index.find(name, "CONSTANT") for name in (*product.inputs, layer.inputs[0])):
            return None
        return replace(layer, type="GATED_SUM", inputs=(layer.inputs[0], *product.inputs), attributes={})

    return rewrite(layers, match)


def shared_silu(layers: Layers) -> Layers:
    """SILU layers with one input (of the conditioning vector, in every block) are computed once."""
    readers = Counter(layer.inputs[0] for layer in layers if layer.type == "SILU")
    shared: dict[str, str] = {}
    renamed: dict[str, str] = {}
    kept = []
    for layer in layers:
        layer = replace(layer, inputs=tuple(renamed.get(name, name) for name in layer.inputs))
        if layer.type == "SILU" and readers[layer.inputs[0]] > 1:
            name = f"{layer.inputs[0]}/silu"
            renamed[layer.output.name] = name
            if layer.inputs[0] in shared:
                continue
            shared[layer.inputs[0]] = name
            layer = replace(layer, name=name, output=replace(layer.output, name=name))
        kept.append(layer)
    return kept


def merged_linears(layers: Layers) -> Layers:
    """LINEAR layers with one input -> one LINEAR with their weights stacked, and a slice for each.

    Q, K and V of a stream become one GEMM, and so do the modulations of all blocks.
    """
    index = Index.of(layers)
    groups: dict[str, Layers] = {}
    for layer in layers:
        if layer.type == "LINEAR" and all("weight" in index.made_by[n].attributes for n in layer.inputs[1:]):
            groups.setdefault(layer.inputs[0], []).append(layer)
    merged: dict[str, Layers] = {}
    renamed: dict[str, str] = {}
    for members in groups.values():
        if len(members) > 1:
            merged |= {member.output.name: [] for member in members}
            merged[members[0].output.name] = _stacked(members, index, renamed)
    result: Layers = []
    for layer in layers:
        layer = replace(layer, inputs=tuple(renamed.get(name, name) for name in layer.inputs))
        result += merged.get(layer.output.name, [layer])
    return without_unread(result, layers)


def _stacked(members: Layers, index: Index, renamed: dict[str, str]) -> Layers:
    """The merged layer and its slices. Slices that several blocks read get names outside any block."""
    names = [member.output.name for member in members]
    name = f"{_common_path(names)}/merged"
    across = len({block_of(n) for n in names}) > 1
    weights, biases = ([index.made_by[member.inputs[i]] for member in members] for i in (1, 2))
    stack = [_stack(weights, f"{name}.weight", -2), _stack(biases, f"{name}.bias", -1)]
    widths = [bias.output.shape[-1] for bias in biases]
    shape = (*members[0].output.shape[:-1], sum(widths))
    inputs = (members[0].inputs[0], *(layer.output.name for layer in stack))
    layers = [*stack, Layer(name, "LINEAR", inputs, replace(members[0].output, name=name, shape=shape))]
    for i, (member, width, end) in enumerate(zip(members, widths, accumulate(widths), strict=True)):
        output = replace(member.output, name=f"{name}:{i}") if across else member.output
        renamed[member.output.name] = output.name
        attributes = {"axes": [len(shape) - 1], "start": [end - width], "shape": [width], "stride": [1]}
        slice_ = Layer(output.name, "SLICE", (name, None, None), output, attributes | {"mode": "STRICT_BOUNDS"})
        layers.append(slice_)
    return layers


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


NUMERICS: tuple[Pass, ...] = (linear, silu, attention_scale)
SPEED: tuple[Pass, ...] = (linear_gelu, rms_norm, modulate, gated_sum, shared_silu, merged_linears, hoisted)


def apply(graph: Graph, passes: tuple[Pass, ...]) -> Layers:
    layers = list(graph.layers)
    for one in passes:
        layers = one(layers)
    return layers
