"""Common transformer layers and their parameters."""

from __future__ import annotations

from . import functional as F
from .module import Module, ModuleList
from .network import Parameter, Tensor


class Linear(Module):
    """x W^T + b on the last dimension; the network's sharding table decides how it is sharded over tp ranks."""

    def __init__(self, in_features: int, out_features: int):
        self.weight = Parameter(out_features, in_features)
        self.bias = Parameter(out_features)

    def forward(self, x):
        network = x.network
        style, group = network.sharding.rule_for(self.path).style, network.mapping.tp_group
        ones = (1,) * (len(x.shape) - 1)
        weight, bias = (network.weights[parameter.name].shape for parameter in (self.weight, self.bias))
        y = F.matmul(x, network.weight(self.weight, (*ones[1:], *weight)), transpose_b=True)
        if style == "rowwise":
            y = F.all_reduce(y, group)
        y = y + network.weight(self.bias, (*ones, *bias))
        return gather_features(y, group) if style == "colwise_gather" else y


def gather_features(x: Tensor, group) -> Tensor:
    """All-gather the last dimension over the tp ranks."""
    if len(group) == 1:
        return x
    features = x.shape[-1]
    rank = len(x.shape)
    parts = F.all_gather(F.reshape(x, (1, *[F.size(x, i) for i in range(rank - 1)], features)), group)
    parts = F.transpose(parts, *range(1, rank), 0, rank)
    return F.reshape(parts, (*[0] * (rank - 1), len(group) * features))


class Conv2d(Module):
    """A convolution whose stride is its kernel size."""

    def __init__(self, in_channels: int, out_channels: int, size: int):
        self.weight = Parameter(out_channels, in_channels, size, size)
        self.bias = Parameter(out_channels)
        self.stride = size

    def forward(self, x):
        return F.conv2d(x, x.network.weight(self.weight), x.network.weight(self.bias), self.stride)


class LayerNorm(Module):
    """Layer norm over the last dimension, without parameters."""

    def __init__(self, eps: float = 1e-6):
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.eps)


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the quotient in float32 (diffusers' `RMSNorm`)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        self.weight = Parameter(dim)
        self.eps = eps

    def forward(self, x):
        wide = F.cast(x, "float32")
        scale = F.unary(F.unary(F.mean(wide * wide, len(x.shape) - 1) + self.eps, "SQRT"), "RECIP")
        ones = (1,) * (len(x.shape) - 1)
        return F.cast(wide * scale, x.dtype) * x.network.weight(self.weight, (*ones, x.shape[-1]))


class SiLU(Module):
    def forward(self, x):
        return F.silu(x)


class GELU(Module):
    """A linear layer followed by the tanh approximation of GELU."""

    def __init__(self, in_features: int, out_features: int):
        self.proj = Linear(in_features, out_features)

    def forward(self, x):
        return F.gelu_tanh(self.proj(x))


class FeedForward(Module):
    """diffusers' MLP: `net.0.proj` to four times the width, GELU, `net.1` back."""

    def __init__(self, dim: int):
        self.net = ModuleList([GELU(dim, 4 * dim), Linear(4 * dim, dim)])

    def forward(self, x):
        for layer in self.net:
            x = layer(x)
        return x
