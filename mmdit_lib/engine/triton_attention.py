"""Triton kernels around attention on one GPU: norms of queries and keys, in place or on the way to FP8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .linears import project_into
from .triton_kernels import _to_fp8


@triton.jit(do_not_specialize=["first"])
def _joint_heads(qkv, q_0, k_0, q_1, k_1, v_scale, out, first, plane, eps, NORM: tl.constexpr, FP8: tl.constexpr,
                 HEADS: tl.constexpr, SIZE: tl.constexpr, HEADS_2: tl.constexpr, SIZE_2: tl.constexpr):  # fmt: skip
    """One row of `qkv`: RMS norms of its queries and keys, with the second weights from row `first` on.

    In place, or with FP8 all three to planes of `out`.
    """
    row = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, HEADS_2)[:, None], tl.arange(0, SIZE_2)[None, :]
    inside = (head < HEADS) & (channel < SIZE)
    at = head * SIZE + channel
    for part in tl.static_range(3 if FP8 else 2):
        there = qkv + (row * 3 + part) * HEADS * SIZE + at
        x = tl.load(there, inside, 0.0)
        if NORM and part < 2:
            mine = tl.load((q_0 if part == 0 else k_0) + channel, (channel < SIZE) & (row < first), 0.0)
            theirs = tl.load((q_1 if part == 0 else k_1) + channel, (channel < SIZE) & (row >= first), 0.0)
            x = x.to(tl.float32)
            x = x / tl.sqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None] * (mine.to(tl.float32) + theirs.to(tl.float32))
        if FP8:
            # Normalized queries and keys are near 1: their scale is 1.
            scale = tl.load(v_scale).to(tl.float32) if part == 2 else 1.0
            tl.store(out + part * tl.cast(plane, tl.int64) + row * HEADS * SIZE + at, _to_fp8(x, scale, qkv), inside)
        else:
            tl.store(there, x, inside)


def joint_heads(parts: Sequence[tuple], heads: int, eps: float, v_scale: torch.Tensor | None) -> list[torch.Tensor]:
    """Queries, keys and values of one or two streams together, [B, heads, tokens, head_size], with the tokens first.

    Each stream is projected into its rows of one tensor, which is normalized in place. Values are not copied.

    Args:
        parts: of each stream the arguments of `project_into` and the weights of both norms, or None.
        v_scale: scale of the values in FP8; the queries' and keys' is 1. None: all stay as they are.
    """
    x, weight = parts[0][:2]
    batch, width, total = len(x), weight.shape[-2], sum(part[0].shape[1] for part in parts)
    dtype = parts[0][-3].dtype  # the bias's; x may be FP8
    qkv = torch.empty(total, batch, width, dtype=dtype, device=x.device)
    start = 0
    for x, *layer, _, _ in parts:
        project_into(qkv[start : start + x.shape[1]], x, *layer)
        start += x.shape[1]
    size = width // (3 * heads)
    normed, fp8 = parts[0][-1] is not None, v_scale is not None
    out = qkv.view(total, batch, 3, heads, size)
    planes = out.unbind(2)
    if fp8:
        planes = torch.empty(3, total, batch, heads, size, dtype=torch.float8_e4m3fn, device=x.device).unbind()
    if fp8 or normed:
        weights = [qkv if w is None else w for part in (parts[0], parts[-1]) for w in part[-2:]]
        _joint_heads[(total * batch,)](
            qkv, *weights, v_scale if fp8 else qkv, planes[0], parts[0][0].shape[1] * batch, planes[0].numel(), eps,
            NORM=normed, FP8=fp8, HEADS=heads, SIZE=size, HEADS_2=triton.next_power_of_2(heads),
            SIZE_2=triton.next_power_of_2(size), num_warps=4,
        )  # fmt: skip
    return [x.permute(1, 2, 0, 3) for x in planes]
