"""From a prompt to a picture through an engine, in one process or over MPI."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from .config import Resolution
from .engine.folder import EngineFolder
from .engine.profile import check_latent
from .pipeline import dtype_option, load_pipeline
from .tiny.package import resolve_model


@dataclass(frozen=True)
class Picture:
    """What a run of a pipeline gave.

    Attributes:
        image: None on every rank but the first.
        seconds: of the pipeline's call, loading excluded.
        backend: 'tensorrt' or 'pytorch'.
        reason: why that backend.
    """

    image: Image | None
    seconds: float
    backend: str
    reason: str


def generate(
    prompt: str,
    model: str | Path,
    engine_dir: str | Path,
    *,
    resolution: str | Resolution | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    runner_options: dict[str, Any] | None = None,
    **call_options,
) -> Picture:
    """Paint `prompt`.

    Args:
        model: the diffusers pipeline folder or hub id with text encoders, VAE and scheduler.
        engine_dir: as `build` wrote it; one for several ranks must be run by as many MPI processes.
        resolution: of the image in pixels; the one that the engine is optimised for if not given.
        seed: of the noise, drawn on the CPU, so that it is the same on every device.
        device: CUDA where there is one, if not given.
        runner_options: passed to `MMDiTRunner.from_engine`.
        call_options: passed to the pipeline's call, for instance `num_inference_steps`.

    Raises:
        ValueError: in one line and before anything is loaded, where size or steps do not fit; then as `load_pipeline`.
    """
    if call_options.get("num_inference_steps", 1) < 1:
        raise ValueError(f"num_inference_steps {call_options['num_inference_steps']}: give 1 or more")
    folder = EngineFolder.open(engine_dir)
    size = Resolution.read(resolution or folder.build.opt_resolution)
    scale = folder.build.vae_scale_factor
    if size.height % scale or size.width % scale:
        raise ValueError(f"resolution {size}: height and width must be multiples of {scale * folder.model.patch_size}")
    check_latent(folder, size.height // scale, size.width // scale)
    call_options |= {"height": size.height, "width": size.width, "generator": torch.Generator().manual_seed(seed)}
    if folder.mapping.world_size > 1:
        from .parallel import generate_together

        return generate_together(prompt, model, engine_dir, device, runner_options or {}, call_options)
    pipe = load_pipeline(model, engine_dir, device=device, runner_options=runner_options)
    start = time.perf_counter()
    image = pipe(prompt, **call_options).images[0]
    runner = pipe.transformer
    return Picture(image, time.perf_counter() - start, runner.backend.name, runner.reason)


def generate_by_diffusers(
    prompt: str, model: str | Path, *, dtype: torch.dtype, resolution: Resolution, seed: int = 0, **call_options
) -> Picture:
    """Paint `prompt` with diffusers' own transformer: what `generate` is compared with."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(resolve_model(model), use_safetensors=True, **dtype_option(dtype))
    start = time.perf_counter()
    image = pipe(
        prompt,
        height=resolution.height,
        width=resolution.width,
        generator=torch.Generator().manual_seed(seed),
        **call_options,
    ).images[0]
    return Picture(image, time.perf_counter() - start, "diffusers", "the reference")
