"""Context parallelism: each cp rank holds part of the tokens of every stream (image, text).

A stream of N tokens is split into cp parts of ceil(N / cp) rows; on the last ranks, rows past the
end are zero padding. Padded rows never enter attention as keys: the gathered keys and values are sliced
back to N rows before the softmax, so the result is exact for every N. With cp = 1 all of this is the identity.
"""

from __future__ import annotations

from typing import NamedTuple

from . import functional as F
from .network import Tensor


class QKV(NamedTuple):
    """Each [batch, heads, tokens, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Stream(NamedTuple):
    """A token stream: its full length and the number of rows that each cp rank holds."""

    length: F.Size
    local: F.Size

    @classmethod
    def split_over(cls, length: F.Size, ranks: int) -> Stream:
        return cls(length, length if ranks == 1 else F.ceil_div(length, ranks))

    def split(self, x: Tensor) -> Tensor:
        """This rank's rows of [B, length, ...]."""
        mapping = x.network.mapping
        if mapping.cp_size == 1:
            return x
        return F.narrow(x, 1, self.local * mapping.cp_rank, self.local, pad=True)


def attend(streams: list[Stream], parts: list[QKV], value_scale: Tensor | None = None) -> list[Tensor]:
    """Joint attention over all streams: every token sees every token. [B, heads, local tokens, d] per stream.

    `value_scale` is that of `F.attention`; raises `ValueError` if it is given for several cp ranks.
    """
    mapping = parts[0].q.network.mapping
    if mapping.cp_size == 1:
        return uncat(F.attention(*map(cat, zip(*parts, strict=True)), value_scale), [s.length for s in streams])
    if value_scale is not None:
        raise ValueError("fp8_attention does not work with context parallelism")
    return (ulysses if mapping.layout.cp_method == "ulysses" else gathered)(streams, parts)


def cat(tensors) -> Tensor:
    return tensors[0] if len(tensors) == 1 else F.concat(list(tensors), 2)


def uncat(x: Tensor, lengths: list[F.Size]) -> list[Tensor]:
    """Undo `cat`."""
    if len(lengths) == 1:
        return [x]
    first, second = lengths
    return [F.narrow(x, 2, 0, first), F.narrow(x, 2, first, second)]


def gathered(streams: list[Stream], parts: list[QKV]) -> list[Tensor]:
    """One all-gather of keys and values; queries stay local."""
    mapping = parts[0].q.network.mapping
    head_dim = parts[0].q.shape[-1]
    keys_values = F.concat([cat([p.k for p in parts]), cat([p.v for p in parts])], 3)
    mine = F.reshape(keys_values, (1, -1, *[F.size(keys_values, i) for i in (1, 2, 3)]))
    everyone = F.all_gather(mine, mapping.cp_group)
    everyone = F.transpose(everyone, 1, 2, 0, 3, 4)  # [B, heads, cp, local rows, 2d]
    whole = cat(whole_streams(everyone, streams))
    k, v = F.narrow(whole, 3, 0, head_dim), F.narrow(whole, 3, head_dim, head_dim)
    return uncat(F.attention(cat([p.q for p in parts]), k, v), [s.local for s in streams])


def whole_streams(x: Tensor, streams: list[Stream]) -> list[Tensor]:
    """[B, heads, cp, rows of all streams, c] -> per stream [B, heads, length, c], without the padded rows."""
    _, heads, ranks, _, channels = x.shape
    start, found = 0, []
    for stream in streams:
        rows = F.narrow(x, 3, start, stream.local)
        rows = F.reshape(rows, (-1, heads, stream.local * ranks, channels))
        found.append(F.narrow(rows, 2, 0, stream.length))
        start = start + stream.local
    return found


def ulysses(streams: list[Stream], parts: list[QKV]) -> list[Tensor]:
    """Each rank runs attention over all tokens for its share of the heads; one all-to-all before, one after."""
    mapping = parts[0].q.network.mapping
    ranks = mapping.cp_size
    qkv = F.concat([cat([getattr(p, name) for p in parts]) for name in QKV._fields], 3)
    batch, heads, rows, channels = (F.size(qkv, i) for i in range(4))
    head_dim, share = channels // 3, heads // ranks
    # Scatter heads, gather tokens: dimension 0 is the peer, before and after.
    by_peer = F.transpose(F.reshape(qkv, (batch, ranks, share, rows, channels)), 1, 0, 2, 3, 4)
    whole = F.transpose(F.all_to_all(by_peer, mapping.cp_group), 1, 2, 0, 3, 4)
    whole = cat(whole_streams(whole, streams))
    out = F.attention(*(F.narrow(whole, 3, i * head_dim, head_dim) for i in range(3)))
    # Restore the padded rows, then scatter tokens and gather heads.
    pieces = []
    for stream, x in zip(streams, uncat(out, [s.length for s in streams]), strict=True):
        x = F.narrow(x, 2, 0, stream.local * ranks, pad=True)
        pieces.append(F.reshape(x, (batch, share, ranks, stream.local, head_dim)))
    by_peer = F.transpose(pieces[0] if len(pieces) == 1 else F.concat(pieces, 3), 2, 0, 1, 3, 4)
    mine = F.transpose(F.all_to_all(by_peer, mapping.cp_group), 1, 0, 2, 3, 4)
    return uncat(F.reshape(mine, (batch, heads, rows, head_dim)), [s.local for s in streams])


def split_batch(x: Tensor) -> Tensor:
    """This cfg rank's half of the batch: the conditional or the unconditional rows."""
    mapping = x.network.mapping
    if mapping.cfg_size == 1:
        return x
    rest = [F.size(x, i) for i in range(1, len(x.shape))]
    halves = F.reshape(x, (mapping.cfg_size, -1, *rest))
    return F.reshape(F.narrow(halves, 0, mapping.cfg_rank, 1), (-1, *rest))


def gather_output(x: Tensor, image: Stream) -> Tensor:
    """One all-gather over the cfg and cp ranks: [b, local, c] -> [B, length, c] on each."""
    mapping = x.network.mapping
    group = mapping.output_group
    if len(group) == 1:
        return x
    local, channels = F.size(x, 1), x.shape[2]
    everyone = F.all_gather(F.reshape(x, (1, -1, local, channels)), group)
    everyone = F.reshape(everyone, (mapping.cfg_size, mapping.cp_size, -1, local, channels))
    everyone = F.transpose(everyone, 0, 2, 1, 3, 4)
    rows = F.reshape(everyone, (-1, local * mapping.cp_size, channels))
    return F.narrow(rows, 1, 0, image.length)
