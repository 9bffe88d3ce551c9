"""Embeddings: latents to image tokens; timestep and pooled text to the conditioning vector."""

from __future__ import annotations

import math

import torch

from ..network import functional as F
from ..network.layers import Conv2d, Linear, SiLU
from ..network.module import Module, Sequential
from ..network.network import Parameter, Tensor


class PatchEmbed(Module):
    """Latents [B, C, H, W] -> tokens [B, (H/p)(W/p), D], plus the center crop of the position table.

    The engine holds only the part of the table that its largest resolution needs: `max_patches`,
    (rows, columns).
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int, table_size: int):
        self.proj = Conv2d(in_channels, dim, patch_size)
        self.pos_embed = Parameter(1, table_size * table_size, dim)
        self.table_size = table_size
        self.dim = dim

    def forward(self, latent, *, max_patches: tuple[int, int]):
        patches = self.proj(latent)
        tokens = F.transpose(F.reshape(patches, (0, self.dim, -1)), 0, 2, 1)
        return tokens + self.positions(patches, max_patches)

    def positions(self, patches: Tensor, max_patches: tuple[int, int]) -> Tensor:
        """[1, rows * columns, D] for patches [B, D, rows, columns]: diffusers crops at (table - size) // 2."""
        rows, columns = F.size(patches, 2), F.size(patches, 3)
        n = self.table_size
        first = [(n - most) // 2 for most in max_patches]
        crop = {1: (first[0], max_patches[0]), 2: (first[1], max_patches[1])}
        table = patches.network.weight(self.pos_embed, (1, n, n, self.dim), crop)
        table = F.narrow(table, 1, (n - rows) // 2 - first[0], rows)
        table = F.narrow(table, 2, (n - columns) // 2 - first[1], columns)
        return F.reshape(table, (1, -1, self.dim))


class Timesteps(Module):
    """float32 timestep [B], 0 to 1000 -> float32 [B, channels]: cosines, then sines."""

    def __init__(self, channels: int = 256):
        self.channels = channels

    def forward(self, timestep):
        half = self.channels // 2
        # The same float32 arithmetic as diffusers' get_timestep_embedding, so the same frequencies.
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
        frequencies = timestep.network.values(exponent.exp().tolist(), "float32", (1, half))
        angles = F.reshape(timestep, (-1, 1)) * frequencies
        return F.concat([F.unary(angles, "COS"), F.unary(angles, "SIN")], 1)


class CombinedTimestepTextProjEmbeddings(Module):
    """timestep [B] float32, pooled projections [B, P] -> conditioning vector [B, D]."""

    def __init__(self, dim: int, pooled_dim: int):
        self.time_proj = Timesteps()
        self.timestep_embedder = Sequential(linear_1=Linear(256, dim), act=SiLU(), linear_2=Linear(dim, dim))
        self.text_embedder = Sequential(linear_1=Linear(pooled_dim, dim), act_1=SiLU(), linear_2=Linear(dim, dim))

    def forward(self, timestep, pooled):
        # Sinusoids are computed in float32 and rounded to the network's dtype only here.
        time = self.timestep_embedder(F.cast(self.time_proj(timestep), pooled.dtype))
        return time + self.text_embedder(pooled)
