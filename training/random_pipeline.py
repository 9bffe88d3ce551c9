"""A complete Stable Diffusion 3 pipeline with random weights, for tests that need no meaningful picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mmdit_lib.checkpoint.random_weights import draw_weight
from mmdit_lib.config import Dtype

from .model import RANDOM, make_parts, save_pipeline

WORDS = ["a", "the", "red", "green", "blue", "circle", "square", "triangle", "on", "background", "left", "of", ","]


def make_random_pipeline(
    folder: str | Path, *, seed: int = 0, dtype: Dtype = "float32", **transformer_overrides
) -> Path:
    """Write a diffusers `StableDiffusion3Pipeline` folder with random weights; the same seed gives the same bytes.

    Args:
        folder: must not exist; appears only when complete.
        seed: of all weights.
        dtype: of the saved weights.
        transformer_overrides: arguments of `SD3Transformer2DModel`, e.g. `num_layers=2, qk_norm=None`. The text
            encoders are sized to match: T5 is `joint_attention_dim` wide, and the two CLIP projections add up to
            `pooled_projection_dim`.

    Raises:
        ValueError: if `folder` exists, an override is unknown, or the widths do not match.
    """
    unknown = sorted(set(transformer_overrides) - set(RANDOM.transformer))
    if unknown:
        raise ValueError(f"unknown transformer arguments {unknown}; known are {sorted(RANDOM.transformer)}")
    transformer = RANDOM.transformer | transformer_overrides
    pooled = transformer["pooled_projection_dim"]
    sizes = replace(RANDOM, transformer=transformer, clip_projections=(pooled // 2, pooled - pooled // 2))
    parts = make_parts(sizes, WORDS)
    generator = torch.Generator().manual_seed(seed)
    for part in parts.values():
        if isinstance(part, nn.Module):
            _fill(part, generator)
    return save_pipeline(parts, folder, dtype)


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter here, so that the bytes do not depend on the initializers of the libraries' versions."""
    for name, parameter in sorted(module.named_parameters()):
        parameter.copy_(draw_weight(name, tuple(parameter.shape), generator))
