"""What a model, a parallel layout and a build are: frozen, flat, checked when made.

Field names are diffusers' (model), TensorRT-LLM's (mapping, build).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Dtype = Literal["float32", "float16", "bfloat16"]
TpLayout = Literal["megatron", "trtllm"]
CpMethod = Literal["allgather", "ulysses"]

ARCHITECTURE = "SD3Transformer2DModel"
TEXT_TOKENS_CLIP = 77
"""Text tokens of one CLIP prompt; diffusers appends `max_sequence_length` T5 tokens to it."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, values: dict[str, Any], where: str):
        """Validate `values`; raises `ValueError` of one line that names `where` and every bad key."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(f"{where}: {'; '.join(map(_fault, error.errors()))}") from None


def _fault(error: dict[str, Any]) -> str:
    """One of pydantic's errors; those of our own validators are sentences as they stand."""
    message = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    place = ".".join(map(str, error["loc"]))
    return f"{place}: {message}" if place else message


class ModelConfig(Config):
    """The fields of diffusers' `SD3Transformer2DModel.config`; sizes in latent pixels, tokens or channels."""

    sample_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    in_channels: int = Field(gt=0)
    out_channels: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    attention_head_dim: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    joint_attention_dim: int = Field(gt=0)
    caption_projection_dim: int = Field(gt=0)
    pooled_projection_dim: int = Field(gt=0)
    pos_embed_max_size: int = Field(gt=0)
    dual_attention_layers: tuple[int, ...]
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
            raise ValueError(f"dual_attention_layers {beyond} lie outside the {self.num_layers} layers")
        return self

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> ModelConfig:
        """From a transformer's `config.json`; keys that start with `_` are diffusers' own bookkeeping."""
        # Checkpoints older than SD3.5 lack the two fields that came with it.
        older = {"dual_attention_layers": (), "qk_norm": None}
        values = older | {k: v for k, v in config.items() if not k.startswith("_")}
        if values.get("out_channels") is None:
            values["out_channels"] = values.get("in_channels")
        return cls.parse(values, "transformer config")

    def to_diffusers(self) -> dict[str, Any]:
        return self.model_dump()


class Mapping(Config):
    """Which rank does what. Rank order as in TensorRT-LLM: tp fastest, then cp, then cfg."""

    tp_size: int = Field(1, ge=1)
    cp_size: int = Field(1, ge=1)
    cfg_size: Literal[1, 2] = 1
    rank: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _rank_in_world(self):
        if self.rank >= self.world_size:
            raise ValueError(f"rank {self.rank} does not exist in a world of {self.world_size}")
        return self

    @property
    def world_size(self) -> int:
        return self.tp_size * self.cp_size * self.cfg_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp_size % self.cp_size

    @property
    def cfg_rank(self) -> int:
        return self.rank // (self.tp_size * self.cp_size)

    @property
    def tp_group(self) -> tuple[int, ...]:
        first = self.rank - self.tp_rank
        return tuple(range(first, first + self.tp_size))

    @property
    def cp_group(self) -> tuple[int, ...]:
        first = self.rank - self.cp_rank * self.tp_size
        return tuple(range(first, first + self.cp_size * self.tp_size, self.tp_size))

    @property
    def output_group(self) -> tuple[int, ...]:
        """The ranks that together hold every row of the output: (cfg, cp) in that order, one tp rank."""
        return tuple(range(self.tp_rank, self.world_size, self.tp_size))

    @property
    def largest_group(self) -> int:
        return max(len(self.tp_group), len(self.cp_group), len(self.output_group))

    def at(self, rank: int) -> Mapping:
        return Mapping(tp_size=self.tp_size, cp_size=self.cp_size, cfg_size=self.cfg_size, rank=rank)

    def ranks(self) -> list[Mapping]:
        return [self.at(rank) for rank in range(self.world_size)]

    def check(self, model: ModelConfig, *, tp_layout: TpLayout = "megatron", cp_method: CpMethod = "allgather") -> None:
        """Raises `ValueError` with the legal sizes where this layout cannot hold `model`."""
        heads = model.num_attention_heads
        pixels = model.patch_size**2 * model.out_channels
        # Upstream also cuts the rows of proj_out.
        legal = [t for t in range(1, heads + 1) if heads % t == 0 and (tp_layout == "megatron" or pixels % t == 0)]
        if self.tp_size not in legal:
            what = f"{heads} heads" if heads % self.tp_size else f"{pixels} rows of proj_out"
            raise ValueError(f"{what} do not divide by tp {self.tp_size}; use {either(legal)}")
        local = heads // self.tp_size
        if cp_method == "ulysses" and local % self.cp_size:
            legal = [c for c in range(1, local + 1) if local % c == 0]
            raise ValueError(
                f"cp_method ulysses deals out heads, and the {local} heads of a tp rank do not divide by "
                f"cp {self.cp_size}; use {either(legal)}, or cp_method allgather"
            )


def either(choices) -> str:
    """'1, 2 or 19'."""
    *most, last = [str(c) for c in choices]
    return f"{', '.join(most)} or {last}" if most else last


class Resolution(Config):
    """An image size in pixels."""

    height: int = Field(gt=0)
    width: int = Field(gt=0)

    @classmethod
    def read(cls, text: str | int | Resolution) -> Resolution:
        """'768x1344' is height x width; '1024' is square. Raises `ValueError`."""
        if isinstance(text, Resolution):
            return text
        sides = str(text).lower().split("x")
        if len(sides) > 2 or not all(s.strip().isdecimal() and int(s) > 0 for s in sides):
            raise ValueError(f"resolution '{text}': give HEIGHTxWIDTH in pixels, for instance 768x1344, or one number")
        return cls(height=int(sides[0]), width=int(sides[-1]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class BuildConfig(Config):
    """The optimisation profile and the options of a build. Batch counts rows: CFG doubles the images."""

    max_batch_size: int = Field(ge=1)
    min_resolution: Resolution
    opt_resolution: Resolution
    max_resolution: Resolution
    min_text_tokens: int = Field(TEXT_TOKENS_CLIP, ge=1)
    opt_text_tokens: int = 333
    max_text_tokens: int = 589
    vae_scale_factor: int = Field(8, ge=1)
    """Image pixels per latent pixel."""
    cp_method: CpMethod = "allgather"

    @model_validator(mode="after")
    def _ordered(self):
        for low, high in (("min", "opt"), ("opt", "max")):
            fewer, more = (getattr(self, f"{end}_text_tokens") for end in (low, high))
            if fewer > more:
                raise ValueError(f"{low}_text_tokens {fewer} must not exceed {high}_text_tokens {more}")
            small, large = (getattr(self, f"{end}_resolution") for end in (low, high))
            if small.height > large.height or small.width > large.width:
                raise ValueError(f"{low}_resolution {small} must not exceed {high}_resolution {large} on either side")
        return self

    @cached_property
    def resolutions(self) -> tuple[Resolution, Resolution, Resolution]:
        return self.min_resolution, self.opt_resolution, self.max_resolution

    def batches(self, cfg_size: int) -> tuple[int, int, int]:
        """(min, opt, max) batch: multiples of `cfg_size`, each rank taking as many rows."""
        middle = -(-self.max_batch_size // (2 * cfg_size)) * cfg_size
        return cfg_size, middle, self.max_batch_size

    def check(self, model: ModelConfig, mapping: Mapping) -> None:
        """Raises `ValueError` where the profile does not fit the model."""
        step = model.patch_size * self.vae_scale_factor
        largest = model.pos_embed_max_size * step
        for resolution in self.resolutions:
            if resolution.height % step or resolution.width % step:
                raise ValueError(f"resolution {resolution}: height and width must be multiples of {step} pixels")
            if max(resolution.height, resolution.width) > largest:
                raise ValueError(f"resolution {resolution}: the position table reaches {largest} pixels at most")
        if self.max_batch_size % mapping.cfg_size:
            raise ValueError(f"max_batch_size {self.max_batch_size} must be even: cfg 2 halves the batch")
        mapping.check(model, cp_method=self.cp_method)


def _known(heads: int, layers: int, table: int, dual: int, qk_norm: str | None) -> ModelConfig:
    return ModelConfig(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=64,
        num_attention_heads=heads, joint_attention_dim=4096, caption_projection_dim=64 * heads,
        pooled_projection_dim=2048, pos_embed_max_size=table, dual_attention_layers=tuple(range(dual)), qk_norm=qk_norm,
    )  # fmt: skip


KNOWN_MODELS = {
    "stable-diffusion-3-medium": _known(24, 24, 192, 0, None),
    "stable-diffusion-3.5-medium": _known(24, 24, 384, 13, "rms_norm"),
    "stable-diffusion-3.5-large": _known(38, 38, 192, 0, "rms_norm"),
}
"""The three published models, by the last part of their hub id."""
