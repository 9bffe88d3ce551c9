"""The Triton kernels of `kernels.py`. One program handles one token.

Numbers of tokens and rows are not specialized: one compiled kernel serves every size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .linears import fp8_gemm, tokens_first
from .symmetric import Exchange, Slot


@triton.jit
def _memory(addresses, rank, like):
    """Where a slot begins on `rank`, as a pointer to elements of the dtype of `like`."""
    return tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(like.dtype.element_ty)), 16)


@triton.jit
def _to_fp8(value, scale, like):
    """Rounded to the dtype of `like`, then to FP8. The scale is a power of two; the conversion saturates."""
    exact = value.to(like.dtype.element_ty).to(tl.float32) / scale
    return tl.minimum(tl.maximum(exact, -448.0, tl.PropagateNan.ALL), 448.0, tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["tokens"])
def _quantize(x, fp8_scale, mean, out, tokens, width, x_batch, x_token, GELU: tl.constexpr, MEAN: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row // tokens * x_batch + row % tokens * x_token + columns, inside, 0.0).to(tl.float32)
    if MEAN:
        value += tl.load(mean + row // tokens * width + columns, inside, 0.0).to(tl.float32)
    if GELU:  # tanh(z) = 1 - 2 / (exp(2 z) + 1)
        z = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        value = value * (1.0 - 1.0 / (tl.exp(2.0 * z) + 1.0))
    tl.store(out + row * width + columns, _to_fp8(value, tl.load(fp8_scale).to(tl.float32), x), inside)


def quantize(x: torch.Tensor, scale: torch.Tensor, *, gelu: bool, mean: torch.Tensor | None = None) -> torch.Tensor:
    """x [B, S, D], of any order of the first two dimensions in memory, in FP8; of GELU(x) if `gelu`.

    `mean`, [B, 1, D], is added first.
    """
    batch, tokens, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    block = min(triton.next_power_of_2(width), 2048)
    _quantize[(batch * tokens, triton.cdiv(width, block))](
        x, scale, x if mean is None else mean.contiguous(), out, tokens, width, x.stride(0), x.stride(1), GELU=gelu,
        MEAN=mean is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _row(x, gate_0, y_0, gate, y, bias, scale, shift, fp8_scale, total, normed, tokens, width, y_0_batch, y_0_token,
         gate_0_batch, y_batch, y_token, gate_batch, scale_batch, shift_batch, n_batch, n_token, eps,
         EARLIER: tl.constexpr, GATE: tl.constexpr, RANKS: tl.constexpr, NORM: tl.constexpr,
         FP8: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, inside, 0.0).to(tl.float32)
    if EARLIER:
        g = tl.load(gate_0 + batch * gate_0_batch + columns, inside, 0.0).to(tl.float32)
        value += g * tl.load(y_0 + batch * y_0_batch + token * y_0_token + columns, inside, 0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty).to(tl.float32)
    if GATE:
        g = tl.load(gate + batch * gate_batch + columns, inside, 0.0).to(tl.float32)
        at = batch * y_batch + token * y_token + columns
        if RANKS == 0:
            value += g * tl.load(y + at, inside, 0.0).to(tl.float32)
        else:  # y is where the parts of it are, whose sum all ranks take in the same order
            part = tl.load(bias + columns, inside, 0.0).to(tl.float32)
            for rank in tl.static_range(RANKS):
                part += tl.load(_memory(y, rank, x) + at, inside, 0.0).to(tl.float32)
            value += g * part
        value = value.to(total.dtype.element_ty)
        tl.store(total + row * width + columns, value, inside)
        value = value.to(tl.float32)
    if NORM:
        mean = tl.sum(value, 0) / width
        centered = tl.where(inside, value - mean, 0.0)
        deviation = tl.sqrt(tl.sum(centered * centered, 0) / width + eps)
        a = tl.load(scale + batch * scale_batch + columns, inside, 0.0).to(tl.float32)
        b = tl.load(shift + batch * shift_batch + columns, inside, 0.0).to(tl.float32)
        value = centered / deviation * (a + 1.0) + b
        there = normed + batch * n_batch + token * n_token + columns
        if FP8:
            tl.store(there, _to_fp8(value, tl.load(fp8_scale).to(tl.float32), x), inside)
        else:
            tl.store(there, value, inside)


@triton.jit
def _rms_norm(x, weight, channel, eps, SIZE: tl.constexpr):
    x = x.to(tl.float32)
    w = tl.load(weight + channel, channel < SIZE, 0.0).to(tl.float32)
    return x / tl.sqrt(tl.sum(x * x, 1) / SIZE + eps)[:, None] * w


@triton.jit(do_not_specialize=["tokens", "batches", "first"])
def _heads(qkv, norm_q, norm_k, out, tokens, batches, first, by_batch, by_token, plane, eps, HEADS: tl.constexpr,
           SIZE: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr, HEADS_2: tl.constexpr,
           SIZE_2: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head, channel = tl.arange(0, HEADS_2)[:, None], tl.arange(0, SIZE_2)[None, :]
    inside = (head < HEADS) & (channel < SIZE)
    at = head * SIZE + channel
    for part in tl.static_range(PARTS):
        x = tl.load(qkv + batch * by_batch + token * by_token + part * HEADS * SIZE + at, inside, 0.0)
        if NORM and part < 2:
            x = _rms_norm(x, norm_q if part == 0 else norm_k, channel, eps, SIZE)
        there = part * tl.cast(plane, tl.int64) + ((first + token) * batches + batch) * HEADS * SIZE + at
        tl.store(out + there, x, inside)


def gated_sum(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    total = torch.empty_like(x)
    _launch(x, gate, y, x, x, total, x, 0.0, gated=True, normed=False)
    return total


def norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, fp8=None) -> torch.Tensor:
    """Tokens first. `fp8`: the scale with which the result is quantized; None: it has the dtype of x."""
    x = x.contiguous()
    out = _normed(x, fp8)
    _launch(x, x, x, scale, shift, x, out, eps, gated=False, normed=True, fp8=fp8)
    return out


def gated_norm(x, gate, y, scale, shift, eps: float, earlier=(), fp8=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The second result has its tokens first. `fp8`: the scale with which it is quantized; None: it is not."""
    x = x.contiguous()
    out = torch.empty_like(x), _normed(x, fp8)
    _launch(x, gate, y, scale, shift, out[0], out[1], eps, gated=True, normed=True, earlier=earlier, fp8=fp8)
    return out


def _normed(x: torch.Tensor, fp8: torch.Tensor | None) -> torch.Tensor:
    """Memory for the normalized x [B, S, D], tokens first: linear layers and attention keep this order."""
    batch, tokens, width = x.shape
    dtype = x.dtype if fp8 is None else torch.float8_e4m3fn
    return torch.empty(tokens, batch, width, dtype=dtype, device=x.device).transpose(0, 1)


def _launch(
    x, gate, y, scale, shift, total, out, eps: float, *, gated: bool, normed: bool, earlier=(), ranks=None, fp8=None
) -> None:
    """`earlier`: a gate and a branch that are added first. `ranks`: addresses of y's parts on the ranks, and the bias;
    y then only gives the strides. `fp8`: a scale."""
    batch, tokens, width = x.shape
    gate_0, y_0 = earlier or (gate, y)
    vectors = [*((gate_0, gate) if gated else ()), *((scale, shift) if normed else ())]
    assert y_0.shape == y.shape == x.shape and all(v.shape[1:] == (1, width) and len(v) in (1, batch) for v in vectors)
    assert {t.stride(2) for t in (y_0, gate_0, y, gate, scale, shift)} == {1}
    by_0, *strides = (t.stride(0) if t.shape[0] > 1 else 0 for t in (gate_0, gate, scale, shift))
    addresses, bias = ranks or (y, x)
    _row[(batch * tokens,)](
        x, gate_0, y_0, gate, addresses, bias, scale, shift, x if fp8 is None else fp8, total, out, tokens, width,
        y_0.stride(0), y_0.stride(1), by_0, y.stride(0), y.stride(1), *strides, out.stride(0), out.stride(1), eps,
        EARLIER=bool(earlier), GATE=gated, RANKS=len(addresses) if ranks else 0, NORM=normed, FP8=fp8 is not None,
        BLOCK=triton.next_power_of_2(width), num_warps=4 if width <= 2048 else 8,
    )  # fmt: skip


def reduced_gated_sum(x, gate, linear, others: Exchange, first: bool) -> torch.Tensor:
    x = x.contiguous()
    total = torch.empty_like(x)
    y, *ranks = _partial(linear, x.dtype, others, first)
    _launch(x, gate, y, x, x, total, x, 0.0, gated=True, normed=False, ranks=ranks)
    return total


def reduced_gated_norm(x, gate, linear, scale, shift, eps: float, others: Exchange, first: bool, fp8=None):
    x = x.contiguous()
    out = torch.empty_like(x), _normed(x, fp8)
    y, *ranks = _partial(linear, x.dtype, others, first)
    _launch(x, gate, y, scale, shift, out[0], out[1], eps, gated=True, normed=True, ranks=ranks, fp8=fp8)
    return out


def _partial(linear: Sequence[torch.Tensor], dtype: torch.dtype, others: Exchange, first: bool):
    """This rank's h weight^T [B, S, D] in memory that the others read; where it is on each rank; and the bias."""
    h, weight, *scales, bias = linear
    weight = weight.reshape(weight.shape[-2:])
    swap = tokens_first(h)  # then no copy
    rows = h.transpose(0, 1) if swap else h
    slot = others.slot(h.shape[0] * h.shape[1] * len(weight) * dtype.itemsize, first=first)
    y = slot.view(dtype, rows.shape[0], rows.shape[1], len(weight))
    rows, out = rows.reshape(-1, rows.shape[-1]), y.view(-1, len(weight))
    if scales:
        fp8_gemm(rows, weight, *scales, None, dtype, out)
    else:
        torch.mm(rows, weight.t(), out=out)
    slot.barrier()
    return y.transpose(0, 1) if swap else y, slot.addresses, bias.contiguous()


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
        tokens = qkv.shape[1]
        _heads[(batch * tokens,)](
            qkv, first if norm_q is None else norm_q, first if norm_k is None else norm_k, out, tokens, batch, start,
            qkv.stride(0), qkv.stride(1), out.stride(0), eps, HEADS=heads, SIZE=size, NORM=norm_q is not None,
            PARTS=copied, HEADS_2=triton.next_power_of_2(heads), SIZE_2=triton.next_power_of_2(size), num_warps=4,
        )  # fmt: skip
        start += tokens
    found = [x.permute(1, 2, 0, 3) for x in out]
    if copied == 2:
        found.append(first[..., 2 * heads * size :].unflatten(-1, (heads, size)).transpose(1, 2))
    return tuple(found)


@triton.jit(do_not_specialize=["tokens", "batches", "first", "start", "limit", "plane"])
def _send_heads(qkv, norm_q, norm_k, q, addresses, tokens, batches, first, start, limit, by_batch, by_token, plane,
                eps, RANKS: tl.constexpr, SCATTER: tl.constexpr, SHARE: tl.constexpr, HEADS: tl.constexpr,
                SIZE: tl.constexpr, NORM: tl.constexpr, HEADS_2: tl.constexpr, SIZE_2: tl.constexpr):  # fmt: skip
    """One token of one stream, for all ranks: its keys and values, or with SCATTER each rank's heads of all three.

    It is row `first + token` of this rank's tokens and row `start + token` of all; from `limit` on, rows are padding.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head, channel = tl.arange(0, HEADS_2)[:, None], tl.arange(0, SIZE_2)[None, :]
    inside = (head < HEADS) & (channel < SIZE)
    at = head * SIZE + channel
    real = start + token < limit
    for part in tl.static_range(3):
        x = tl.load(qkv + batch * by_batch + token * by_token + part * HEADS * SIZE + at, inside, 0.0)
        if NORM and part < 2:
            x = _rms_norm(x, norm_q if part == 0 else norm_k, channel, eps, SIZE)
        if SCATTER:
            there = part * tl.cast(plane, tl.int64) + ((start + token) * batches + batch) * SHARE * SIZE + at
            for rank in tl.static_range(RANKS):
                mine = inside & (head // SHARE == rank) & real
                tl.store(_memory(addresses, rank, qkv) + there - rank * SHARE * SIZE, x, mine)
        elif part == 0:
            tl.store(q + ((first + token) * batches + batch) * HEADS * SIZE + at, x, inside)
        else:
            there = (part - 1) * tl.cast(plane, tl.int64) + ((start + token) * batches + batch) * HEADS * SIZE + at
            for rank in tl.static_range(RANKS):
                tl.store(_memory(addresses, rank, qkv) + there, x, inside & real)


def gather_heads(parts, lengths: Sequence[int], heads: int, eps: float, others: Exchange, first: bool):
    """This rank's queries, and all keys and values, [B, heads, tokens, head_size], stored with the tokens first."""
    qkv = parts[0][0]
    batch, size, total = len(qkv), qkv.shape[-1] // (3 * heads), sum(lengths)
    q = qkv.new_empty(sum(x.shape[1] for x, _, _ in parts), batch, heads, size)
    slot = others.slot(2 * total * batch * heads * size * q.element_size(), first=first)
    _send(parts, lengths, q, slot, heads, eps, others, scatter=False)
    k, v = slot.view(q.dtype, 2, total, batch, heads, size)
    return tuple(x.permute(1, 2, 0, 3) for x in (q, k, v))


def scatter_heads(parts, lengths: Sequence[int], heads: int, ranks: int, eps: float, others: Exchange, first: bool):
    """All queries, keys and values of this rank's heads, [B, heads / ranks, tokens, head_size]."""
    qkv = parts[0][0]
    batch, size, total = len(qkv), qkv.shape[-1] // (3 * heads), sum(lengths)
    slot = others.slot(3 * total * batch * heads // ranks * size * qkv.element_size(), first=first)
    _send(parts, lengths, qkv, slot, heads, eps, others, scatter=True)
    return tuple(x.permute(1, 2, 0, 3) for x in slot.view(qkv.dtype, 3, total, batch, heads // ranks, size))


def _send(parts, lengths, q, slot: Slot, heads: int, eps: float, others: Exchange, *, scatter: bool) -> None:
    ranks, batch, size = len(slot.addresses), len(parts[0][0]), parts[0][0].shape[-1] // (3 * heads)
    plane = sum(lengths) * batch * heads * size // (ranks if scatter else 1)
    first = start = 0
    for (qkv, norm_q, norm_k), length in zip(parts, lengths, strict=True):
        tokens = qkv.shape[1]
        _send_heads[(batch * tokens,)](
            qkv, qkv if norm_q is None else norm_q, qkv if norm_k is None else norm_k, q, slot.addresses, tokens, batch,
            first, start + others.rank * tokens, start + length, qkv.stride(0), qkv.stride(1), plane, eps, RANKS=ranks,
            SCATTER=scatter, SHARE=heads // ranks, HEADS=heads, SIZE=size, NORM=norm_q is not None,
            HEADS_2=triton.next_power_of_2(heads), SIZE_2=triton.next_power_of_2(size), num_warps=4,
        )  # fmt: skip
        first, start = first + tokens, start + length
    slot.barrier()


@triton.jit(do_not_specialize=["tokens", "batches", "first", "start"])
def _return_heads(whole, addresses, tokens, batches, first, start, by_batch, by_head, by_token, here,
                  SHARE: tl.constexpr, RANKS: tl.constexpr, SIZE: tl.constexpr, SHARE_2: tl.constexpr,
                  SIZE_2: tl.constexpr):  # fmt: skip
    """One token of one stream, computed here for some heads, to the rank that has the token."""
    row = tl.program_id(0).to(tl.int64)
    token, batch = row // batches, row % batches
    head, channel = tl.arange(0, SHARE_2)[:, None], tl.arange(0, SIZE_2)[None, :]
    inside = (head < SHARE) & (channel < SIZE)
    x = tl.load(whole + batch * by_batch + head * by_head + (start + token) * by_token + channel, inside, 0.0)
    owner, there = token // tokens, first + token % tokens
    to = _memory(addresses, owner, whole) + ((there * batches + batch) * RANKS + here) * SHARE * SIZE
    tl.store(to + head * SIZE + channel, x, inside)


def return_heads(whole: torch.Tensor, parts, lengths: Sequence[int], heads: int, others: Exchange) -> torch.Tensor:
    """[B, heads / ranks, all tokens, head_size] on each rank -> [B, heads, this rank's tokens, head_size]."""
    batch, share, _, size = whole.shape
    assert whole.stride(3) == 1
    rows = sum(qkv.shape[1] for qkv, _, _ in parts)
    slot = others.slot(rows * batch * heads * size * whole.element_size(), first=False)
    first = start = 0
    for (qkv, _, _), length in zip(parts, lengths, strict=True):
        _return_heads[(batch * length,)](
            whole, slot.addresses, qkv.shape[1], batch, first, start, *whole.stride()[:3], others.rank, SHARE=share,
            RANKS=heads // share, SIZE=size, SHARE_2=triton.next_power_of_2(share),
            SIZE_2=triton.next_power_of_2(size), num_warps=2,
        )  # fmt: skip
        first, start = first + qkv.shape[1], start + length
    slot.barrier()
    # A copy, because it may be read after a later exchange has overwritten the slot.
    return slot.view(whole.dtype, rows, batch, heads, size).clone().permute(1, 2, 0, 3)
