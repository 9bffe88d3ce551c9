"""Graph passes for multiple GPUs: collectives and their neighbors become `rank_kernels`.

They follow the passes of `kernel_passes.py`. TensorRT's plan keeps its collectives.
"""

from __future__ import annotations

from dataclasses import replace

from .graph import Layer
from .kernel_passes import merged_heads
from .passes import Index, Layers, Op, Pass, fused, fusion, total, without_unread


def collective(operation: str, x: str | Op) -> Op:
    return Op("DIST_COLLECTIVE", (x,), {"operation": operation})


def transposed(x: str | Op, *order: int) -> Op:
    return Op("SHUFFLE", (x,), {"first_transpose": list(order)})


def reshaped(x: str | Op) -> Op:
    return Op("SHUFFLE", (x,), {"first_transpose": None})


def rows(x: str | Op, axis: int) -> Op:
    """A slice of `axis` whose start and length are computed."""
    return Op("SLICE", (x, "start", "length"), {"axes": [axis]})


STREAM = Op("SLICE", (reshaped(Op("SLICE", ("everyone",), {"axes": [3]})), "start", "length"), {"axes": [2]})
GATHERED = transposed(collective("ALL_GATHER", reshaped("sent")), 1, 2, 0, 3, 4)
SCATTERED = transposed(collective("ALL_TO_ALL", transposed(reshaped("sent"), 1, 0, 2, 3, 4)), 1, 2, 0, 3, 4)


@fusion(Op("ATTENTION", ("q", "k", "v")))
def gathered_attention(layer: Layer, index: Index, q: str, k: str, v: str) -> Layer | None:
    """Attention of this rank's queries over gathered keys and values -> GATHERED_ATTENTION."""
    whole = _whole(index, k, v) if len(layer.inputs) == 3 else None
    found = whole and _exchanged(index, whole, GATHERED)
    if not found:
        return None
    (keys, values), lengths, group = found
    return _fused_attention("GATHERED_ATTENTION", layer, layer, index, (q, keys, values), lengths, group)


RETURNED = transposed(collective("ALL_TO_ALL", transposed("sent", 2, 0, 1, 3, 4)), 1, 0, 2, 3, 4)


@fusion(reshaped(RETURNED))
def ulysses_attention(layer: Layer, index: Index, sent: str) -> Layer | None:
    """Attention of this rank's heads over all tokens, between two all-to-alls -> ULYSSES_ATTENTION."""
    found = {_attention(name, index) for name in index.parts(sent, 3)}
    attention = index.find(found.pop(), "ATTENTION") if len(found) == 1 else None
    whole = attention and len(attention.inputs) == 3 and _whole(index, *attention.inputs)
    exchanged = whole and _exchanged(index, whole, SCATTERED)
    if not exchanged:
        return None
    qkv, lengths, group = exchanged
    return _fused_attention("ULYSSES_ATTENTION", layer, attention, index, qkv, lengths, group)


def _attention(piece: str, index: Index) -> str | None:
    """The attention of whose result `piece` is a stream's rows, padded and cut by rank."""
    found = reshaped(Op("SLICE", ("x",), {"axes": [2], "mode": "FILL"})).match(index.made_by.get(piece), index)
    if not found:
        return None
    cut = rows("x", 2).match(index.made_by.get(found["x"]), index)
    return cut["x"] if cut else found["x"]


def _whole(index: Index, *parts: str) -> str | None:
    """The tensor whose last dimension is cut into `parts`, in this order."""
    found = [index.find(name, "SLICE") for name in parts]
    if not all(layer and layer.attributes["axes"] == [3] and layer.attributes["start"] for layer in found):
        return None
    whole, width = found[0].inputs[0], found[0].attributes["shape"][0]
    cuts = [(layer.inputs[0], layer.attributes["start"][0], layer.attributes["shape"][0]) for layer in found]
    complete = index.made_by[whole].output.shape[-1] == width * len(found)
    return whole if complete and cuts == [(whole, i * width, width) for i in range(len(found))] else None


def _exchanged(index: Index, whole: str, received: Op) -> tuple[tuple[str, ...], tuple[str, ...], list[int]] | None:
    """What was sent, concatenated in the last dimension; the streams' lengths; and the group."""
    streams = [STREAM.match(index.made_by.get(name), index) for name in index.parts(whole, 2)]
    if not all(streams) or len({stream["everyone"] for stream in streams}) > 1:
        return None
    everyone = index.made_by[streams[0]["everyone"]]
    found = received.match(everyone, index) or (received is GATHERED and _copies(everyone, index))
    if not found:
        return None
    group = index.made_by[everyone.inputs[0]].attributes["group"]
    return index.parts(found["sent"], 3), tuple(stream["length"] for stream in streams), group


def _copies(everyone: Layer, index: Index) -> dict | None:
    """Among a subset of the ranks, an all-gather is expressed as an all-to-all of copies."""
    found = transposed(collective("ALL_TO_ALL", "copies"), 1, 2, 0, 3, 4).match(everyone, index)
    parts = set(index.parts(found["copies"], 0)) if found else ()
    return reshaped("sent").match(index.made_by.get(*parts), index) if len(parts) == 1 else None


def _fused_attention(kind: str, layer: Layer, attention: Layer, index: Index, qkv, lengths, group) -> Layer | None:
    found = merged_heads(qkv, attention, index)
    if found is None or len(found[0]) != len(lengths):
        return None
    streams, options = found
    inputs = [name for stream, length in zip(streams, lengths, strict=True) for name in (*stream, length)]
    return fused(layer, kind, *inputs, **options, group=group)


PRODUCT = Op("MATRIX_MULTIPLY", ("h", "weight"), {"op1": "TRANSPOSE"})
FP8_PRODUCT = Op("FP8_LINEAR", ("h", "weight", "x_scale", "weight_scale", "bias of one rank"))


def reduced_gates(layers: Layers) -> Layers:
    """A row-parallel linear layer, then GATED_SUM or GATED_NORM -> REDUCED_GATED_SUM or REDUCED_GATED_NORM."""
    index, result = Index.of(layers), []
    for layer in layers:
        y = layer.inputs[2] if layer.type in ("GATED_SUM", "GATED_NORM") else None
        found = _row_parallel(y, index) if index.uses[y] == 1 else None
        if found:
            linear, attributes = found
            x, gate, _, *norm = layer.inputs
            attributes |= {**layer.attributes, "inputs": len(linear)} if norm else layer.attributes
            layer = fused(layer, f"REDUCED_{layer.type}", x, gate, *linear, *norm, **attributes)
        result.append(layer)
    return without_unread(result, layers)


def _row_parallel(y: str, index: Index) -> tuple[list[str], dict] | None:
    """The inputs of the linear layer whose sum over the ranks, plus bias, is y; its group and dtype."""
    patterns = [total(collective("ALL_REDUCE", part), "bias") for part in (PRODUCT, FP8_PRODUCT)]
    found = next(filter(None, (pattern.match(index.made_by.get(y), index) for pattern in patterns)), None)
    if not found or found.pop("bias of one rank", None) or not index.constant(found["weight"], found["bias"]):
        return None
    reduced = index.made_by[index.made_by[y].inputs[0]]
    to_type = index.made_by[reduced.inputs[0]].attributes.get("to_type")
    return list(found.values()), {"group": reduced.attributes["group"], "to_type": to_type}


def first_exchanges(layers: Layers) -> Layers:
    """Mark the first of these operators in each group, where the ranks wait for each other."""
    seen, result = set(), []
    for layer in layers:
        if layer.type != "DIST_COLLECTIVE" and (group := tuple(layer.attributes.get("group", ()))):
            layer = replace(layer, attributes={**layer.attributes, "first": group not in seen})
            seen.add(group)
        result.append(layer)
    return result


RANKS: tuple[Pass, ...] = (gathered_attention, ulysses_attention, reduced_gates, first_exchanges)
