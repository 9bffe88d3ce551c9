"""Fused operators: a Triton kernel on a GPU, the same formula in PyTorch elsewhere.

They cover what lies between the GEMMs and the attention of a block. Each reads and writes its tensors once, takes any
size without recompilation, and computes in float32 with one rounding at the end.
"""

from __future__ import annotations

from functools import cache, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from ..checkpoint.quantization import rounded
from . import cublaslt
from .attention import attention, has_flash_attention_3
from .capability import has_fp8
from .linears import fp8_linear, linear, tokens_first


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def on_gpu(x: torch.Tensor) -> bool:
    """Whether to launch the Triton kernel; `torch.compile` gets the formula, to fuse it with its neighbors."""
    return x.is_cuda and not torch.compiler.is_compiling() and has_triton()


def gated_sum(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + gate y, with x and y [B, S, D] and gate [B, 1, D]."""
    if not on_gpu(x) or x.dim() != 3:
        return torch.addcmul(x, gate, y)
    from . import triton_kernels

    return triton_kernels.gated_sum(x, gate, y)


def norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *, eps: float) -> torch.Tensor:
    """layer_norm(x) (scale + 1) + shift, with x [B, S, D], scale and shift [B, 1, D]."""
    if not on_gpu(x):
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale + 1)
    from . import triton_kernels

    return triton_kernels.norm_modulate(x, scale, shift, eps)


def gated_norm(x, gate, y, scale, shift, *earlier, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """s = x + gate y, and layer_norm(s) (scale + 1) + shift. `earlier`: a gate and a y that are added to x first."""
    if not on_gpu(x):
        total = gated_sum(gated_sum(x, *earlier) if earlier else x, gate, y)
        return total, norm_modulate(total, scale, shift, eps=eps)
    from . import triton_kernels

    return triton_kernels.gated_norm(x, gate, y, scale, shift, eps, earlier)


def fp8_attention(q, k, v, v_scale: torch.Tensor, *, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` with its inputs in FP8, where its kernel takes them; elsewhere they are rounded to FP8.

    Hopper's tensor cores add FP8 products with few bits, so a sum over many tokens is imprecise if the values have much
    in common. Therefore their mean is subtracted first. The caller adds it to the result, which is exact because the
    probabilities' sum is 1.

    q and k have scale 1, v without its mean has `v_scale`, a float32 scalar.

    Returns:
        The attention to v without its mean, in bfloat16 with the kernel, otherwise in q's dtype; and the mean,
        [B, heads, 1, head_size], in v's dtype.
    """
    one, mean = torch.ones((), device=q.device), v.mean(2, keepdim=True)
    given, scales = (q, k, v - mean), (one, one, v_scale)
    if not q.is_cuda or not has_flash_attention_3(q.device):
        return attention(*map(through_fp8, given, scales), scale), mean
    return attention(*map(rounded, given, scales), scale, v_scale), mean


Attended = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""The result of attention, or the two of `fp8_attention`."""


def qkv_attention(*streams: torch.Tensor | None, heads: int, eps: float, scale: float) -> Attended:
    """Attention over the tokens of all streams together.

    Args:
        streams: for each stream its queries, keys and values side by side, [B, S, 3 heads head_size], and the weights
            of the RMS norms of queries and of keys, [head_size], or None. After the last stream, the scale of the
            values, if attention is in FP8.
        heads: number of heads.
        eps: of the RMS norms.
        scale: factor of the products of queries and keys.

    Returns:
        [B, heads, tokens of all streams, head_size]; in FP8 also the mean, as `fp8_attention` returns it. On a GPU, the
        tokens come first in memory, so that those of one stream are contiguous.
    """
    count, in_fp8 = divmod(len(streams), 3)
    q, k, v = split_heads(*streams[: 3 * count], heads=heads, eps=eps)
    return fp8_attention(q, k, v, streams[-1], scale=scale) if in_fp8 else attention(q, k, v, scale)


def projected_attention(
    *streams: torch.Tensor | None, inputs: int, heads: int, eps: float, scale: float, to_type: str | None = None
) -> Attended:
    """`qkv_attention` of linear layers: on a GPU they write to one tensor, from which attention reads.

    Args:
        streams: for each stream the `inputs` arguments of its `linear` or `fp8_linear`, with the latter's `to_type`,
            and the weights of both norms or None. After the last stream, the scale of the values, if attention is in
            FP8.
    """
    if on_gpu(streams[0]):
        q, k, v, v_scale, mean = projected_heads(*streams, inputs=inputs, heads=heads, eps=eps)
        found = attention(q, k, v, scale, v_scale)
        return found if mean is None else (found, mean)
    parts, v_scale = _parts(streams, inputs)
    project = linear if to_type is None else partial(fp8_linear, to_type=to_type)
    joined = [x for *layer, norm_q, norm_k in parts for x in (project(*layer), norm_q, norm_k)]
    return qkv_attention(*joined, *([] if v_scale is None else [v_scale]), heads=heads, eps=eps, scale=scale)


def projected_heads(*streams, inputs: int, heads: int, eps: float) -> tuple[torch.Tensor | None, ...]:
    """On a GPU, the queries, keys and values of `projected_attention`, the scale of the values, and their mean.

    With the scale they are in FP8, the values without their mean; otherwise there is no mean.
    """
    from . import triton_attention

    parts, v_scale = _parts(streams, inputs)
    *qkv, mean = triton_attention.joint_heads(parts, heads, eps, v_scale)
    return *qkv, v_scale, mean


def _parts(streams, inputs: int) -> tuple[list[tuple], torch.Tensor | None]:
    """The arguments of `projected_attention` for each stream, and the scale of the values or None."""
    count, extra = divmod(len(streams), inputs + 2)
    return [streams[i * (inputs + 2) :][: inputs + 2] for i in range(count)], streams[-1] if extra else None


def through_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x rounded to FP8 and back, in its own dtype. `scale` broadcasts."""
    return (rounded(x, scale).float() * scale.float()).to(x.dtype)


def split_heads(*streams: torch.Tensor | None, heads: int, eps: float) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of all streams (see `qkv_attention`), [B, heads, tokens, head_size] each."""
    parts = [streams[i : i + 3] for i in range(0, len(streams), 3)]
    if on_gpu(streams[0]):
        from . import triton_kernels

        return triton_kernels.split_heads(parts, heads, eps)
    split = [_split_heads(*part, heads, eps) for part in parts]
    return tuple(torch.cat(tensors, 2) for tensors in zip(*split, strict=True))


def _split_heads(qkv, norm_q, norm_k, heads: int, eps: float) -> tuple[torch.Tensor, ...]:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
    if norm_q is None:
        return q, k, v
    normed = (F.rms_norm(x, x.shape[-1:], weight.flatten(), eps) for x, weight in ((q, norm_q), (k, norm_k)))
    return *normed, v


# FP8: what a kernel computes is rounded to the network's dtype first, as in the network, and then to FP8.


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale in FP8, with one scale for all of x; on a GPU one kernel, even if x is stored tokens first."""
    if not on_gpu(x) or x.dim() != 3 or not has_fp8(x.device):
        return rounded(x, scale.reshape(()))
    from . import triton_kernels

    return triton_kernels.quantize(x, scale, gelu=False)


def add_mean_fp8(x: torch.Tensor, fp8_scale: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """x + mean in FP8, with x [B, S, heads head_size] and mean [B, heads, 1, head_size]."""
    row = mean.flatten(1)[:, None]
    if not on_gpu(x) or not has_fp8(x.device):
        return rounded(x + row, fp8_scale)
    from . import triton_kernels

    return triton_kernels.quantize(x, fp8_scale, gelu=False, mean=row)


def gelu_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form of x [B, S, D], in FP8."""
    if not on_gpu(x):
        return rounded(F.gelu(x, approximate="tanh"), scale)
    from . import triton_kernels

    return triton_kernels.quantize(x, scale, gelu=True)


def fp8_linear_gelu(x, weight, x_scale, weight_scale, bias, fp8_scale, inverse, *, to_type: str) -> torch.Tensor:
    """`gelu_fp8` of an `fp8_linear`; on a GPU in the GEMM itself, rounded once, if cuBLASLt can do that.

    `inverse`: 1 / fp8_scale, in float32.
    """
    if tokens_first(x):
        rest = (weight, x_scale, weight_scale, bias, fp8_scale, inverse)
        return fp8_linear_gelu(x.transpose(0, 1), *rest, to_type=to_type).transpose(0, 1)
    if on_gpu(x):
        rows, matrix = x.reshape(-1, x.shape[-1]), weight.reshape(weight.shape[-2:])
        y = cublaslt.fp8_linear_gelu(rows, matrix, x_scale, weight_scale, bias.flatten(), inverse)
        if y is not None:
            return y.reshape(*x.shape[:-1], y.shape[-1])
    return gelu_fp8(fp8_linear(x, weight, x_scale, weight_scale, bias, to_type=to_type), fp8_scale)


def norm_modulate_fp8(x, scale, shift, fp8_scale, *, eps: float) -> torch.Tensor:
    """As `norm_modulate`, in FP8."""
    if not on_gpu(x):
        return rounded(norm_modulate(x, scale, shift, eps=eps), fp8_scale)
    from . import triton_kernels

    return triton_kernels.norm_modulate(x, scale, shift, eps, fp8_scale)


def gated_norm_fp8(x, gate, y, scale, shift, *rest, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gated_norm`, with the second result in FP8; its scale comes last."""
    *earlier, fp8_scale = rest
    if not on_gpu(x):
        total = gated_sum(gated_sum(x, *earlier) if earlier else x, gate, y)
        return total, norm_modulate_fp8(total, scale, shift, fp8_scale, eps=eps)
    from . import triton_kernels

    return triton_kernels.gated_norm(x, gate, y, scale, shift, eps, earlier, fp8_scale)
