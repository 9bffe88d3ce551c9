"""Linear layers, in the network's dtype and in FP8.

A result has the order of its input in memory: [B, S, D] with the tokens first needs no copy either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..config import TORCH_DTYPES
from .capability import slow_on_cpu


def tokens_first(x: torch.Tensor) -> bool:
    """Whether x [B, S, D] is stored as [S, B, D]."""
    return x.dim() == 3 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous()


def linear(x, weight, bias):
    """Matrix multiply by a transposed constant, plus bias, with one rounding instead of two."""
    if tokens_first(x):
        return linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
    weight, bias = weight.reshape(weight.shape[-2:]), bias.flatten()
    if slow_on_cpu(x):
        return F.linear(x.float(), weight.float(), bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def linear_gelu(x, weight, bias):
    """A linear layer and GELU in its tanh form; on a GPU cuBLASLt applies it in the GEMM's epilogue."""
    if tokens_first(x):
        return linear_gelu(x.transpose(0, 1), weight, bias).transpose(0, 1)
    if not x.is_cuda:
        return F.gelu(linear(x, weight, bias), approximate="tanh")
    weight, bias = weight.reshape(weight.shape[-2:]), bias.flatten()
    y = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def fp8_linear(x, weight, x_scale, weight_scale, bias, *, to_type):
    """x weight^T x_scale weight_scale + bias, of FP8 values with a scale each; summed in float32 and rounded once."""
    if tokens_first(x):
        return fp8_linear(x.transpose(0, 1), weight, x_scale, weight_scale, bias, to_type=to_type).transpose(0, 1)
    rows, weight, dtype = x.reshape(-1, x.shape[-1]), weight.reshape(weight.shape[-2:]), TORCH_DTYPES[to_type]
    bias = None if bias is None else bias.flatten()
    if x.is_cuda:
        y = fp8_gemm(rows, weight, x_scale, weight_scale, bias, dtype)
    else:
        y = rows.float() @ weight.float().t() * (x_scale * weight_scale)
        y = (y if bias is None else y + bias.float()).to(dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def fp8_gemm(rows, weight, x_scale, weight_scale, bias, dtype, out=None):
    """On FP8 tensor cores, which want the second matrix by columns, as the transpose of a weight is."""
    scales = {"scale_a": x_scale, "scale_b": weight_scale}
    options = {} if out is None else {"out": out}
    return torch._scaled_mm(rows, weight.t(), **scales, bias=bias, out_dtype=dtype, use_fast_accum=True, **options)


def project_into(out: torch.Tensor, x: torch.Tensor, weight, *rest) -> None:
    """Write the `linear` or `fp8_linear` of x [B, S, D], tokens first, to `out` [S, B, features]. Needs a GPU.

    `rest`: the bias, or both scales and the bias.
    """
    weight, (*scales, bias) = weight.reshape(weight.shape[-2:]), rest
    rows, out = x.transpose(0, 1).reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if scales:
        fp8_gemm(rows, weight, *scales, bias.flatten(), out.dtype, out)
    else:
        torch.addmm(bias.flatten(), rows, weight.t(), out=out)
