"""What runs beside the transformer in SD3's pipelines, with the published sizes and random weights.

Inside `torch.device("meta")`, their sizes take no memory to find out, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def text_encoders(dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """CLIP-L, CLIP-G and T5-XXL's encoder."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    def clip(width: int, layers: int, heads: int) -> torch.nn.Module:
        sizes = dict(hidden_size=width, intermediate_size=4 * width, projection_dim=width)
        config = CLIPTextConfig(**sizes, num_hidden_layers=layers, num_attention_heads=heads)
        return CLIPTextModelWithProjection(config)

    sizes = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, feed_forward_proj="gated-gelu")
    with default_dtype(dtype):
        found = {"CLIP-L": clip(768, 12, 12), "CLIP-G": clip(1280, 32, 20), "T5-XXL": T5EncoderModel(T5Config(**sizes))}
    return {name: module.eval() for name, module in found.items()}


def vae(dtype: torch.dtype, side: int = 1024) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    with default_dtype(dtype):
        return AutoencoderKL(
            latent_channels=16, block_out_channels=[128, 256, 512, 512], layers_per_block=2, shift_factor=0.0609,
            scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False, sample_size=side, **blocks,
        ).eval()  # fmt: skip


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
