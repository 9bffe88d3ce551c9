"""The parts of a small Stable Diffusion 3 pipeline, as data (`Sizes`) and as modules (`make_parts`).

Every feature of SD3.5-medium is there: dual attention in the first layers, RMS norm on queries and keys, a position
table larger than the default picture needs, a last block that only reads its text stream, two CLIP encoders whose
concatenation is padded to the width of a T5 encoder, and a 16-channel latent space at an eighth of the resolution.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mmdit_lib.tiny.tokenizers import CLIP_LENGTH, clip_tokenizer, t5_tokenizer


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of all parts. Widths divide by 16, heads by 4: tensor parallelism and FP8 need that."""

    transformer: dict  # arguments of SD3Transformer2DModel
    clip_widths: tuple[int, int]
    clip_projections: tuple[int, int]
    text_layers: int
    text_heads: int
    vae_widths: tuple[int, int, int, int]
    vae_groups: int

    def __post_init__(self):
        t = self.transformer
        inner = t["num_attention_heads"] * t["attention_head_dim"]
        if t["caption_projection_dim"] != inner:
            raise ValueError(f"caption_projection_dim is {t['caption_projection_dim']}, heads x head size is {inner}")
        if t["pooled_projection_dim"] != sum(self.clip_projections):
            raise ValueError(f"pooled_projection_dim is {t['pooled_projection_dim']}, CLIPs {self.clip_projections}")
        if t["joint_attention_dim"] < sum(self.clip_widths):
            raise ValueError(f"joint_attention_dim is {t['joint_attention_dim']}, CLIPs need {sum(self.clip_widths)}")


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
        caption_projection_dim=192,
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

RANDOM = Sizes(
    transformer=dict(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ),
    clip_widths=(32, 32),
    clip_projections=(32, 32),
    text_layers=2,
    text_heads=4,
    vae_widths=(16, 16, 32, 32),
    vae_groups=8,
)


def make_parts(sizes: Sizes, words: list[str]) -> dict[str, object]:
    """All components that `StableDiffusion3Pipeline(**parts)` asks for; weights as the libraries initialise them."""
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
    """With a position table that steps by 1 per patch. diffusers' own steps by base size over table size, a third: too
    little for a small model to tell neighbours apart. The table is stored, so readers need not know."""
    transformer = SD3Transformer2DModel(**sizes.transformer)
    base = sizes.transformer["sample_size"] // sizes.transformer["patch_size"]
    table = sizes.transformer["pos_embed_max_size"]
    positions = get_2d_sincos_pos_embed(
        transformer.inner_dim, table, base_size=base, interpolation_scale=base / table, output_type="pt"
    )
    transformer.pos_embed.pos_embed.copy_(positions.float()[None])
    return transformer


def _clip(sizes: Sizes, which: int, tokenizer) -> CLIPTextModelWithProjection:
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


def _t5(sizes: Sizes, tokenizer) -> T5EncoderModel:
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


def save_pipeline(parts: dict[str, object], folder: str | Path, dtype: str = "float32") -> Path:
    """Write `parts`, cast to `dtype` in place, as a diffusers pipeline folder.

    It appears under its name only when it is complete.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.to(part, dtype=getattr(torch, dtype))
        StableDiffusion3Pipeline(**parts).save_pretrained(unfinished, safe_serialization=True)
        _settle(unfinished)
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def _settle(folder: Path) -> None:
    """Drop from the saved files what differs from one machine or folder to the next; ask for float32 where no dtype is
    asked for, whatever the dtype of the file."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if path.name != "tokenizer.json" and isinstance(content, dict):
            content.pop("_name_or_path", None)
            if "dtype" in content:  # else transformers loads text encoders as stored, diffusers all else as float32
                content["dtype"] = "float32"
            path.write_text(json.dumps(content, indent=2) + "\n")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
