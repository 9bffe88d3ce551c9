"""A complete Stable Diffusion 3 pipeline folder with random weights: for tests that need no meaningful picture."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mmdit_lib.tiny.model import RANDOM, make_parts, save_pipeline

WORDS = ["a", "the", "red", "green", "blue", "circle", "square", "triangle", "on", "background", "left", "of", ","]


def make_random_pipeline(folder: str | Path, *, seed: int = 0, dtype: str = "float32", **transformer_overrides) -> Path:
    """Write a diffusers `StableDiffusion3Pipeline` folder with random weights; the same seed gives the same bytes.

    Args:
        folder: must not exist; appears only when complete.
        seed: of all weights.
        dtype: "float32", "float16" or "bfloat16", of the saved weights.
        transformer_overrides: arguments of `SD3Transformer2DModel`, e.g. `num_layers=2, qk_norm=None`. The other parts
            follow: T5 is as wide as `joint_attention_dim`, the CLIPs share `pooled_projection_dim`.

    Raises:
        ValueError: if `folder` exists, an override is unknown, or widths do not fit together.
    """
    unknown = sorted(set(transformer_overrides) - set(RANDOM.transformer))
    if unknown:
        raise ValueError(f"unknown transformer arguments {unknown}; known are {sorted(RANDOM.transformer)}")
    parts = make_parts(_sizes(transformer_overrides), WORDS)
    generator = torch.Generator().manual_seed(seed)
    for part in parts.values():
        if isinstance(part, nn.Module):
            _fill(part, generator)
    return save_pipeline(parts, folder, dtype)


def _sizes(overrides: dict):
    transformer = RANDOM.transformer | overrides
    inner = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    transformer["caption_projection_dim"] = overrides.get("caption_projection_dim", inner)
    pooled = transformer["pooled_projection_dim"]
    return replace(RANDOM, transformer=transformer, clip_projections=(pooled // 2, pooled - pooled // 2))


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep activations near unit size, gates and biases far from zero: every weight shows in the output.

    Drawn here rather than by the libraries' initialisers, so that the bytes do not depend on library versions.
    """
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias") or "relative_attention_bias" in name:
            parameter.copy_(0.3 * noise)
        elif parameter.ndim == 1:  # norms
            parameter.copy_(1 + 0.2 * noise)
        elif "embedding" in name or "shared" in name or "embed_tokens" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
