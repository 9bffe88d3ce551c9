"""TensorRT's layers in PyTorch: one short function per layer type, with its attributes as keywords.

int64 tensors are shapes (sizes and offsets that TensorRT keeps on the host). Here they are tuples of
int, so nothing is read back from a GPU and `torch.compile` sees plain sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ..checkpoint.quantization import rounded
from ..config import FP8, TORCH_DTYPES
from . import kernels, rank_kernels
from .attention import attention as device_attention
from .collectives import dist_collective
from .linears import fp8_linear, linear, linear_gelu


def activation(x, *, kind, alpha=0.0, beta=0.0):
    if kind == "CLIP":
        return x.clamp(alpha, beta)
    return ACTIVATIONS[kind](x)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable] = {"SIGMOID": torch.sigmoid, "GELU_TANH": gelu_tanh, "GELU_ERF": F.gelu}


def attention(
    q, k, v, mask=None, probability_scale=None, *, norm_op, causal_kind, scale=1.0, normalization_quantize_to_type=None
):
    """softmax(scale * q k^T) v; TensorRT's layer has scale 1. With `probability_scale`, the softmax is rounded to FP8.

    In steps then, as no fused operator does that: for some queries at a time, so that their scores fit into memory.
    """
    assert (norm_op, causal_kind, mask) == ("SOFTMAX", "NONE", None), (norm_op, causal_kind, mask)
    if probability_scale is None:
        return device_attention(q, k, v, scale)
    assert normalization_quantize_to_type == FP8, normalization_quantize_to_type
    most = SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2])
    rows = max(1, q.shape[2] if q.is_meta else most)
    keys, values, results = k.float().transpose(-1, -2), v.float(), []
    for queries in q.split(rows, 2):
        probabilities = (queries.float() @ keys * scale).softmax(-1).to(q.dtype)
        results.append(kernels.through_fp8(probabilities, probability_scale).float() @ values)
    return torch.cat(results, 2).to(q.dtype)


SCORES = 1 << 26
"""The most scores of queries and keys that are in memory at once, if attention is computed in steps."""


def cast(x, *, to_type):
    return x.to(TORCH_DTYPES[to_type])


def concatenation(*parts, axis):
    return torch.cat(parts, axis)


def convolution(x, kernel, bias, *, stride_nd, padding_nd, dilation_nd, num_groups):
    if x.is_cuda and of_patches(kernel, stride_nd, padding_nd, dilation_nd, num_groups):
        return patch_linear(x, kernel, bias)
    return F.conv2d(x, kernel, bias, stride_nd, padding_nd, dilation_nd, num_groups)


def of_patches(kernel, stride_nd, padding_nd, dilation_nd, num_groups) -> bool:
    """Whether a convolution reads each value once, in patches side by side."""
    plain = num_groups == 1 and not any(padding_nd) and set(dilation_nd) == {1}
    return plain and tuple(kernel.shape[2:]) == tuple(stride_nd)


def patch_linear(x, kernel, bias):
    """A convolution of patches that do not overlap, as a linear layer; its result [B, D, H, W] has D last in memory."""
    rows, columns = kernel.shape[2:]
    patches = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.flatten(3), kernel.flatten(1), bias.flatten()).permute(0, 3, 1, 2)


ELEMENTWISE: dict[str, Callable] = {
    "SUM": operator.add,
    "SUB": operator.sub,
    "PROD": operator.mul,
    "FLOOR_DIV": operator.floordiv,
}


def elementwise(a, b, *, op):
    return ELEMENTWISE[op](a, b)


def matrix_multiply(a, b, *, op0, op1):
    assert op0 == "NONE", op0
    b = b.transpose(-1, -2) if op1 == "TRANSPOSE" else b
    return a @ b


def normalization(x, scale, bias, *, axes, epsilon):
    assert axes == 1 << (x.dim() - 1), "only the last dimension is normalized"
    return F.layer_norm(x, x.shape[-1:], scale.flatten(), bias.flatten(), epsilon)


def quantize(x, scale, *, axis, to_type):
    """As TensorRT defines it: castToFp8(clip(x / scale, -448, 448)), to nearest, ties to even; NaN stays NaN."""
    assert to_type == FP8, to_type
    return kernels.quantize(x, scale) if axis < 0 else rounded(x, _along(scale, axis, x.dim()))


def dequantize(x, scale, *, axis, to_type):
    """x * scale, rounded once."""
    return (x.float() * _along(scale, axis, x.dim())).to(TORCH_DTYPES[to_type])


def _along(scale, axis, rank):
    """The scales in float32, to broadcast along `axis` of a tensor of `rank` dimensions; -1: a single scale."""
    return scale.float().reshape([-1 if dim == axis else 1 for dim in range(rank)] if axis >= 0 else ())


def reduce(x, *, op, axes, keep_dims):
    assert (op, keep_dims) == ("AVG", True), (op, keep_dims)
    return x.mean([i for i in range(x.dim()) if axes >> i & 1], keepdim=True)


def select(condition, a, b):
    return torch.where(condition, a, b)


def shuffle(x, shape=None, *, first_transpose, reshape_dims, second_transpose, zero_is_placeholder):
    assert second_transpose is None and zero_is_placeholder
    if first_transpose:
        x = x.permute(first_transpose)
    shape = reshape_dims if shape is None else shape
    return x if shape is None else x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def slice_(x, starts=None, sizes=None, *, axes, start, shape, stride, mode):
    assert set(stride) == {1}, stride
    starts = start if starts is None else starts
    sizes = shape if sizes is None else sizes
    for dim, first, length in zip(axes, starts, sizes, strict=True):
        beyond = first + length - x.shape[dim]
        if mode == "FILL" and beyond > 0:
            x = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, beyond])
        x = x.narrow(dim, first, length)
    return x


def softmax(x, *, axes):
    """`axes` is a bit mask with one bit set."""
    return x.softmax(axes.bit_length() - 1)


UNARY: dict[str, Callable] = {
    "SQRT": torch.sqrt, "RECIP": torch.reciprocal, "SIN": torch.sin, "COS": torch.cos,
}  # fmt: skip


def unary(x, *, op):
    return UNARY[op](x)


# Operators inserted by graph passes.


def rms_norm(x, weight, *, eps):
    return F.rms_norm(x, x.shape[-1:], weight.flatten(), eps)


def modulate(x, scale, shift):
    """x (scale + 1) + shift, rounded once."""
    return torch.addcmul(shift, x, scale + 1)


def item(x, *, index):
    return x[index]


def unbind(x, *, width):
    """[B, W] -> W / width rows of shape [B, 1, width], which are views."""
    return x.unflatten(-1, (-1, 1, width)).unbind(1)


OPS: dict[str, Callable] = {
    "ACTIVATION": activation,
    "ADD_MEAN_FP8": kernels.add_mean_fp8,
    "ATTENTION": attention,
    "CAST": cast,
    "CONCATENATION": concatenation,
    "CONVOLUTION": convolution,
    "DEQUANTIZE": dequantize,
    "DIST_COLLECTIVE": dist_collective,
    "ELEMENTWISE": elementwise,
    "FP8_ATTENTION": kernels.fp8_attention,
    "FP8_LINEAR": fp8_linear,
    "FP8_LINEAR_GELU": kernels.fp8_linear_gelu,
    "GATED_NORM": kernels.gated_norm,
    "GATED_NORM_FP8": kernels.gated_norm_fp8,
    "GATED_SUM": kernels.gated_sum,
    "GATHERED_ATTENTION": rank_kernels.gathered_attention,
    "GELU_FP8": kernels.gelu_fp8,
    "ITEM": item,
    "LINEAR": linear,
    "LINEAR_GELU": linear_gelu,
    "MATRIX_MULTIPLY": matrix_multiply,
    "MODULATE": modulate,
    "NORMALIZATION": normalization,
    "NORM_MODULATE": kernels.norm_modulate,
    "NORM_MODULATE_FP8": kernels.norm_modulate_fp8,
    "PROJECTED_ATTENTION": kernels.projected_attention,
    "QKV_ATTENTION": kernels.qkv_attention,
    "QUANTIZE": quantize,
    "REDUCE": reduce,
    "REDUCED_GATED_NORM": rank_kernels.reduced_gated_norm,
    "REDUCED_GATED_NORM_FP8": rank_kernels.reduced_gated_norm,
    "REDUCED_GATED_SUM": rank_kernels.reduced_gated_sum,
    "RMS_NORM": rms_norm,
    "SELECT": select,
    "SHUFFLE": shuffle,
    "SILU": F.silu,
    "SLICE": slice_,
    "SOFTMAX": softmax,
    "ULYSSES_ATTENTION": rank_kernels.ulysses_attention,
    "UNARY": unary,
    "UNBIND": unbind,
}


FUSED = frozenset({
    "ADD_MEAN_FP8", "FP8_ATTENTION", "FP8_LINEAR", "FP8_LINEAR_GELU", "GATED_NORM", "GATED_NORM_FP8", "GATED_SUM",
    "GATHERED_ATTENTION",
    "GELU_FP8", "ITEM", "LINEAR", "LINEAR_GELU", "MODULATE", "NORM_MODULATE", "NORM_MODULATE_FP8",
    "PROJECTED_ATTENTION", "QKV_ATTENTION", "REDUCED_GATED_NORM", "REDUCED_GATED_NORM_FP8", "REDUCED_GATED_SUM",
    "RMS_NORM", "SILU", "ULYSSES_ATTENTION", "UNBIND",
})  # fmt: skip
"""Operators that only graph passes insert: a graph file with one of them is invalid."""


KINDS: dict[str, tuple[str, set[str]]] = {
    "ACTIVATION": ("kind", {*ACTIVATIONS, "CLIP"}),
    "ELEMENTWISE": ("op", {*ELEMENTWISE}),
    "UNARY": ("op", {*UNARY}),
}
"""The attribute that selects the function of an operator, and its supported values."""


# Shapes: tuples of int.


def shape_of(x) -> tuple[int, ...]:
    return tuple(x.shape)


def shape_slice(x: Sequence[int], *, axes, start, shape, stride, mode) -> tuple[int, ...]:
    return tuple(x[start[0] : start[0] + shape[0]])


def shape_concatenation(*parts: Sequence[int], axis) -> tuple[int, ...]:
    return tuple(size for part in parts for size in part)


def shape_elementwise(a: Sequence[int], b: Sequence[int], *, op) -> tuple[int, ...]:
    length = max(len(a), len(b))
    a, b = (tuple(x) * length if len(x) == 1 else tuple(x) for x in (a, b))
    return tuple(ELEMENTWISE[op](i, j) for i, j in zip(a, b, strict=True))


SHAPE_OPS: dict[str, Callable] = {
    "CONCATENATION": shape_concatenation,
    "ELEMENTWISE": shape_elementwise,
    "SHAPE": shape_of,
    "SLICE": shape_slice,
}
