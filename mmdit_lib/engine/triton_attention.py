"""Triton kernels around attention on one GPU: norms of queries and keys, in place or on the way to FP8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .linears import project_into
from .triton_kernels import _to_fp8

TOKENS = 64
"""Tokens that one program adds up."""
CHUNKS = 512
"""Their sums that one program adds up: those of 32,768 tokens, more than any image has."""


@triton.jit(do_not_specialize=["rows"])
def _column_sums(x, out, rows, width, x_row, x_batch, factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of `ROWS` rows at a time, times `factor`: x[row, batch, column] -> out[chunk, batch, column]."""
    chunk, batch, batches = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = chunk * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    there = x + row.to(tl.int64) * x_row + batch * x_batch + column[None, :]
    found = tl.sum(tl.load(there, (row < rows) & (column < width)[None, :], 0.0).to(tl.float32), 0) * factor
    tl.store(out + (chunk * batches + batch) * width + column, found, column < width)


def mean_over_tokens(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, B, heads, head_size], contiguous in the last two dimensions -> [B, heads, 1, head_size], contiguous.

    Rounded to the dtype of x. The order of the sum depends on the number of tokens alone.
    """
    tokens, batch, heads, size = x.shape
    width, chunks = heads * size, triton.cdiv(tokens, TOKENS)
    sums = torch.empty(chunks, batch, width, dtype=torch.float32, device=x.device)
    mean = torch.empty(batch, heads, 1, size, dtype=x.dtype, device=x.device)
    together = max(CHUNKS, triton.next_power_of_2(chunks))
    for source, out, rows, factor, tile, columns, warps in (
        (x, sums, tokens, 1.0 / tokens, TOKENS, 128, 4),
        (sums, mean, chunks, 1.0, together, 16, 8),
    ):
        _column_sums[(triton.cdiv(rows, tile), batch, triton.cdiv(width, columns))](
            source, out, rows, width, source.stride(0), source.stride(1), factor, ROWS=tile, COLUMNS=columns,
            num_warps=warps,
        )  # fmt: skip
    return mean


@triton.jit(do_not_specialize=["first", "batches"])
def _joint_heads(qkv, q_0, k_0, q_1, k_1, v_scale, v_mean, out, first, batches, plane, eps, NORM: tl.constexpr,
                 FP8: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, HEADS_2: tl.constexpr,
                 SIZE_2: tl.constexpr):  # fmt: skip
    """One row of `qkv`: RMS norms of its queries and keys, with the second weights from row `first` on.

    In place, or with FP8 all three to planes of `out`, the values without their mean.
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
            if part == 2:
                x = x.to(tl.float32) - tl.load(v_mean + row % batches * HEADS * SIZE + at, inside, 0.0).to(tl.float32)
            tl.store(out + part * tl.cast(plane, tl.int64) + row * HEADS * SIZE + at, _to_fp8(x, scale, qkv), inside)
        else:
            tl.store(there, x, inside)


def joint_heads(
    parts: Sequence[tuple], heads: int, eps: float, v_scale: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Queries, keys and values of one or two streams together, [B, heads, tokens, head_size], with the tokens first.

    Each stream is projected into its rows of one tensor, which is normalized in place. Values are not copied. In FP8,
    the values lose their mean over the tokens, which comes last, [B, heads, 1, head_size]; otherwise that is None.

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
    planes, mean = out.unbind(2), None
    if fp8:
        mean = mean_over_tokens(planes[2])
        planes = torch.empty(3, total, batch, heads, size, dtype=torch.float8_e4m3fn, device=x.device).unbind()
    if fp8 or normed:
        weights = [qkv if w is None else w for part in (parts[0], parts[-1]) for w in part[-2:]]
        _joint_heads[(total * batch,)](
            qkv, *weights, *((v_scale, mean) if fp8 else (qkv, qkv)), planes[0], parts[0][0].shape[1] * batch, batch,
            planes[0].numel(), eps, NORM=normed, FP8=fp8, HEADS=heads, SIZE=size, HEADS_2=triton.next_power_of_2(heads),
            SIZE_2=triton.next_power_of_2(size), num_warps=4,
        )  # fmt: skip
    return [*(x.permute(1, 2, 0, 3) for x in planes), mean]
