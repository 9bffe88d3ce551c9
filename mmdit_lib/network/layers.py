"""Common transformer layers and their parameters."""

from __future__ import annotations

from ..config import FP8
from . import functional as F
from .module import Module, ModuleList
from .network import Parameter, Tensor

WEIGHT_SCALE, ACTIVATION_SCALE = "weights_scaling_factor", "activation_scaling_factor"
"""A quantized linear layer's tensors besides weight and bias, named as in TensorRT-LLM; both [1] and float32."""


class Linear(Module):
    """x W^T + b on the last dimension; the network's sharding table decides how it is sharded over tp ranks.

    If the checkpoint has W in FP8, x is rounded to FP8 too.
    """

    def __init__(self, in_features: int, out_features: int):
        self.weight = Parameter(out_features, in_features)
        self.bias = Parameter(out_features)

    def forward(self, x):
        network = x.network
        style, group = network.sharding.rule_for(self.path).style, network.mapping.tp_group
        ones = (1,) * (len(x.shape) - 1)
        bias = network.weights[self.bias.name].shape
        stored = network.weight(self.weight, (*ones[1:], *network.weights[self.weight.name].shape))
        if stored.dtype == FP8:
            x, stored = self.round_input(x), F.dequantize(stored, network.scale(f"{self.path}.{WEIGHT_SCALE}"))
        y = F.matmul(x, stored, transpose_b=True)
        if style == "rowwise":
            y = F.all_reduce(y, group)
        y = y + network.weight(self.bias, (*ones, *bias))
        return gather_features(y, group) if style == "colwise_gather" else y

    def round_input(self, x: Tensor) -> Tensor:
        """x rounded to FP8, in its own dtype again."""
        network, name = x.network, f"{self.path}.{ACTIVATION_SCALE}"
        key = x.itensor.name, network.weights[name].item()
        if key not in network.rounded:
            scale = network.scale(name)
            network.rounded[key] = F.round_to_fp8(x, scale)
        return network.rounded[key]


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
