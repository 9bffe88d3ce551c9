"""Attention over one or two token streams: the only place where image and text interact."""

from __future__ import annotations

from ..network import functional as F
from ..network.context_parallel import QKV, Stream, attend
from ..network.layers import ACTIVATION_SCALE, Linear, RMSNorm
from ..network.module import Module, ModuleList
from ..network.network import Network, Tensor

HEADROOM = 8.0
"""With attention in FP8, the scale of its values over that of its result, which is an average of values: they can be
larger."""


class Attention(Module):
    """diffusers' `Attention` as SD3 uses it, with diffusers' parameter names.

    Args:
        text: 'none' for image tokens alone (`attn2`), 'full', or 'keys' if the text is attended to
            but its own output is not used (the last block).
    """

    def __init__(self, dim: int, head_dim: int, qk_norm: str | None, text: str):
        self.head_dim = head_dim
        self.text = text
        if qk_norm:
            self.norm_q, self.norm_k = RMSNorm(head_dim), RMSNorm(head_dim)
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        if text != "none":
            self.add_k_proj, self.add_v_proj, self.add_q_proj = (Linear(dim, dim) for _ in range(3))
        self.to_out = ModuleList([Linear(dim, dim)])
        if text == "full":
            self.to_add_out = Linear(dim, dim)
        if text != "none" and qk_norm:
            self.norm_added_q, self.norm_added_k = RMSNorm(head_dim), RMSNorm(head_dim)

    def forward(self, x, c=None, *, streams: list[Stream]):
        parts = [self.image_qkv(x)]
        if c is not None:
            parts.append(self.text_qkv(c))
        value_scale = self.value_scale(x.network) if x.network.fp8_attention else None
        image, *text = (self.merge_heads(y) for y in attend(streams, parts, value_scale))
        out = self.to_out[0](image)
        if self.text == "none":
            return out
        return out, self.to_add_out(text[0]) if self.text == "full" else None

    def value_scale(self, network: Network) -> Tensor:
        """Of values in FP8: `HEADROOM` times that of the result, as the output projections round it.

        Queries and keys need none, since their norms keep them near 1. Raises `ValueError` without these norms.
        """
        if not hasattr(self, "norm_q"):
            raise ValueError("fp8_attention needs a model that normalizes queries and keys, as SD3.5 does")
        projections = [self.to_out[0], *([self.to_add_out] if self.text == "full" else [])]
        return network.largest_scale([f"{layer.path}.{ACTIVATION_SCALE}" for layer in projections], HEADROOM)

    def image_qkv(self, x: Tensor) -> QKV:
        q, k, v = (self.split_heads(f(x)) for f in (self.to_q, self.to_k, self.to_v))
        return QKV(self.norm_q(q), self.norm_k(k), v) if hasattr(self, "norm_q") else QKV(q, k, v)

    def text_qkv(self, c: Tensor) -> QKV:
        q, k, v = (self.split_heads(f(c)) for f in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        return QKV(self.norm_added_q(q), self.norm_added_k(k), v) if hasattr(self, "norm_added_q") else QKV(q, k, v)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, N, heads * d] -> [B, heads, N, d]; a tp rank has only its own heads."""
        return F.transpose(F.reshape(x, (0, 0, x.shape[-1] // self.head_dim, self.head_dim)), 0, 2, 1, 3)

    def merge_heads(self, x: Tensor) -> Tensor:
        return F.reshape(F.transpose(x, 0, 2, 1, 3), (0, 0, x.shape[1] * self.head_dim))
