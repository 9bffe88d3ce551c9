"""The Triton kernels of `kernels.py`. One program handles one token.

Numbers of tokens and rows are not specialized: one compiled kernel serves every size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def _row(x, gate, y, scale, shift, total, normed, tokens, width, y_batch, y_token, gate_batch, scale_batch, shift_batch,
         eps, GATE: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, inside, 0.0).to(tl.float32)
    if GATE:
        g = tl.load(gate + batch * gate_batch + columns, inside, 0.0).to(tl.float32)
        value += g * tl.load(y + batch * y_batch + token * y_token + columns, inside, 0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + row * width + columns, value, inside)
        value = value.to(tl.float32)
    if NORM:
        mean = tl.sum(value, 0) / width
        centered = tl.where(inside, value - mean, 0.0)
        deviation = tl.sqrt(tl.sum(centered * centered, 0) / width + eps)
        a = tl.load(scale + batch * scale_batch + columns, inside, 0.0).to(tl.float32)
        b = tl.load(shift + batch * shift_batch + columns, inside, 0.0).to(tl.float32)
        tl.store(normed + row * width + columns, centered / deviation * (a + 1.0) + b, inside)


@triton.jit(do_not_specialize=["tokens", "batches", "first"])
def _heads(qkv, norm_q, norm_k, out, tokens, batches, first, plane, eps, HEADS: tl.constexpr, SIZE: tl.constexpr,
           NORM: tl.constexpr, PARTS: tl.constexpr, HEADS_2: tl.constexpr, SIZE_2: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head, channel = tl.arange(0, HEADS_2)[:, None], tl.arange(0, SIZE_2)[None, :]
    inside = (head < HEADS) & (channel < SIZE)
    at = head * SIZE + channel
    for part in tl.static_range(PARTS):
        x = tl.load(qkv + row * 3 * HEADS * SIZE + part * HEADS * SIZE + at, inside, 0.0)
        if NORM and part < 2:
            weight = norm_q if part == 0 else norm_k
            w = tl.load(weight + channel, channel < SIZE, 0.0).to(tl.float32)
            x = x.to(tl.float32)
            x = x / tl.sqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None] * w
        tl.store(out + part * plane + ((first + token) * batches + batch) * HEADS * SIZE + at, x, inside)


def gated_sum(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    total = torch.empty_like(x)
    _launch(x, gate, y, x, x, total, x, 0.0, gated=True, normed=False)
    return total


def norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, x, x, scale, shift, x, out, eps, gated=False, normed=True)
    return out


def gated_norm(x, gate, y, scale, shift, eps: float) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty(2, *x.shape, dtype=x.dtype, device=x.device)
    _launch(x, gate, y, scale, shift, out[0], out[1], eps, gated=True, normed=True)
    return out


def _launch(x, gate, y, scale, shift, total, out, eps: float, *, gated: bool, normed: bool) -> None:
    batch, tokens, width = x.shape
    assert y.stride(2) == gate.stride(2) == scale.stride(2) == shift.stride(2) == 1
    strides = [t.stride(0) if t.shape[0] > 1 else 0 for t in (gate, scale, shift)]
    _row[(batch * tokens,)](
        x, gate, y, scale, shift, total, out, tokens, width, y.stride(0), y.stride(1), *strides, eps,
        GATE=gated, NORM=normed, BLOCK=triton.next_power_of_2(width), num_warps=4 if width <= 2048 else 8,
    )  # fmt: skip


def split_heads(parts: Sequence[tuple], heads: int, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of all streams, [B, heads, tokens, head_size], stored as [tokens, B, heads, head_size].

    With one stream the values stay where they are.
    """
    first = parts[0][0]
    batch, size = first.shape[0], first.shape[-1] // (3 * heads)
    total, copied = sum(qkv.shape[1] for qkv, _, _ in parts), 3 if len(parts) > 1 else 2
    out = torch.empty(copied, total, batch, heads, size, dtype=first.dtype, device=first.device)
    start = 0
    for qkv, norm_q, norm_k in parts:
        qkv, tokens = qkv.contiguous(), qkv.shape[1]
        _heads[(batch * tokens,)](
            qkv, first if norm_q is None else norm_q, first if norm_k is None else norm_k, out, tokens, batch, start,
            out.stride(0), eps, HEADS=heads, SIZE=size, NORM=norm_q is not None, PARTS=copied,
            HEADS_2=triton.next_power_of_2(heads), SIZE_2=triton.next_power_of_2(size), num_warps=4,
        )  # fmt: skip
        start += tokens
    found = [x.permute(1, 2, 0, 3) for x in out]
    if copied == 2:
        found.append(first[..., 2 * heads * size :].unflatten(-1, (heads, size)).transpose(1, 2))
    return tuple(found)
