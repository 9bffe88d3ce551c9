"""Fused operators that communicate: attention under context parallelism, and the sums of tensor parallelism.

If GPUs can access each other's memory, Triton kernels write their results into the other ranks' memory or read theirs
(see `symmetric.py`); otherwise the same formula runs with a collective of `torch.distributed`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import kernels
from .attention import attention
from .collectives import dist_collective
from .linears import fp8_linear
from .symmetric import exchange


def gathered_attention(*streams, heads: int, eps: float, scale: float, group: str, size: int, first: bool = False):
    """`qkv_attention` of this rank's queries over the keys and values of all ranks.

    Args:
        streams: for each stream, the inputs of `qkv_attention` with this rank's S tokens, and the stream's length over
            all ranks as a tuple of one int. Rank r has the tokens from r S on; rows past the length are padding.
        group: name of the process group of `size` ranks.
        first: whether this is the step's first exchange in its group.

    Returns:
        [B, heads, this rank's tokens of all streams, head_size].
    """
    parts, lengths = _parts(streams)
    x = parts[0][0]
    if x.is_meta:
        return _like_attention(parts, heads)
    if kernels.on_gpu(x) and (others := exchange(x, group)):
        from . import triton_kernels

        q, k, v = triton_kernels.gather_heads(parts, lengths, heads, eps, others, first)
    else:
        q, k, v = kernels.split_heads(*(tensor for part in parts for tensor in part), heads=heads, eps=eps)
        everyone = dist_collective(torch.cat([k, v], -1)[None], operation="ALL_GATHER", group=group, size=size)
        k, v = _whole(everyone, parts, lengths).chunk(2, -1)
    return attention(q, k, v, scale)


def ulysses_attention(*streams, heads: int, eps: float, scale: float, group: str, size: int, first: bool = False):
    """As `gathered_attention`, but each rank computes the attention of some of the heads over all tokens."""
    parts, lengths = _parts(streams)
    x = parts[0][0]
    if x.is_meta:
        return _like_attention(parts, heads)
    others = exchange(x, group) if kernels.on_gpu(x) else None
    if others:
        from . import triton_kernels

        q, k, v = triton_kernels.scatter_heads(parts, lengths, heads, size, eps, others, first)
        whole = attention(q, k, v, scale)
        return triton_kernels.return_heads(whole, parts, lengths, heads, others)
    qkv = torch.cat(kernels.split_heads(*(tensor for part in parts for tensor in part), heads=heads, eps=eps), -1)
    by_peer = qkv.unflatten(1, (size, -1)).transpose(0, 1)
    everyone = dist_collective(by_peer, operation="ALL_TO_ALL", group=group, size=size)
    whole = attention(*_whole(everyone, parts, lengths).chunk(3, -1), scale)
    pieces = []
    for (qkv, *_), length, piece in zip(parts, lengths, whole.split(lengths, 2), strict=True):
        tokens = qkv.shape[1]
        pieces.append(F.pad(piece, (0, 0, 0, tokens * size - length)).unflatten(2, (size, tokens)))
    by_peer = torch.cat(pieces, 3).permute(2, 0, 1, 3, 4)
    mine = dist_collective(by_peer, operation="ALL_TO_ALL", group=group, size=size)
    return mine.transpose(0, 1).flatten(1, 2)


def reduced_gated_sum(
    x, gate, *linear, group: str, size: int, to_type: str | None = None, first: bool = False
) -> torch.Tensor:
    """x + gate y, where y is the sum over the ranks of a linear layer without bias, plus its bias.

    `linear`: the arguments of its `linear`, or of its `fp8_linear`, with the latter's `to_type`.
    """
    if others := _pair(x, group, size):
        from . import triton_kernels

        return triton_kernels.reduced_gated_sum(x, gate, linear, others, first)
    return kernels.gated_sum(x, gate, _reduced(linear, to_type, group, size))


def reduced_gated_norm(
    x, gate, *rest, inputs: int, eps: float, group: str, size: int, to_type: str | None = None, first: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_norm` of the same y. The linear layer has `inputs` arguments; a third value after them is the scale
    of the result in FP8, as in `gated_norm_fp8`.
    """
    linear, (scale, shift, *fp8_scale) = rest[:inputs], rest[inputs:]
    if others := _pair(x, group, size):
        from . import triton_kernels

        return triton_kernels.reduced_gated_norm(x, gate, linear, scale, shift, eps, others, first, *fp8_scale)
    norm = kernels.gated_norm_fp8 if fp8_scale else kernels.gated_norm
    return norm(x, gate, _reduced(linear, to_type, group, size), scale, shift, *fp8_scale, eps=eps)


def _pair(x: torch.Tensor, group: str, size: int):
    """The exchange between two ranks, each reading the other's part once; with more, an all-reduce moves less."""
    return exchange(x, group) if size == 2 and kernels.on_gpu(x) else None


def _reduced(linear, to_type: str | None, group: str, size: int) -> torch.Tensor:
    h, weight, *scales, bias = linear
    if scales:
        partial = fp8_linear(h, weight, *scales, None, to_type=to_type)
    else:
        partial = F.linear(h, weight.reshape(weight.shape[-2:]))
    if not h.is_meta:
        partial = dist_collective(partial, operation="ALL_REDUCE", group=group, size=size)
    return partial + bias


def _parts(streams) -> tuple[list[tuple], list[int]]:
    parts = [streams[i : i + 3] for i in range(0, len(streams), 4)]
    return parts, [length for (length,) in streams[3::4]]


def _like_attention(parts: list[tuple], heads: int) -> torch.Tensor:
    x = parts[0][0]
    return x.new_empty(sum(p[0].shape[1] for p in parts), len(x), heads, x.shape[-1] // 3 // heads).permute(1, 2, 0, 3)


def _whole(everyone: torch.Tensor, parts: list[tuple], lengths: list[int]) -> torch.Tensor:
    """[ranks, B, heads, tokens of all streams, c] -> [B, heads, all tokens, c], without padding."""
    pieces = everyone.permute(1, 2, 0, 3, 4).split([qkv.shape[1] for qkv, *_ in parts], 3)
    return torch.cat([p.flatten(2, 3)[:, :, :n] for p, n in zip(pieces, lengths, strict=True)], 2)


def slot_bytes(function, arguments: tuple, options: dict) -> int:
    """Bytes of symmetric memory that one of these operators needs."""
    if function in (reduced_gated_sum, reduced_gated_norm):
        return arguments[0].nbytes if options["size"] == 2 else 0
    if function not in (gathered_attention, ulysses_attention):
        return 0
    parts, lengths = _parts(arguments)
    qkv = parts[0][0][:, 0].nbytes  # of one token of each image
    return sum(lengths) * (qkv * 2 // 3 if function is gathered_attention else qkv // options["size"])
