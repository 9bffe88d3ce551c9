"""Operators: one short function each that adds TensorRT layers and returns a `Tensor`.

Static sizes are `int`, dynamic ones int64 tensors of shape [1]; arithmetic works on both. Every operator
has a counterpart in `engine/torch_ops.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..config import FP8
from .network import Tensor
from .trt import trt, trt_dtype

Size = int | Tensor
"""A dimension's size or offset: a number, or an int64 tensor of shape [1]."""


def cast(x: Tensor, dtype: str) -> Tensor:
    if x.dtype == dtype:
        return x
    return x.network.add(x.network.definition.add_cast(x.itensor, trt_dtype(dtype)), "cast")


def quantize(x: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """x / scale in FP8: clipped to [-448, 448] and rounded to the nearest value, ties to even.

    `scale` is a constant of x's dtype: a scalar or, along `axis`, one number for each index.
    """
    layer = x.network.definition.add_quantize(x.itensor, scale.itensor, trt_dtype(FP8))
    if axis is not None:
        layer.axis = axis
    return x.network.add(layer, "quantize")


def dequantize(x: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """x * scale in the dtype of `scale`, which is as in `quantize`."""
    layer = x.network.definition.add_dequantize(x.itensor, scale.itensor, scale.itensor.dtype)
    if axis is not None:
        layer.axis = axis
    return x.network.add(layer, "dequantize")


def round_to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x rounded to FP8, in its own dtype again."""
    return dequantize(quantize(x, scale), scale)


def activation(x: Tensor, kind: str) -> Tensor:
    layer = x.network.definition.add_activation(x.itensor, getattr(trt.ActivationType, kind))
    return x.network.add(layer, kind.lower())


def gelu_tanh(x: Tensor) -> Tensor:
    return activation(x, "GELU_TANH")


def silu(x: Tensor) -> Tensor:
    return x * activation(x, "SIGMOID")


def clip(x: Tensor, low: float, high: float) -> Tensor:
    layer = x.network.definition.add_activation(x.itensor, trt.ActivationType.CLIP)
    layer.alpha, layer.beta = low, high
    return x.network.add(layer, "clip")


def unary(x: Tensor, kind: str) -> Tensor:
    layer = x.network.definition.add_unary(x.itensor, getattr(trt.UnaryOperation, kind))
    return x.network.add(layer, kind.lower())


def mean(x: Tensor, dim: int) -> Tensor:
    """Mean over `dim`, which is kept as size 1."""
    layer = x.network.definition.add_reduce(x.itensor, trt.ReduceOperation.AVG, 1 << dim, True)
    return x.network.add(layer, "mean")


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension, without weight and bias."""
    last = len(x.shape) - 1
    shape = (1,) * last + (x.shape[-1],)
    one, zero = x.network.values([1.0], x.dtype, shape), x.network.values([0.0], x.dtype, shape)
    definition = x.network.definition
    # The two differ for groups of channels only.
    add = definition.add_normalization_v2 if x.network.features.normalization_v2 else definition.add_normalization
    layer = add(x.itensor, one.itensor, zero.itensor, 1 << last)
    layer.epsilon = eps
    return x.network.add(layer, "layer_norm")


def matmul(a: Tensor, b: Tensor, transpose_b: bool = False) -> Tensor:
    op_b = trt.MatrixOperation.TRANSPOSE if transpose_b else trt.MatrixOperation.NONE
    layer = a.network.definition.add_matrix_multiply(a.itensor, trt.MatrixOperation.NONE, b.itensor, op_b)
    return a.network.add(layer, "matmul")


def softmax(x: Tensor, dim: int) -> Tensor:
    layer = x.network.definition.add_softmax(x.itensor)
    layer.axes = 1 << dim
    return x.network.add(layer, "softmax")


def conv2d(x: Tensor, kernel: Tensor, bias: Tensor, stride: int) -> Tensor:
    """kernel [out, in, size, size] and bias [out] are constants of the network."""
    out, _, *size = kernel.shape
    layer = x.network.definition.add_convolution_nd(x.itensor, out, tuple(size), trt.Weights(), trt.Weights())
    layer.set_input(1, kernel.itensor)
    layer.set_input(2, bias.itensor)
    layer.stride_nd = (stride, stride)
    return x.network.add(layer, "conv2d")


PROBABILITY_SCALE = 2.0**-8
"""Of attention's probabilities in FP8: they are at most 1, which becomes 256 of 448."""


def attention(q: Tensor, k: Tensor, v: Tensor, value_scale: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over [batch, heads, tokens, d]; TensorRT's layer itself does not scale.

    Without the layer (TensorRT 10), unless TensorRT fuses the three steps, the scores [batch, heads, queries, keys]
    exist in memory, and are rounded to the network's dtype.

    Args:
        value_scale: that of v in FP8, a scalar of v's dtype. Then q, k (both with scale 1), v and the probabilities are
            rounded to FP8. None: nothing is.
    """
    network, scale, fp8 = q.network, q.shape[-1] ** -0.5, value_scale is not None
    if fp8:
        one, of_probabilities, scale = (network.values([x], q.dtype, ()) for x in (1.0, PROBABILITY_SCALE, scale))
        q, k, v = dequantize(quantize(q, one), scale), round_to_fp8(k, one), round_to_fp8(v, value_scale)
    else:
        q = q * scale
    if not network.features.attention:
        probabilities = softmax(matmul(q, k, transpose_b=True), 3)
        return matmul(round_to_fp8(probabilities, of_probabilities) if fp8 else probabilities, v)
    layer = network.definition.add_attention_v2(
        q.itensor, k.itensor, v.itensor, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
    )
    if fp8:
        layer.normalization_quantize_scale = of_probabilities.itensor
        layer.normalization_quantize_to_type = trt_dtype(FP8)
    # If no fused kernel fits (float32, odd head sizes), TensorRT may use several kernels.
    layer.decomposable = True
    return network.add(layer, "attention")


def size(x: Tensor, dim: int) -> Size:
    """The size of a dimension: an int if it is static."""
    if x.shape[dim] != -1:
        return x.shape[dim]
    sizes = x.network.add(x.network.definition.add_shape(x.itensor), "shape")
    layer = x.network.definition.add_slice(sizes.itensor, (dim % len(x.shape),), (1,), (1,))
    return x.network.add(layer, "size")


def ceil_div(a: Size, b: int) -> Size:
    return (a + (b - 1)) // b


def _vector(network, sizes: Sequence[Size]) -> Tensor:
    """Sizes as one int64 tensor."""
    parts = [x if isinstance(x, Tensor) else network.values([x], "int64", (1,)) for x in sizes]
    return parts[0] if len(parts) == 1 else concat(parts, 0)


def reshape(x: Tensor, shape: Sequence[Size]) -> Tensor:
    """In `shape`, 0 copies the input's size at that position, and one -1 is inferred."""
    static = all(isinstance(s, int) for s in shape)
    target = tuple(shape) if static else _vector(x.network, shape).itensor
    layer = x.network.definition.add_shuffle(x.itensor)
    if static:
        layer.reshape_dims = target
    else:
        layer.set_input(1, target)
    return x.network.add(layer, "reshape")


def select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the bool `condition` is true, otherwise b; the three broadcast."""
    layer = a.network.definition.add_select(condition.itensor, a.itensor, b.itensor)
    return a.network.add(layer, "select")


def transpose(x: Tensor, *order: int) -> Tensor:
    layer = x.network.definition.add_shuffle(x.itensor)
    layer.first_transpose = trt.Permutation(order)
    return x.network.add(layer, "transpose")


def concat(parts: Sequence[Tensor], dim: int) -> Tensor:
    network = parts[0].network
    layer = network.definition.add_concatenation([x.itensor for x in parts])
    layer.axis = dim
    return network.add(layer, "concat")


def narrow(x: Tensor, dim: int, start: Size, length: Size, *, pad: bool = False) -> Tensor:
    """`length` elements of `dim` from `start`; with `pad`, elements past the end are zero."""
    static = isinstance(start, int) and isinstance(length, int)
    spans = ((start,), (length,)) if static else [_vector(x.network, [s]).itensor for s in (start, length)]
    layer = x.network.definition.add_slice(x.itensor, *(spans if static else ((0,), (0,))), (1,))
    layer.axes = (dim,)
    if pad:
        layer.mode = trt.SampleMode.FILL
    if not static:
        layer.set_input(1, spans[0])
        layer.set_input(2, spans[1])
    return x.network.add(layer, "slice")


def chunk(x: Tensor, count: int, dim: int) -> tuple[Tensor, ...]:
    part = x.shape[dim] // count
    return tuple(narrow(x, dim, i * part, part) for i in range(count))


# Collectives. TensorRT gathers and scatters along dimension 0. A layer's operation and group cannot be read
# back, so both are also stored in its metadata.


def _collective(x: Tensor, operation: str, reduce: str, group: Sequence[int]) -> Tensor:
    import numpy as np

    layer = x.network.definition.add_dist_collective(
        x.itensor,
        getattr(trt.CollectiveOperation, operation),
        getattr(trt.ReduceOperation, reduce),
        -1,
        np.asarray(group, dtype=np.int64),
    )
    layer.num_ranks = len(group)
    layer.metadata = json.dumps({"operation": operation, "group": list(group)})
    return x.network.add(layer, operation.lower())


def all_reduce(x: Tensor, group: Sequence[int]) -> Tensor:
    """The sum over the ranks of `group`."""
    return x if len(group) == 1 else _collective(x, "ALL_REDUCE", "SUM", group)


def all_gather(x: Tensor, group: Sequence[int]) -> Tensor:
    """[1, ...] of every rank -> [len(group), ...]."""
    if len(group) == 1:
        return x
    # TensorRT-RTX 1.7 infers the shape of every all-gather from the largest group in the plan, whichever
    # collective uses that group. Smaller groups use an all-to-all of copies instead: it moves the same
    # bytes, and its shape does not depend on the group.
    if len(group) < x.network.mapping.largest_group:
        return all_to_all(concat([x] * len(group), 0), group)
    return _collective(x, "ALL_GATHER", "NONE", group)


def all_to_all(x: Tensor, group: Sequence[int]) -> Tensor:
    """Dimension 0 is split into len(group) chunks: chunk i goes to rank group[i], whose chunk replaces it."""
    return x if len(group) == 1 else _collective(x, "ALL_TO_ALL", "NONE", group)
