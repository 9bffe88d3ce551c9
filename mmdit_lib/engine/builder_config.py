"""TensorRT's `IBuilderConfig`: one optimization profile, target GPUs, and the options that a user gave."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from ..config import PlanOptions
from ..files import complete_file
from ..network.trt import installed, trt

log = logging.getLogger("mmdit_lib")

FLAGS = {"refit": "REFIT", "weight_streaming": "WEIGHT_STREAMING", "strip_plan": "STRIP_PLAN"}
"""Options that are a `BuilderFlag`."""
NEED_A_GPU = ("refit", "strip_plan")
"""TensorRT-RTX, which builds other plans without a GPU, fails to build these (version 1.7.1)."""
NEEDS = {
    "builder_optimization_level": ("IBuilderConfig", "builder_optimization_level"),
    "workspace": ("IBuilderConfig", "set_memory_pool_limit"),
    "timing_cache": ("IBuilderConfig", "create_timing_cache"),
    "profiling_verbosity": ("IBuilderConfig", "profiling_verbosity"),
    **{option: ("BuilderFlag", flag) for option, flag in FLAGS.items()},
}
"""The class and its member in TensorRT's API behind each field of `PlanOptions`."""


def check_options(options: PlanOptions) -> None:
    """Raises `ValueError` naming an option that is invalid, or that the installed TensorRT does not have."""
    for name in options.given():
        owner, member = NEEDS[name]
        if not hasattr(getattr(trt, owner), member):
            raise ValueError(f"{name}: {installed()} has no {owner}.{member}; build without this option")
        if name in NEED_A_GPU and not torch.cuda.is_available():
            raise ValueError(f"{name}: TensorRT builds such a plan only on a machine with a GPU")
    level, cache = options.builder_optimization_level, options.timing_cache
    if level is not None and not 0 <= level <= 5:
        raise ValueError(f"builder_optimization_level {level}: use 0 to 5")
    options.workspace_bytes  # noqa: B018
    if cache is not None and (cache.is_dir() or not cache.parent.is_dir()):
        raise ValueError(f"timing_cache {cache}: give a file name in a folder that exists")
    if cache is not None and not os.access(cache.resolve().parent, os.W_OK | os.X_OK):
        raise ValueError(f"timing_cache {cache}: no permission to write in {cache.resolve().parent}")


def builder_config(
    builder,
    dtype: str,
    shapes: dict[str, list[tuple[int, ...]]],
    capabilities: tuple[str, ...] = (),
    options: PlanOptions | None = None,
):
    """An `IBuilderConfig` for a network of `dtype`. Raises `ValueError` naming an option that TensorRT rejects.

    Args:
        shapes: the min, opt and max shape of every input.
        capabilities: the compute capabilities to build for; TensorRT's default if empty.
    """
    config = builder.create_builder_config()
    if dtype == "float32":
        config.clear_flag(trt.BuilderFlag.TF32)  # full float32 precision
    profile = builder.create_optimization_profile()
    for name, (low, middle, high) in shapes.items():
        profile.set_shape(name, low, middle, high)
    config.add_optimization_profile(profile)
    if capabilities:
        set_capabilities(config, capabilities)
    if options:
        set_options(config, options)
    return config


def set_capabilities(config, capabilities: tuple[str, ...]) -> None:
    if not hasattr(config, "set_compute_capability"):
        raise ValueError(
            f"compute_capability: {installed()} builds for the local GPU only; tensorrt_rtx accepts a list"
        )
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
        if member is None:
            legal = [m.removeprefix("SM") for m in trt.ComputeCapability.__members__ if m.startswith("SM")]
            raise ValueError(f"compute_capability {capability}: use {', '.join(f'{m[:-1]}.{m[-1]}' for m in legal)}")
        config.set_compute_capability(member, i)


def set_options(config, options: PlanOptions) -> None:
    if options.builder_optimization_level is not None:
        config.builder_optimization_level = options.builder_optimization_level
    if (nbytes := options.workspace_bytes) is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, nbytes)
    if options.profiling_verbosity is not None:
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, options.profiling_verbosity.upper())
    for name, flag in FLAGS.items():
        if getattr(options, name):
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if options.timing_cache is not None:
        load_timing_cache(config, options.timing_cache)


# The timing cache ------------------------------------------------------------------------------------


def load_timing_cache(config, path: Path) -> None:
    """Start from the timings in `path`, or from none if it does not exist."""
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ValueError(
            f"timing_cache {path} is not a timing cache of {installed()} for this machine; give another file name"
        )


def save_timing_cache(config, path: Path) -> None:
    """Replace `path` by the timings of this build and those that it started from.

    If it cannot be written, logs a warning: the cache only makes later builds faster, and the plan is complete.
    """
    try:
        with complete_file(path) as partial:
            partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
    except (OSError, ValueError) as error:
        log.warning("the plan is complete, but timing_cache %s was not written: %s", path, error)
