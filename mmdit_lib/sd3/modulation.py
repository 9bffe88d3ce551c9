"""Adaptive layer norms: the conditioning vector `temb` sets the shift, scale and gate of every branch."""

from __future__ import annotations

from typing import NamedTuple

from ..network import functional as F
from ..network.layers import LayerNorm, Linear, SiLU
from ..network.module import Module
from ..network.network import Tensor


class Modulation(NamedTuple):
    """Vectors [B, 1, D] of one branch: `x + gate * branch(modulate(norm(x)))`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def modulate(self, x: Tensor) -> Tensor:
        return modulate(x, self.shift, self.scale)


class Branch(NamedTuple):
    """A branch whose modulated input [B, N, D] is already computed, and its gate [B, 1, D]."""

    x: Tensor
    gate: Tensor


class Norm1(NamedTuple):
    """The outputs of a block's first norm; flattened, they are in diffusers' order."""

    attn: Branch
    mlp: Modulation
    attn2: Branch | None = None


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D], shift and scale [B, 1, D]."""
    return x * (scale + 1.0) + shift


class AdaLayerNorm(Module):
    """A layer norm, and a linear layer from the conditioning vector [B, D] to `count` vectors [B, 1, D]."""

    def __init__(self, dim: int, count: int):
        self.silu = SiLU()
        self.linear = Linear(dim, count * dim)
        self.norm = LayerNorm()
        self.count = count

    def vectors(self, temb: Tensor) -> tuple[Tensor, ...]:
        """The modulation vectors, in diffusers' order."""
        vectors = self.linear(self.silu(temb))
        vectors = F.reshape(vectors, (0, self.count, vectors.shape[-1] // self.count))
        return F.chunk(vectors, self.count, 1)


class AdaLayerNormZero(AdaLayerNorm):
    """x, temb -> `Norm1` for attention, MLP and, if `dual`, a second attention (diffusers' `SD35AdaLayerNormZeroX`)."""

    def __init__(self, dim: int, dual: bool = False):
        super().__init__(dim, 9 if dual else 6)

    def forward(self, x, temb) -> Norm1:
        vectors = self.vectors(temb)
        attn, mlp, *attn2 = (Modulation(*vectors[i : i + 3]) for i in range(0, self.count, 3))
        x = self.norm(x)
        first, *second = (Branch(branch.modulate(x), branch.gate) for branch in (attn, *attn2))
        return Norm1(first, mlp, *second)


class AdaLayerNormContinuous(AdaLayerNorm):
    """x, temb -> modulated x. Here the linear layer returns the scale before the shift."""

    def __init__(self, dim: int):
        super().__init__(dim, 2)

    def forward(self, x, temb) -> Tensor:
        scale, shift = self.vectors(temb)
        return modulate(self.norm(x), shift, scale)
