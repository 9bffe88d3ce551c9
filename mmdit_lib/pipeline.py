"""diffusers pipelines with an engine as their transformer, in one process or over MPI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .checkpoint.hub import resolve_model
from .config import dtype_option
from .engine.backend import RunnerOptions
from .parallel.faults import start_mpi
from .parallel.messages import broadcast, check_equal
from .runner import MMDiTRunner, with_changes


def load_pipeline(
    model: str | Path,
    engine_dir: str | Path,
    *,
    pipeline_class: type | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    runner_options: RunnerOptions | Mapping[str, Any] | None = None,
    encode_on_rank_0: bool = False,
    **options,
):
    """A diffusers pipeline whose transformer is an engine; diffusers' own transformer weights are not read.

    Args:
        model: pipeline folder, hub id or tiny, for the text encoders, the VAE and the scheduler.
        engine_dir: as `build` wrote it.
        pipeline_class: the model's text-to-image pipeline if not given; img2img and inpainting work too.
        device: of all components; CUDA if it is available, if not given.
        dtype: of the other components; if not given, the engine's on a GPU and float32 on a CPU, where half
            precision is slower.
        runner_options: how to open the engine: a `RunnerOptions`, or a mapping with some of its fields.
        encode_on_rank_0: over MPI, load the text encoders on rank 0 only, for `sample`.
        options: passed to `from_pretrained`.

    Raises:
        ValueError: in one line, if the engine folder is damaged, or the backend cannot run here.
        OSError: from diffusers, if `model` cannot be found or downloaded.
    """
    if not isinstance(runner_options, RunnerOptions):
        runner_options = with_changes(RunnerOptions(), runner_options or {})
    if device is not None:
        runner_options = with_changes(runner_options, {"device": device})
    runner = MMDiTRunner.from_engine(engine_dir, runner_options)
    special = runner.folder.architecture.pipelines
    dtype = dtype or (runner.dtype if runner.device.type == "cuda" else torch.float32)
    left_out = ["transformer", *(special.TEXT_ENCODERS if encode_on_rank_0 and runner.rank else ())]
    options = {"use_safetensors": True, **dict.fromkeys(left_out), **dtype_option(dtype), **options}
    pipe = (pipeline_class or special.default_class()).from_pretrained(resolve_model(model), **options)
    return install(pipe.to(runner.device), runner)


def install(pipe, runner: MMDiTRunner):
    """Put `runner` into a pipeline that has another transformer, or none. Returns the pipeline."""
    pipe.transformer = runner
    runner.folder.architecture.pipelines.adapt(pipe, runner.folder.model)
    return pipe


def sample(pipe, prompt: str | list[str], *, generator: torch.Generator | None = None, **options) -> list[Image.Image]:
    """Run a pipeline on all ranks; every rank calls this and returns the same pictures.

    Text encoders and VAE run on rank 0 alone: T5-XXL takes 9.5 GB, which the other ranks neither load nor
    run, and its output, a few MB, is broadcast. The noise is broadcast too, so all ranks start from the
    same latents.

    Args:
        pipe: from `load_pipeline`; `encode_on_rank_0=True` saves the other ranks' text encoders.
        prompt: only rank 0's counts, as do the options of the text encoders and the noise.
        generator: of the noise.
        options: of the pipeline's call; `latents` counts on rank 0 only.

    Raises:
        ValueError: for another `output_type` than pil.
        RuntimeError: on every rank, if the ranks' latents are not equal to the last bit.
    """
    world = start_mpi().COMM_WORLD
    special = pipe.transformer.folder.architecture.pipelines
    if options.pop("output_type", "pil") != "pil":
        raise ValueError("output_type: every rank returns PIL images; use pil")
    latents = options.pop("latents", None)
    encoding = {name: options.pop(name) for name in special.ENCODER_OPTIONS if name in options}
    given = None
    if world.rank == 0:
        given = special.encode(pipe, prompt, generator=generator, latents=latents, options=options, encoding=encoding)
    given = broadcast(world, given, pipe.transformer.device)
    with torch.inference_mode():
        latents = pipe(**given, **options, output_type="latent").images
    check_equal(world, latents, "latents")
    pixels = {"pixels": as_pixels(special.decode(pipe, latents))} if world.rank == 0 else None
    pixels = broadcast(world, pixels, torch.device("cpu"))["pixels"].numpy()
    return [Image.fromarray(picture) for picture in pixels]


def as_pixels(images: list[Image.Image]) -> torch.Tensor:
    """uint8 [B, H, W, 3]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))
