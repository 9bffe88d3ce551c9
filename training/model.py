"""A small Stable Diffusion 3 pipeline: its dimensions (`Sizes`), its components (`make_parts`) and its folder.

It has the architecture of SD3.5-medium: dual attention in the first layers, RMS norm on queries and keys, a position
table larger than the default picture needs, a last block that discards its text stream, two CLIP encoders whose
concatenated states are padded to the width of the T5 encoder, and 16 latent channels at an eighth of the resolution.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from mmdit_lib.config import Dtype
from mmdit_lib.files import complete_folder

from .tokenizers import CLIP_LENGTH, clip_tokenizer, t5_tokenizer


@dataclass(frozen=True)
class Sizes:
    """Dimensions of all components.

    In `TRAINED` and `RANDOM`, widths are multiples of 16 for FP8, and numbers of heads are multiples of 4 for tensor
    parallelism.

    Raises:
        ValueError: if the CLIP encoders together are wider than the text stream.
    """

    transformer: dict
    """Arguments of `SD3Transformer2DModel`, except `caption_projection_dim`, which must equal the hidden size."""
    clip_widths: tuple[int, int]
    clip_projections: tuple[int, int]
    text_layers: int
    """Of each text encoder."""
    text_heads: int
    """Of each text encoder."""
    vae_widths: tuple[int, int, int, int]
    vae_groups: int
    """Groups of the autoencoder's group norms."""

    def __post_init__(self):
        assert self.transformer["pooled_projection_dim"] == sum(self.clip_projections)
        width, clip = self.transformer["joint_attention_dim"], sum(self.clip_widths)
        if width < clip:
            raise ValueError(f"joint_attention_dim is {width}; the CLIP widths {self.clip_widths} need at least {clip}")


TRAINED = Sizes(
    transformer=dict(
        sample_size=16,  # latents: 128 px
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=256,
        pooled_projection_dim=224,
        pos_embed_max_size=24,  # patches: up to 384 px
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ),
    clip_widths=(96, 128),
    clip_projections=(96, 128),
    text_layers=2,
    text_heads=4,
    vae_widths=(32, 48, 64, 64),
    vae_groups=16,
)

RANDOM = replace(
    TRAINED,
    transformer=TRAINED.transformer
    | dict(num_layers=3, attention_head_dim=16, joint_attention_dim=64, pooled_projection_dim=64),
    clip_widths=(32, 32),
    clip_projections=(32, 32),
    vae_widths=(16, 16, 32, 32),
    vae_groups=8,
)


def make_parts(sizes: Sizes, words: list[str]) -> dict[str, object]:
    """The components of `StableDiffusion3Pipeline(**parts)`, with the libraries' initial weights.

    Args:
        sizes: of the modules.
        words: that the tokenizers know as single tokens.
    """
    tokenizers = clip_tokenizer(words), clip_tokenizer(words), t5_tokenizer(words)
    return dict(
        transformer=_transformer(sizes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(sizes).eval(),
        text_encoder=_clip(sizes, 0, tokenizers[0]).eval(),
        tokenizer=tokenizers[0],
        text_encoder_2=_clip(sizes, 1, tokenizers[1]).eval(),
        tokenizer_2=tokenizers[1],
        text_encoder_3=_t5(sizes, tokenizers[2]).eval(),
        tokenizer_3=tokenizers[2],
    )


def _transformer(sizes: Sizes) -> SD3Transformer2DModel:
    """diffusers' transformer with a position table that advances by 1 per patch.

    diffusers' own table advances by base size / table size, here a third, too little for a small model to distinguish
    neighboring patches. The table is saved with the weights, so loading needs no special case.
    """
    hidden = sizes.transformer["num_attention_heads"] * sizes.transformer["attention_head_dim"]
    transformer = SD3Transformer2DModel(**sizes.transformer, caption_projection_dim=hidden)
    base = sizes.transformer["sample_size"] // sizes.transformer["patch_size"]
    table = sizes.transformer["pos_embed_max_size"]
    positions = get_2d_sincos_pos_embed(
        transformer.inner_dim, table, base_size=base, interpolation_scale=base / table, output_type="pt"
    )
    transformer.pos_embed.pos_embed.copy_(positions.float()[None])
    return transformer


def _clip(sizes: Sizes, which: int, tokenizer: PreTrainedTokenizerBase) -> CLIPTextModelWithProjection:
    width = sizes.clip_widths[which]
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=sizes.clip_projections[which],
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            max_position_embeddings=CLIP_LENGTH,
            hidden_act=("quick_gelu", "gelu")[which],  # as SD3's CLIP-L and CLIP-G
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(sizes: Sizes, tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    width = sizes.transformer["joint_attention_dim"]
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // sizes.text_heads,
            d_ff=2 * width,
            num_layers=sizes.text_layers,
            num_heads=sizes.text_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _vae(sizes: Sizes) -> AutoencoderKL:
    levels = len(sizes.vae_widths)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae_widths,
        layers_per_block=1,
        latent_channels=sizes.transformer["in_channels"],
        norm_num_groups=sizes.vae_groups,
        sample_size=8 * sizes.transformer["sample_size"],
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def save_pipeline(parts: dict[str, object], folder: str | Path, dtype: Dtype = "float32") -> Path:
    """Write `parts` as a diffusers pipeline folder, which appears only when it is complete.

    Args:
        parts: as `make_parts` returns them; modules are cast to `dtype` in place.
        folder: must not exist.
        dtype: of the saved weights.

    Raises:
        ValueError: if `folder` exists, cannot be made, or the disk is full.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} already exists")
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype=getattr(torch, dtype))
    with complete_folder(folder, "pipeline", is_kind=lambda _: False) as unfinished:
        StableDiffusion3Pipeline(**parts).save_pretrained(unfinished, safe_serialization=True)
        _normalise(unfinished)
    return folder


def _normalise(folder: Path) -> None:
    """Make the files independent of machine and path, and float32 the dtype that text encoders load in by default.

    By default transformers loads a model in its config's dtype, whereas diffusers loads its own in float32.
    """
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if path.name != "tokenizer.json" and isinstance(content, dict):
            content.pop("_name_or_path", None)
            if "dtype" in content:
                content["dtype"] = "float32"
            path.write_text(json.dumps(content, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
