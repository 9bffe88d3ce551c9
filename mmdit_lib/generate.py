"""Generating an image from a prompt with an engine, in one process or over MPI."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from .checkpoint.hub import resolve_model
from .checkpoint.lora import Lora
from .checkpoint.lora_source import GivenLora, with_scales
from .config import Resolution, Sizes, dtype_option
from .engine.backend import RunnerOptions
from .engine.folder import EngineFolder
from .engine.inputs import check_sizes
from .pipeline import load_pipeline, sample


@dataclass(frozen=True)
class Picture:
    """The result of one pipeline call.

    Attributes:
        image: None on every rank except 0.
        seconds: duration of the pipeline's call, without loading.
        backend: 'tensorrt' or 'pytorch'.
        reason: why that backend was chosen.
    """

    image: Image | None
    seconds: float
    backend: str
    reason: str


def generate(
    prompt: str,
    model: str | Path | None,
    engine_dir: str | Path,
    *,
    resolution: str | int | Resolution | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    adapters: Iterable[GivenLora] = (),
    runner_options: RunnerOptions | Mapping[str, Any] | None = None,
    **call_options,
) -> Picture:
    """Generate an image from `prompt`. Under `mpirun` every rank calls this, and together they generate one image.

    Args:
        model: the diffusers pipeline with text encoders, VAE and scheduler: a folder, a hub id, tiny, or None for the
            one that the engine's checkpoint was converted from.
        engine_dir: an engine folder written by `build`; it needs one MPI process per rank.
        resolution: image size in pixels; by default the one that the engine is optimized for.
        seed: seed of the noise, which is drawn on the CPU so that it is the same on every device.
        device: by default CUDA if available.
        adapters: LoRAs, as for `MMDiTRunner.set_adapters`.
        runner_options: how to open the engine, as for `load_pipeline`.
        call_options: for the pipeline's call, for instance `num_inference_steps` or `skip_guidance_layers`; for several
            images in one call (`num_images_per_prompt`), call a pipeline from `load_pipeline`.

    Raises:
        ValueError: before anything is loaded, if steps or guidance are invalid, more than one image is requested, a
            size is outside the engine's profile or a LoRA does not fit the model; then as `load_pipeline`.
    """
    if call_options.get("num_inference_steps", 1) < 1:
        raise ValueError(f"num_inference_steps {call_options['num_inference_steps']}: give 1 or more")
    if not math.isfinite(call_options.get("guidance_scale", 1)):
        raise ValueError(f"guidance_scale {call_options['guidance_scale']}: give a finite number")
    if (images := call_options.get("num_images_per_prompt", 1)) != 1:
        raise ValueError(f"num_images_per_prompt {images}: generate draws one image; for several, use load_pipeline")
    folder = EngineFolder.open(engine_dir)
    model, revision = (model, None) if model else converted_from(folder)
    folder.architecture.pipelines.check_call(call_options, folder.model, folder.build_config)
    size = Resolution.read(resolution or folder.build_config.opt_resolution)
    check_sizes(
        folder, Sizes(height=size.height, width=size.width, **folder.architecture.pipelines.call_sizes(call_options))
    )
    adapters = with_scales(adapters)
    for adapter in adapters:
        Lora.open(*adapter, folder.architecture, folder.model)
    call_options |= {"height": size.height, "width": size.width, "generator": torch.Generator().manual_seed(seed)}
    parallel = folder.layout.world_size > 1
    where = dict(device=device, revision=revision, encode_on_rank_0=parallel)
    pipe = load_pipeline(model, engine_dir, runner_options=runner_options, **where)
    runner = pipe.transformer
    runner.set_adapters(adapters)
    if runner.rank:
        pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    images = sample(pipe, prompt, **call_options) if parallel else pipe(prompt, **call_options).images
    seconds = time.perf_counter() - start
    return Picture(images[0] if runner.rank == 0 else None, seconds, runner.backend.name, runner.reason)


def converted_from(folder: EngineFolder) -> tuple[str, str | None]:
    """The pipeline that the engine's checkpoint was converted from, and its commit if it was downloaded.

    A name without a commit was a path, and is not looked up on the hub. Raises `ValueError` if nothing is there.
    """
    name = folder.config["pretrained_config"].get("model_path")
    remedy = "use mmdit generate --model_path, or model in Python"
    if not name:
        raise ValueError(f"{folder.path} does not name its pipeline: {remedy}")
    path, revision = resolve_model(name), folder.checkpoint.revision if folder.checkpoint else None
    if not revision and not Path(path).exists():
        raise ValueError(f"{folder.path} was converted from {name}, which is not there: {remedy}")
    return path, revision


def generate_by_diffusers(
    prompt: str,
    model: str | Path,
    pipeline_class: type,
    *,
    dtype: torch.dtype,
    resolution: Resolution,
    seed: int = 0,
    **call_options,
) -> Picture:
    """Generate an image from `prompt` with diffusers' own transformer, as the reference for `generate`."""
    pipe = pipeline_class.from_pretrained(resolve_model(model), use_safetensors=True, **dtype_option(dtype))
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    picture = pipe(prompt, height=resolution.height, width=resolution.width, generator=generator, **call_options)
    return Picture(picture.images[0], time.perf_counter() - start, "diffusers", "the reference")
