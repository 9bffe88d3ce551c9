"""Parallel layouts, image sizes and build options: frozen, flat, validated on construction.

Field names are diffusers' (models), TensorRT-LLM's (parallel sizes, build).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

Dtype = Literal["float32", "float16", "bfloat16"]
TpLayout = Literal["megatron", "trtllm"]
CpMethod = Literal["allgather", "ulysses"]
Builder = Literal["tensorrt", "trtllm"]


class DtypeNames(NamedTuple):
    """A data type's name in each library."""

    torch: torch.dtype
    tensorrt: str
    """Member of `tensorrt.DataType`."""
    safetensors: str
    """Code in a safetensors header."""


DTYPES = {
    "float32": DtypeNames(torch.float32, "FLOAT", "F32"),
    "float16": DtypeNames(torch.float16, "HALF", "F16"),
    "bfloat16": DtypeNames(torch.bfloat16, "BF16", "BF16"),
}
"""The data types that a network can compute in."""
FP8 = "float8_e4m3fn"
"""Quantized weights and activations: 4 bits of exponent, 3 of mantissa, at most 448, no infinity."""
STORED_DTYPES = DTYPES | {FP8: DtypeNames(torch.float8_e4m3fn, "FP8", "F8_E4M3")}
"""What a checkpoint's tensor can be stored in."""
TORCH_DTYPES = {name: names.torch for name, names in STORED_DTYPES.items()} | {"int64": torch.int64, "bool": torch.bool}
"""torch dtypes by name; int64 is for sizes and offsets inside a network, bool for conditions."""


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype as an option of `from_pretrained`, which diffusers 0.42 renamed."""
    import diffusers
    from packaging import version

    return {"dtype" if version.parse(diffusers.__version__) >= version.parse("0.42") else "torch_dtype": dtype}


MAX_RANKS = 4096
MAX_PIXELS = 1 << 16
"""Of an image's side."""
MAX_TEXT_TOKENS = 1 << 16
MAX_BATCH = 1 << 16
MAX_RESIDUALS = 512
"""These limits only keep a damaged or hostile file from asking for unbounded work; no real value comes near them."""

Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""A string from a file that is shown to users: one line, no control characters."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, values: object, where: object):
        """Validate `values`. Raises a one-line `ValueError` that names `where`, the invalid keys and their values."""
        with one_line(where):
            return cls.model_validate(values)


class FileConfig(Config, extra="ignore"):
    """A part of a JSON file. Keys that another program or a later version adds are ignored."""


@contextmanager
def one_line(where: object) -> Iterator[None]:
    """Turn pydantic's errors into a one-line `ValueError` that names `where`."""
    try:
        yield
    except ValidationError as error:
        faults = error.errors(include_url=False)
        more = f" (and {len(faults) - SHOWN_FAULTS} more)" if len(faults) > SHOWN_FAULTS else ""
        raise ValueError(f"{where}: {'; '.join(map(_fault, faults[:SHOWN_FAULTS]))}{more}") from None


SHOWN_FAULTS = 3


def _fault(error: dict[str, Any]) -> str:
    """Format a pydantic error; messages of our own validators are used as they are."""
    ours = error["type"] == "value_error"
    message = str(error["ctx"]["error"]) if ours else error["msg"]
    place = ".".join(key if isinstance(key, str) and key.isprintable() else shown(key) for key in error["loc"])
    found = "" if ours or error["type"] == "missing" else f", found {shown(error['input'])}"
    return f"{place}: {message}{found}" if place else f"{message}{found}"


_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 2, 3, 4, 4


def shown(value: object) -> str:
    """A value from a file, for a message: one short line, whatever it contains."""
    return _short.repr(value)


VaeScaleFactor = Annotated[int, Field(ge=1, le=256, strict=True)]
"""Image pixels per latent pixel."""


class Layout(Config):
    """How a model is split over ranks. Rank order is TensorRT-LLM's: tp fastest, then cp, then cfg."""

    tp_size: int = Field(1, ge=1, le=MAX_RANKS, strict=True)
    """Ranks over which each layer's weights are sharded (tensor parallelism)."""
    cp_size: int = Field(1, ge=1, le=MAX_RANKS, strict=True)
    """Ranks over which the tokens are split (context parallelism)."""
    cfg_size: Literal[1, 2] = 1
    """2: the conditional and the unconditional pass run on different ranks."""
    tp_layout: TpLayout = "megatron"
    """How weights are sharded: Megatron-style, or as in TensorRT-LLM."""
    cp_method: CpMethod = "allgather"
    """How attention sees all tokens: all-gather of keys and values, or all-to-all over heads (DeepSpeed-Ulysses)."""

    @model_validator(mode="after")
    def _at_most(self):
        if self.world_size > MAX_RANKS:
            raise ValueError(f"{self} are {self.world_size} ranks; at most {MAX_RANKS} are supported")
        return self

    @property
    def world_size(self) -> int:
        return self.tp_size * self.cp_size * self.cfg_size

    @property
    def sizes(self) -> dict[str, int]:
        return {"tp_size": self.tp_size, "cp_size": self.cp_size, "cfg_size": self.cfg_size}

    def at(self, rank: int) -> RankMapping:
        return RankMapping(layout=self, rank=rank)

    def ranks(self) -> list[RankMapping]:
        return [self.at(rank) for rank in range(self.world_size)]

    def __str__(self) -> str:
        """For instance 'tp 2 x cfg 2', or 'one rank'."""
        named = {"tp": self.tp_size, "cp": self.cp_size, "cfg": self.cfg_size}
        return " x ".join(f"{name} {size}" for name, size in named.items() if size > 1) or "one rank"


class RankMapping(Config):
    """One rank's position in a layout, like TensorRT-LLM's `Mapping`."""

    layout: Layout = Layout()
    rank: int = Field(0, ge=0, strict=True)

    @model_validator(mode="after")
    def _rank_in_world(self):
        if self.rank >= self.layout.world_size:
            raise ValueError(f"rank {self.rank} is out of range for world_size={self.layout.world_size}")
        return self

    @property
    def tp_size(self) -> int:
        return self.layout.tp_size

    @property
    def cp_size(self) -> int:
        return self.layout.cp_size

    @property
    def cfg_size(self) -> int:
        return self.layout.cfg_size

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
        """The ranks that together hold the full output, ordered by (cfg, cp); all have the same tp rank."""
        return tuple(range(self.tp_rank, self.layout.world_size, self.tp_size))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Every group of ranks that this rank's collectives use."""
        return self.tp_group, self.cp_group, self.output_group

    @property
    def largest_group(self) -> int:
        return max(map(len, self.groups))


def either(choices) -> str:
    """'1, 2 or 19'."""
    *most, last = [str(c) for c in choices]
    return f"{', '.join(most)} or {last}" if most else last


class Resolution(Config):
    """An image size in pixels."""

    height: int = Field(gt=0, le=MAX_PIXELS, strict=True)
    width: int = Field(gt=0, le=MAX_PIXELS, strict=True)

    @classmethod
    def read(cls, text: str | int | Resolution) -> Resolution:
        """Parse '768x1344' (height x width) or '1024' (square). Raises `ValueError`."""
        if isinstance(text, Resolution):
            return text
        sides = str(text).lower().split("x")
        digits = len(str(MAX_PIXELS))
        legal = all(s.strip().isdecimal() and len(s.strip()) <= digits and 0 < int(s) <= MAX_PIXELS for s in sides)
        if len(sides) > 2 or not legal:
            example = "for instance 768x1344"
            raise ValueError(f"resolution {shown(str(text))}: give HEIGHTxWIDTH in pixels, {example}, or one number")
        return cls(height=int(sides[0]), width=int(sides[-1]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Sizes(NamedTuple):
    """The dynamic sizes of one call. The batch is in rows: classifier-free guidance uses two per image."""

    batch: int
    height: int
    """In image pixels, as is `width`."""
    width: int
    text_tokens: int


class BuildConfig(Config):
    """The optimization profile and optional inputs of a build. Batch sizes are in rows, as in `Sizes`."""

    max_batch_size: int = Field(ge=1, le=MAX_BATCH, strict=True)
    opt_batch_size: int | None = Field(None, ge=1, strict=True)
    """None: half of the largest, rounded up to a multiple of cfg_size."""
    min_resolution: Resolution
    opt_resolution: Resolution
    max_resolution: Resolution
    min_text_tokens: int = Field(77, ge=1, strict=True)
    """77 is a CLIP prompt; diffusers appends `max_sequence_length` T5 tokens."""
    opt_text_tokens: int = Field(333, strict=True)
    max_text_tokens: int = Field(589, le=MAX_TEXT_TOKENS, strict=True)
    vae_scale_factor: VaeScaleFactor = 8
    """Image pixels per latent pixel."""
    skip_layers: bool = Field(False, strict=True)
    """Whether a call can skip blocks, for skip-layer guidance."""
    controlnet_residuals: int = Field(0, ge=0, le=MAX_RESIDUALS, strict=True)
    """Number of the ControlNet's residuals, one for each of its blocks; 0: no such inputs."""
    fp8_attention: bool = Field(False, strict=True)  # attention too, besides a quantized checkpoint's linear layers

    @model_validator(mode="after")
    def _ordered(self):
        if (middle := self.opt_batch_size or 0) > self.max_batch_size:
            raise ValueError(f"opt_batch_size {middle} must not exceed max_batch_size {self.max_batch_size}")
        for low, high in (("min", "opt"), ("opt", "max")):
            fewer, more = (getattr(self, f"{end}_text_tokens") for end in (low, high))
            if fewer > more:
                raise ValueError(f"{low}_text_tokens {fewer} must not exceed {high}_text_tokens {more}")
            small, large = (getattr(self, f"{end}_resolution") for end in (low, high))
            if small.height > large.height or small.width > large.width:
                raise ValueError(f"{low}_resolution {small} must not exceed {high}_resolution {large} on either side")
        return self

    @classmethod
    def one_size(cls, resolution: Resolution, batch: int, text_tokens: int, **options) -> BuildConfig:
        """A profile with min = opt = max. Raises `ValueError` if a size is invalid."""
        ends = ("min", "opt", "max")
        sizes = {f"{end}_resolution": resolution for end in ends} | {f"{end}_text_tokens": text_tokens for end in ends}
        return cls.parse({"max_batch_size": batch} | sizes | options, "sizes")

    @property
    def resolutions(self) -> tuple[Resolution, Resolution, Resolution]:
        return self.min_resolution, self.opt_resolution, self.max_resolution

    def batches(self, cfg_size: int) -> tuple[int, int, int]:
        """(min, opt, max) batch: multiples of `cfg_size`, so that every cfg rank gets the same number of rows."""
        half = -(-self.max_batch_size // (2 * cfg_size)) * cfg_size
        return cfg_size, self.opt_batch_size or half, self.max_batch_size

    def sizes(self, cfg_size: int) -> tuple[Sizes, Sizes, Sizes]:
        """(min, opt, max) sizes."""
        tokens = (self.min_text_tokens, self.opt_text_tokens, self.max_text_tokens)
        ends = zip(self.batches(cfg_size), self.resolutions, tokens, strict=True)
        low, middle, high = (Sizes(batch, image.height, image.width, text) for batch, image, text in ends)
        return low, middle, high


class PlanOptions(Config):
    """How TensorRT builds a plan, named as in trtexec and trtllm-build. What is not given is left to TensorRT."""

    builder_optimization_level: int | None = None
    """0 (fastest build) to 5 (fastest plan)"""
    workspace: str | None = None
    """most scratch memory that a layer may use, for instance 512MiB or 8GiB; a plain number is in MiB"""
    timing_cache: Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))] | None = None
    """file with the kernel timings of earlier builds; it is read if it exists, and written when the plan is built"""
    profiling_verbosity: Literal["none", "layer_names_only", "detailed"] | None = None
    """what the plan records about its layers, for profilers and TensorRT's engine inspector"""
    refit: bool = False
    """weights can be replaced in the plan"""
    weight_streaming: bool = False
    """weights can stay in host memory and be streamed to the GPU"""
    strip_plan: bool = False
    """weights are left out of the plan; refit it before it runs"""

    @property
    def workspace_bytes(self) -> int | None:
        """None if `workspace` is not given. Raises `ValueError` if it is not a size."""
        if self.workspace is None:
            return None
        found = re.fullmatch(r"([1-9]\d*) ?(MiB|GiB)?", self.workspace, re.IGNORECASE)
        if found is None:
            raise ValueError(
                f"workspace '{self.workspace}': give a size such as 512MiB or 8GiB; a plain number is in MiB"
            )
        return int(found[1]) << (30 if (found[2] or "").lower() == "gib" else 20)

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON."""
        return self.model_dump(mode="json", exclude_defaults=True)
