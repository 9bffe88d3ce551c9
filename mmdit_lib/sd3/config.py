"""The config of a Stable Diffusion 3 transformer, and the published models."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..architecture import ModelConfig, Shapes
from ..config import Layout, either, shown

SAMPLE_SIZE = 128
"""The published models' value. No tensor determines it; it only sets a pipeline's default resolution."""
HEAD_DIM = 64
"""The published models' value; without QK norm, no tensor determines it."""


# Upper limits keep a damaged or hostile config from costing more than its weights do; the largest published model has
# 38 layers of 38 heads, and a width of 2432.
MAX_LAYERS = 512
Count = Annotated[int, Field(ge=1, le=1024, strict=True)]
Width = Annotated[int, Field(ge=1, le=1 << 16, strict=True)]
Side = Annotated[int, Field(ge=1, le=4096, strict=True)]


class SD3Config(ModelConfig):
    """The fields of diffusers' `SD3Transformer2DModel.config`; sizes in latent pixels, tokens or channels."""

    sample_size: Side
    patch_size: int = Field(ge=1, le=64, strict=True)
    in_channels: Count
    out_channels: Count
    num_layers: int = Field(ge=1, le=MAX_LAYERS, strict=True)
    attention_head_dim: Count
    num_attention_heads: Count
    joint_attention_dim: Width
    caption_projection_dim: Width
    pooled_projection_dim: Width
    pos_embed_max_size: Side
    dual_attention_layers: tuple[Annotated[int, Field(strict=True)], ...] = Field(max_length=MAX_LAYERS)
    qk_norm: Literal["rms_norm"] | None

    @model_validator(mode="after")
    def _consistent(self):
        if self.caption_projection_dim != self.hidden_size:
            raise ValueError(
                f"caption_projection_dim {self.caption_projection_dim} must equal num_attention_heads * "
                f"attention_head_dim = {self.hidden_size}: joint attention concatenates the two streams"
            )
        beyond = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if beyond:
            raise ValueError(f"dual_attention_layers {shown(beyond)} are out of range for num_layers={self.num_layers}")
        return self

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> SD3Config:
        """Parse a transformer's `config.json`; keys that start with `_` are diffusers' bookkeeping and are ignored."""
        # Checkpoints older than SD3.5 lack the two fields that it introduced.
        older = {"dual_attention_layers": (), "qk_norm": None}
        values = older | {k: v for k, v in config.items() if not k.startswith("_")}
        if values.get("out_channels") is None:
            values["out_channels"] = values.get("in_channels")
        return cls.parse(values, "transformer config")

    def to_trtllm(self, model_path: str) -> dict[str, Any]:
        """Keys from `logits_dtype` on are in all of TensorRT-LLM's configs; nothing here reads them."""
        return {
            **self.model_dump(mode="json"),
            "skip_layers": None,
            "use_pretrained_pos_emb": True,
            "model_path": model_path,
            "logits_dtype": "float32",
            "vocab_size": None,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "gelu",
            "intermediate_size": 4 * self.hidden_size,
            "norm_epsilon": 1e-5,
            "position_embedding_type": "learned_absolute",
            "max_position_embeddings": None,
            "use_parallel_embedding": False,
            "embedding_sharding_dim": 0,
            "head_size": self.attention_head_dim,
            "qk_layernorm": False,
            "rotary_embedding_dim": self.attention_head_dim,
            "runtime_defaults": None,
        }

    def summary(self) -> str:
        dual = f", dual attention in {len(self.dual_attention_layers)}" if self.dual_attention_layers else ""
        heads = f"{self.num_attention_heads} heads of {self.attention_head_dim}"
        return f"{self.num_layers} blocks{dual}, {heads}, QK norm {self.qk_norm or 'none'}"

    def check_layout(self, layout: Layout) -> None:
        heads, tp = self.num_attention_heads, layout.tp_size
        pixels = self.patch_size**2 * self.out_channels
        megatron = layout.tp_layout == "megatron"  # TensorRT-LLM also shards the rows of proj_out
        legal = [t for t in range(1, heads + 1) if heads % t == 0 and (megatron or pixels % t == 0)]
        if tp not in legal:
            what = f"{heads} heads" if heads % tp else f"{pixels} rows of proj_out"
            raise ValueError(f"{what} are not divisible by tp_size={tp}; use {either(legal)}")
        local, cp = heads // tp, layout.cp_size
        if layout.cp_method == "ulysses" and local % cp:
            legal = [c for c in range(1, local + 1) if local % c == 0]
            raise ValueError(
                f"cp_method ulysses scatters heads, and the {local} heads of a tp rank are not divisible by "
                f"cp_size={cp}; use {either(legal)}, or cp_method allgather"
            )

    def default_side(self, vae_scale_factor: int) -> int:
        return self.sample_size * vae_scale_factor

    def pixel_step(self, vae_scale_factor: int) -> int:
        return self.patch_size * vae_scale_factor

    def max_side(self, vae_scale_factor: int) -> int:
        """The side of the position table, in image pixels."""
        return self.pos_embed_max_size * self.pixel_step(vae_scale_factor)


def infer_config(shapes: Shapes, like: SD3Config | None = None) -> SD3Config:
    """Infer the config from tensor shapes, by our names.

    Args:
        like: supplies what no tensor determines: `sample_size` and, without QK norm, the head size. The published
            models' values if not given.

    Raises:
        ValueError: a tensor that determines the config is missing or has the wrong number of dimensions.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != dimensions:
            raise ValueError(f"tensor '{name}' with {dimensions} dimensions is missing: this is not an SD3 transformer")
        return tuple(shapes[name])

    dim, channels, patch, _ = shape("pos_embed.proj.weight", 4)
    norm = "transformer_blocks.0.attn.norm_q.weight"
    (head_dim,) = shape(norm, 1) if norm in shapes else (like.attention_head_dim if like else HEAD_DIM,)
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"transformer_blocks\.(\d+)\.", name))}
    dual = {int(m[1]) for name in shapes if (m := re.match(r"transformer_blocks\.(\d+)\.attn2\.", name))}
    values = {
        "sample_size": like.sample_size if like else SAMPLE_SIZE,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight", 2)[0] // patch**2,
        "num_layers": max(blocks, default=-1) + 1,
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": shape("context_embedder.weight", 2)[1],
        "caption_projection_dim": dim,
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "pos_embed_max_size": math.isqrt(shape("pos_embed.pos_embed", 3)[1]),
        "dual_attention_layers": tuple(sorted(dual)),
        "qk_norm": "rms_norm" if norm in shapes else None,
    }
    return SD3Config.parse(values, "config inferred from the weights")


def _known(heads: int, layers: int, table: int, dual: int, qk_norm: str | None) -> SD3Config:
    return SD3Config(
        sample_size=SAMPLE_SIZE, patch_size=2, in_channels=16, out_channels=16, num_layers=layers,
        attention_head_dim=HEAD_DIM, num_attention_heads=heads, joint_attention_dim=4096,
        caption_projection_dim=HEAD_DIM * heads, pooled_projection_dim=2048, pos_embed_max_size=table,
        dual_attention_layers=tuple(range(dual)), qk_norm=qk_norm,
    )  # fmt: skip


KNOWN_MODELS = {
    "stable-diffusion-3-medium": _known(24, 24, 192, 0, None),
    "stable-diffusion-3.5-medium": _known(24, 24, 384, 13, "rms_norm"),
    "stable-diffusion-3.5-large": _known(38, 38, 192, 0, "rms_norm"),
    "stable-diffusion-3.5-large-turbo": _known(38, 38, 192, 0, "rms_norm"),
}
"""The published models, by the last part of their hub id. Turbo is a distilled SD3.5-large: only its weights differ."""
