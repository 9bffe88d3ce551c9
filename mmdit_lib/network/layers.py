"""The layers that the MMDiT is made of, and their parameters."""

from __future__ import annotations

from . import functional as F
from .module import Module, ModuleList, Parameter
from .network import Tensor


class Linear(Module):
    """x W^T + b on the last dimension; how it is cut over the tp ranks stands in the plan."""

    def __init__(self, in_features: int, out_features: int):
        self.weight = Parameter(out_features, in_features)
        self.bias = Parameter(out_features)

    def forward(self, network, x):
        ones = (1,) * (len(x.shape) - 1)
        style, group = network.style(), network.mapping.tp_group
        weight, bias = network.weights[f"{self.path}.weight"], network.weights[f"{self.path}.bias"]
        y = F.matmul(x, network.weight("weight", ones[1:] + tuple(weight.shape)), transpose_b=True)
        if style == "rowwise":
            y = F.all_reduce(y, group)
        y = y + network.weight("bias", ones + tuple(bias.shape))
        return gather_features(y, group) if style == "colwise_gather" else y


def gather_features(x: Tensor, group) -> Tensor:
    """The last dimension of every tp rank, side by side."""
    if len(group) == 1:
        return x
    features = x.shape[-1]
    rank = len(x.shape)
    parts = F.all_gather(F.reshape(x, (1, *[F.size(x, i) for i in range(rank - 1)], features)), group)
    parts = F.transpose(parts, *range(1, rank), 0, rank)
    return F.reshape(parts, (*[0] * (rank - 1), len(group) * features))


class LayerNorm(Module):
    """Without parameters, as everywhere in SD3."""

    def __init__(self, eps: float = 1e-6):
        self.eps = eps

    def forward(self, network, x):
        return F.layer_norm(x, self.eps)


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the quotient in float32 (diffusers' `RMSNorm`)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        self.weight = Parameter(dim)
        self.eps = eps

    def forward(self, network, x):
        wide = F.cast(x, "float32")
        scale = F.unary(F.unary(F.mean(wide * wide, len(x.shape) - 1) + self.eps, "SQRT"), "RECIP")
        ones = (1,) * (len(x.shape) - 1)
        return F.cast(wide * scale, x.dtype) * network.weight("weight", (*ones, x.shape[-1]))


class SiLU(Module):
    def forward(self, network, x):
        return F.silu(x)


class GELU(Module):
    """A linear layer and GELU in its tanh form."""

    def __init__(self, in_features: int, out_features: int):
        self.proj = Linear(in_features, out_features)

    def forward(self, network, x):
        return F.gelu_tanh(self.proj(x))


class FeedForward(Module):
    def __init__(self, dim: int):
        self.net = ModuleList([GELU(dim, 4 * dim), Linear(4 * dim, dim)])

    def forward(self, network, x):
        for layer in self.net:
            x = layer(x)
        return x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D], shift and scale [B, 1, D]."""
    return x * (scale + 1.0) + shift


class AdaLayerNorm(Module):
    """Layer norm whose shift and scale, and the gates after it, come from the conditioning vector.

    `forward` returns `count` vectors [B, 1, D] in diffusers' order; `normalise` applies a pair.
    """

    def __init__(self, dim: int, count: int):
        self.silu = SiLU()
        self.linear = Linear(dim, count * dim)
        self.norm = LayerNorm()
        self.count = count

    def modulation(self, temb: Tensor) -> tuple[Tensor, ...]:
        vectors = self.linear(self.silu(temb))
        vectors = F.reshape(vectors, (0, self.count, vectors.shape[-1] // self.count))
        return F.chunk(vectors, self.count, 1)


class AdaLayerNormZero(AdaLayerNorm):
    """-> modulated x, gate_msa, shift_mlp, scale_mlp, gate_mlp."""

    def __init__(self, dim: int):
        super().__init__(dim, 6)

    def forward(self, network, x, temb):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(temb)
        return modulate(self.norm(x), shift_msa, scale_msa), gate_msa, shift_mlp, scale_mlp, gate_mlp


class SD35AdaLayerNormZeroX(AdaLayerNorm):
    """As `AdaLayerNormZero`, and -> x modulated a second time, gate_msa2, for the second attention."""

    def __init__(self, dim: int):
        super().__init__(dim, 9)

    def forward(self, network, x, temb):
        shift, scale, gate_msa, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate_msa2 = self.modulation(temb)
        x = self.norm(x)
        first, second = modulate(x, shift, scale), modulate(x, shift2, scale2)
        return first, gate_msa, shift_mlp, scale_mlp, gate_mlp, second, gate_msa2


class AdaLayerNormContinuous(AdaLayerNorm):
    """-> modulated x; scale comes before shift here."""

    def __init__(self, dim: int):
        super().__init__(dim, 2)

    def forward(self, network, x, temb):
        scale, shift = self.modulation(temb)
        return modulate(self.norm(x), shift, scale)
