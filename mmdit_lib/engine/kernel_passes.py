"""Graph passes for GPUs: the operations between GEMMs and attention become operators of `kernels.py`.

They follow the passes of `passes.py`, whose operators they merge further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from .graph import Layer, Value
from .passes import LINEARS, Index, Layers, Op, Pass, fused, fusion, without_unread


@fusion(Op("MODULATE", ("x", "scale", "shift")))
def norm_modulate(layer: Layer, index: Index, x: str, scale: str, shift: str) -> Layer | None:
    """NORMALIZATION without weights, then MODULATE -> NORM_MODULATE."""
    norm = index.find(x, "NORMALIZATION")
    if norm is None or [index.number(name) for name in norm.inputs[1:]] != [1.0, 0.0]:
        return None
    return fused(layer, "NORM_MODULATE", norm.inputs[0], scale, shift, eps=norm.attributes["epsilon"])


def gated_norm(layers: Layers) -> Layers:
    """GATED_SUM, then NORM_MODULATE as its first reader -> GATED_NORM, and an ITEM for each of its two results."""
    first_reader: dict[str, Layer] = {}
    for layer in layers:
        for name in layer.inputs:
            first_reader.setdefault(name, layer)
    pairs = {}
    for layer in layers:
        reader = first_reader.get(layer.output.name) if layer.type == "GATED_SUM" else None
        if reader and reader.type == "NORM_MODULATE" and reader.inputs[0] == layer.output.name:
            pairs[reader.output.name] = layer
    replaced = {gate.output.name for gate in pairs.values()}
    result: Layers = []
    for layer in layers:
        gate = pairs.get(layer.output.name)
        if gate:
            result += _both(gate, layer)
        elif layer.output.name not in replaced:
            result.append(layer)
    return result


def _both(gate: Layer, norm: Layer) -> Layers:
    output = replace(norm.output, name=f"{norm.output.name}/both", shape=(2, *norm.output.shape))
    both = Layer(output.name, "GATED_NORM", (*gate.inputs, *norm.inputs[1:]), output, norm.attributes)
    selects = [
        replace(layer, type="ITEM", inputs=(output.name,), attributes={"index": i})
        for i, layer in enumerate((gate, norm))
    ]
    return [both, *selects]


class Head(NamedTuple):
    """Where the queries, keys or values of one stream come from: a slice of a merged LINEAR, maybe with a norm."""

    merged: str
    start: int
    width: int
    heads: int
    weight: str | None
    eps: float | None


@fusion(Op("ATTENTION", ("q", "k", "v")), Op("FP8_ATTENTION", ("q", "k", "v")))
def qkv_attention(layer: Layer, index: Index, q: str, k: str, v: str) -> Layer | None:
    """Queries, keys and values sliced from merged LINEAR layers, normalized, joined over streams -> QKV_ATTENTION.

    After the streams it has the scale of the values, if attention is in FP8.
    """
    found = merged_heads((q, k, v), layer, index) if len(layer.inputs) == WITH_SCALE[layer.type] else None
    if found is None:
        return None
    streams, options = found
    return fused(layer, "QKV_ATTENTION", *(name for stream in streams for name in stream), *layer.inputs[3:], **options)


WITH_SCALE = {"ATTENTION": 3, "FP8_ATTENTION": 4}
"""Number of inputs; an ATTENTION that rounds its probabilities has more."""


def merged_heads(qkv: Sequence[str], attention: Layer, index: Index) -> tuple[list[tuple], dict] | None:
    """The inputs of each stream and the options of a `kernels.qkv_attention` of these queries, keys and values."""
    found = [[_head(name, index) for name in index.parts(joined, 2)] for joined in qkv]
    if any(head is None for heads in found for head in heads) or len({len(heads) for heads in found}) > 1:
        return None
    streams = list(zip(*found, strict=True))
    eps = {head.eps for heads in found for head in heads if head.eps is not None}
    heads = {head.heads for heads in found for head in heads}
    if len(eps) > 1 or len(heads) > 1 or not all(_is_whole(*stream, index) for stream in streams):
        return None
    scale = attention.attributes.get("scale", 1.0)
    options = {"heads": heads.pop(), "eps": eps.pop() if eps else 0.0, "scale": scale}
    return [(q.merged, q.weight, k.weight) for q, k, _ in streams], options


PART = Op("SLICE", ("merged",), {"axes": [2]})
SPLIT = Op("SHUFFLE", (PART,), {"first_transpose": None})
TRANSPOSED = Op("SHUFFLE", (SPLIT,), {"first_transpose": [0, 2, 1, 3], "reshape_dims": None})


def _head(name: str, index: Index) -> Head | None:
    norm = index.find(name, "RMS_NORM")
    transposed = index.made_by.get(norm.inputs[0] if norm else name)
    if not TRANSPOSED.match(transposed, index):
        return None
    split = index.made_by[transposed.inputs[0]]
    part = index.made_by[split.inputs[0]]
    if len(split.attributes["reshape_dims"] or ()) != 4 or index.made_by[part.inputs[0]].type not in LINEARS:
        return None
    weight, eps = (norm.inputs[1], norm.attributes["eps"]) if norm else (None, None)
    heads, width = split.attributes["reshape_dims"][2], part.attributes["shape"][0]
    return Head(part.inputs[0], part.attributes["start"][0], width, heads, weight, eps)


def _is_whole(q: Head, k: Head, v: Head, index: Index) -> bool:
    """Whether the three are a merged linear layer's thirds, with a norm on both queries and keys or on neither."""
    width = q.width
    layout = [(q.merged, i * width, width) for i in range(3)]
    whole = index.made_by[q.merged].output.shape[-1] == 3 * width
    norms = v.weight is None and (q.weight is None) == (k.weight is None)
    return whole and norms and [head[:3] for head in (q, k, v)] == layout


def projected_attention(layers: Layers) -> Layers:
    """QKV_ATTENTION and the linear layers that only it reads -> PROJECTED_ATTENTION.

    The linear layers must be of one kind, and either all streams have norms or none has.
    """
    index, result = Index.of(layers), []
    for layer in layers:
        count = len(layer.inputs) // 3 if layer.type == "QKV_ATTENTION" else 0
        merged = [index.made_by[name] for name in layer.inputs[: 3 * count : 3]]
        kinds = {(x.type, len(x.inputs), x.attributes.get("to_type")) for x in merged}
        alone = all(x.type in LINEARS and index.uses[x.output.name] == 1 for x in merged)
        normed = {name is not None for name in layer.inputs[1 : 3 * count : 3]}
        if 0 < len(merged) <= 2 and alone and len(kinds) == len(normed) == 1:
            streams = [(*x.inputs, *layer.inputs[3 * i + 1 : 3 * i + 3]) for i, x in enumerate(merged)]
            attributes = {**layer.attributes, **merged[0].attributes, "inputs": len(merged[0].inputs)}
            inputs = (*(name for stream in streams for name in stream), *layer.inputs[3 * count :])
            layer = fused(layer, "PROJECTED_ATTENTION", *inputs, **attributes)
        result.append(layer)
    return without_unread(result, layers)


def two_gates(layers: Layers) -> Layers:
    """GATED_NORM of a GATED_SUM that nothing else reads -> GATED_NORM with both branches: dual attention's sums."""
    index, result = Index.of(layers), []
    for layer in layers:
        first = index.find(layer.inputs[0], "GATED_SUM") if layer.type == "GATED_NORM" else None
        if first and len(layer.inputs) == 5 and index.uses[first.output.name] == 1:
            x, *earlier = first.inputs
            layer = replace(layer, inputs=(x, *layer.inputs[1:], *earlier))
        result.append(layer)
    return without_unread(result, layers)


class Row(NamedTuple):
    """`width` values of each image, [B, 1, width], from a tensor [B, W]."""

    source: str
    start: int
    width: int


def unbind(layers: Layers) -> Layers:
    """Rows of one tensor, all of one width -> UNBIND of the tensor, and an ITEM in place of two slices and a view.

    These are the shifts, scales and gates of all blocks, several hundred. Nothing is computed either way, but without
    a CUDA graph every view costs the CPU a few microseconds in each step.
    """
    index = Index.of(layers)
    rows = {layer.output.name: row for layer in layers if (row := _row(layer, index))}
    unbound: dict[str, Layer] = {}
    for source in {row.source for row in rows.values()}:
        found, output = [row for row in rows.values() if row.source == source], index.made_by[source].output
        width, name = found[0].width, f"{source}/rows"
        borders = [*(row.start for row in found), output.shape[-1]]
        if {row.width for row in found} == {width} and not any(border % width for border in borders):
            shape = (output.shape[-1] // width, output.shape[0], 1, width)
            unbound[source] = Layer(name, "UNBIND", (source,), Value(name, output.dtype, shape), {"width": width})
    result: Layers = []
    for layer in layers:
        row = rows.get(layer.output.name)
        if row and row.source in unbound:
            layer = fused(layer, "ITEM", unbound[row.source].output.name, index=row.start // row.width)
        result.append(layer)
        if layer.output.name in unbound:
            result.append(unbound[layer.output.name])
    return without_unread(result, layers)


def _row(layer: Layer, index: Index) -> Row | None:
    """A slice of a view of a slice, where the view splits the last dimension into rows."""
    split = index.find(layer.inputs[0], "SHUFFLE") if layer.type == "SLICE" else None
    part = index.find(split.inputs[0], "SLICE") if split and not split.attributes["first_transpose"] else None
    if not part or any(layer.inputs[1:]) or any(part.inputs[1:]):  # computed starts
        return None
    if len(part.output.shape) != 2 or part.inputs[0] not in index.made_by:  # tokens, or an input of the network
        return None
    width, wide = layer.output.shape[-1], part.output.shape[-1]
    slices = [(x.attributes["axes"], x.attributes["mode"]) for x in (layer, part)]
    rows = split.attributes["reshape_dims"]
    if slices != [([1], "STRICT_BOUNDS")] * 2 or layer.attributes["shape"] != [1] or rows != [0, wide // width, width]:
        return None
    return Row(part.inputs[0], part.attributes["start"][0] + layer.attributes["start"][0] * width, width)


KERNELS: tuple[Pass, ...] = (norm_modulate, gated_norm, qkv_attention, projected_attention, unbind)
SUMS: tuple[Pass, ...] = (two_gates,)
"""After the passes for multiple GPUs, which merge single sums with collectives."""
