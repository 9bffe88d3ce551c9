"""Shapes of an engine's inputs, derived from the model's input table: declarations, profiles, checks, random inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from functools import cache, reduce
from operator import floordiv
from pathlib import Path
from typing import Protocol

import torch

from ..architecture import Architecture, Input, ModelConfig
from ..config import TORCH_DTYPES, BuildConfig, Dtype, Layout, Resolution, Sizes
from .graph import Graph, Value

Shape = tuple[int, ...]


class Engine(Protocol):
    """What these functions need of an `EngineFolder`."""

    architecture: Architecture
    model: ModelConfig
    dtype: Dtype
    layout: Layout
    build_config: BuildConfig

    @property
    def inputs(self) -> tuple[Input, ...]: ...


# Shapes ----------------------------------------------------------------------------------------------


def declared_shape(tensor: Input, model: ModelConfig) -> Shape:
    """The shape that the network declares; -1 marks a dynamic size."""
    return tuple(-1 if is_dynamic(dim) else getattr(model, dim) for dim in tensor.shape)


def is_dynamic(dim: str) -> bool:
    return any(name in Sizes._fields for name in re.split("[/*]", dim))


def shape_of(tensor: Input, model: ModelConfig, sizes: Sizes, vae_scale_factor: int) -> Shape:
    """The shape for given sizes."""
    dynamic = sizes._asdict() | {"vae_scale_factor": vae_scale_factor}

    def number(name: str) -> int:
        return dynamic[name] if name in dynamic else getattr(model, name)

    def size(dim: str) -> int:
        return math.prod(reduce(floordiv, map(number, factor.split("/"))) for factor in dim.split("*"))

    return tuple(map(size, tensor.shape))


def profile_shapes(
    architecture: Architecture, model: ModelConfig, build: BuildConfig, cfg_size: int
) -> dict[str, list[Shape]]:
    """The min, opt and max shape of every input."""
    ends, scale = build.sizes(cfg_size), build.vae_scale_factor
    table = architecture.inputs_of(model, build)
    return {x.name: [shape_of(x, model, sizes, scale) for sizes in ends] for x in table}


def default_inputs(folder: Engine, sizes: Sizes, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """The inputs that a call may leave out, as they are then; equal ones share one tensor."""

    @cache
    def full(shape: Shape, value: float, dtype: str) -> torch.Tensor:
        return torch.full(shape, value, dtype=TORCH_DTYPES[dtype], device=device)

    scale = folder.build_config.vae_scale_factor
    optional = [x for x in folder.inputs if x.default is not None]
    return {
        x.name: full(shape_of(x, folder.model, sizes, scale), x.default, input_dtype(x, folder.dtype)) for x in optional
    }


def input_dtype(tensor: Input, network: str) -> str:
    """The dtype of an input of a network of dtype `network`."""
    return tensor.dtype or network


# Checks ----------------------------------------------------------------------------------------------


def check_resolution(model: ModelConfig, resolution: Resolution, vae_scale_factor: int) -> None:
    """Raises `ValueError` if the model does not support this image size."""
    step, largest = model.pixel_step(vae_scale_factor), model.max_side(vae_scale_factor)
    if resolution.height % step or resolution.width % step:
        raise ValueError(f"resolution {resolution}: height and width must be multiples of {step} pixels")
    if max(resolution.height, resolution.width) > largest:
        raise ValueError(f"resolution {resolution}: the position table covers at most {largest} pixels")


def check_build(model: ModelConfig, build: BuildConfig, layout: Layout) -> None:
    """Raises `ValueError` if profile, layout and model do not match."""
    for resolution in build.resolutions:
        check_resolution(model, resolution, build.vae_scale_factor)
    for name in ("max_batch_size", "opt_batch_size"):
        if (getattr(build, name) or 0) % layout.cfg_size:
            raise ValueError(f"{name} {getattr(build, name)} must be even: cfg_size=2 halves the batch")
    model.check_layout(layout)


def check_interface(folder: Engine, graph: Graph, where: Path) -> None:
    """Raises `ValueError` if a graph's inputs and output are not the model's. Inputs added since may be missing."""
    declared = {
        x.name: Value(x.name, input_dtype(x, folder.dtype), declared_shape(x, folder.model)) for x in folder.inputs
    }
    for value in graph.inputs:
        if value != declared.get(value.name):
            raise ValueError(f"{where}: input {value}; the model's inputs are {', '.join(map(str, declared.values()))}")
    if graph.outputs != (folder.architecture.output.name,):
        raise ValueError(f"{where}: output {graph.outputs}, expected {folder.architecture.output.name}")


def check_sizes(folder: Engine, sizes: Sizes) -> None:
    """Raises `ValueError`, naming the size and the valid range, if `sizes` are outside the profile."""
    build = folder.build_config
    if not 1 <= sizes.batch <= build.max_batch_size:
        raise ValueError(
            f"batch {sizes.batch} is outside the engine's 1 to {build.max_batch_size} (guidance doubles the batch); "
            f"build with --max_batch_size {sizes.batch}"
        )
    if not build.min_text_tokens <= sizes.text_tokens <= build.max_text_tokens:
        end = "min" if sizes.text_tokens < build.min_text_tokens else "max"
        raise ValueError(
            f"{sizes.text_tokens} text tokens are outside the engine's {build.min_text_tokens} to "
            f"{build.max_text_tokens}; build with --{end}_text_tokens {sizes.text_tokens}"
        )
    for side in ("height", "width"):
        low, high = (getattr(r, side) for r in (build.min_resolution, build.max_resolution))
        pixels = getattr(sizes, side)
        if not low <= pixels <= high:
            raise ValueError(
                f"{side} {pixels} is outside the engine's {low} to {high} pixels; "
                f"build with --{'min' if pixels < low else 'max'}_resolution {pixels}"
            )
    check_resolution(folder.model, Resolution(height=sizes.height, width=sizes.width), build.vae_scale_factor)


def check_names(folder: Engine, names: Collection[str]) -> None:
    """Raises `ValueError` naming an input that is missing, or unknown and, if there is one, the option to add it."""
    known = [tensor.name for tensor in folder.inputs]
    missing = [tensor.name for tensor in folder.inputs if tensor.default is None and tensor.name not in names]
    if missing:
        raise ValueError(f"missing input {', '.join(missing)}")
    for name in (name for name in names if name not in known):
        options = folder.architecture.input_options
        option = next((option for pattern, option in options.items() if re.fullmatch(pattern, name)), None)
        if option is None:
            raise ValueError(f"unknown input {name}: the engine's inputs are {', '.join(known)}")
        value = getattr(folder.build_config, option)
        remedy = f"build with --{option}{'' if isinstance(value, bool) else ' N'}"
        raise ValueError(f"unknown input {name}: the engine was built with {option}={value}; {remedy}")


def check_shapes(folder: Engine, shapes: dict[str, Shape]) -> Sizes:
    """The sizes of these input shapes. Raises `ValueError` if they are inconsistent or outside the profile."""
    sizes = sizes_from(folder, shapes)
    check_sizes(folder, sizes)
    return sizes


def sizes_from(folder: Engine, shapes: dict[str, Shape]) -> Sizes:
    """The dynamic sizes of these input shapes. Raises `ValueError` if they contradict the table or each other."""
    scale = {"": 1, "vae_scale_factor": folder.build_config.vae_scale_factor}
    found: dict[str, dict[str, int]] = {}
    table = [x for x in folder.inputs if x.name in shapes]
    for tensor in table:
        shape = shapes[tensor.name]
        if len(shape) != len(tensor.shape):
            raise ValueError(f"{tensor.name} must have {len(tensor.shape)} dimensions, not shape {shape}")
        for dim, size in zip(tensor.shape, shape, strict=True):
            name, _, divisor = dim.partition("/")
            if "*" in dim:
                continue  # follows from the others
            if name in Sizes._fields:
                found.setdefault(name, {})[tensor.name] = size * scale[divisor]
            elif size != getattr(folder.model, name):
                raise ValueError(f"{tensor.name}: expected {name} {getattr(folder.model, name)}, got {size}")
    for name, of_inputs in found.items():
        if len(set(of_inputs.values())) > 1:
            raise ValueError(f"the {name} differs between inputs: {of_inputs}")
    sizes = Sizes(**{name: next(iter(of_inputs.values())) for name, of_inputs in found.items()})
    for tensor in table:
        expected = shape_of(tensor, folder.model, sizes, folder.build_config.vae_scale_factor)
        if shapes[tensor.name] != expected:
            raise ValueError(f"{tensor.name} must have shape {expected} for this image, not {shapes[tensor.name]}")
    return sizes


# Samples ---------------------------------------------------------------------------------------------


def sample_inputs(
    folder: Engine,
    *,
    resolution: str | int | Resolution | None = None,
    text_tokens: int | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Seeded random inputs in the engine's dtypes, on the CPU. Default sizes are those the engine is optimized for."""
    build, cfg_size = folder.build_config, folder.layout.cfg_size
    size = Resolution.read(resolution or build.opt_resolution)
    check_resolution(folder.model, size, build.vae_scale_factor)
    tokens = build.opt_text_tokens if text_tokens is None else text_tokens
    batch = build.batches(cfg_size)[1] if batch is None else batch
    if batch % cfg_size:
        raise ValueError(f"batch {batch} must be even: cfg_size=2 halves it")
    sizes = Sizes(batch, size.height, size.width, tokens)
    return draw_inputs(folder.architecture, folder.model, sizes, folder.dtype, build.vae_scale_factor, seed, build)


def draw_inputs(
    architecture: Architecture,
    model: ModelConfig,
    sizes: Sizes,
    dtype: str = "float32",
    vae_scale_factor: int = 8,
    seed: int = 0,
    build: BuildConfig | None = None,
) -> dict[str, torch.Tensor]:
    """Random inputs by name, on the CPU, with the optional ones of `build`; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    table = architecture.inputs if build is None else architecture.inputs_of(model, build)

    def draw(tensor: Input) -> torch.Tensor:
        shape = shape_of(tensor, model, sizes, vae_scale_factor)
        if tensor.uniform is not None:
            value = tensor.uniform * torch.rand(shape, generator=generator)
        elif tensor.default is not None:
            value = torch.full(shape, tensor.default)
        else:
            value = torch.randn(shape, generator=generator)
        return value.to(TORCH_DTYPES[input_dtype(tensor, dtype)])

    return {tensor.name: draw(tensor) for tensor in table}
