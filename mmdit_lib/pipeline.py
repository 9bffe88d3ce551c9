"""diffusers pipelines with an engine as their transformer, in one process or over MPI."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .checkpoint.hub import HUB_OPTIONS, TRANSFORMER_CONFIG, pipeline_folder, resolve_model
from .config import dtype_option, shown
from .engine.backend import RunnerOptions
from .engine.folder import EngineFolder
from .engine.inputs import is_dynamic
from .files import read_json
from .parallel.faults import start_mpi
from .parallel.heartbeat import doing
from .parallel.messages import broadcast, check_equal
from .runner import MMDiTRunner, with_changes


def load_pipeline(
    model: str | Path,
    engine_dir: str | Path,
    *,
    pipeline_class: type | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    runner_options: RunnerOptions | Mapping[str, Any] | None = None,
    encode_on_rank_0: bool = False,
    **options,
):
    """A diffusers pipeline whose transformer is an engine; diffusers' own transformer weights are not read.

    Args:
        model: pipeline folder, hub id or tiny, for the text encoders, the VAE and the scheduler.
        engine_dir: an engine folder written by `build`.
        pipeline_class: by default the model's text-to-image pipeline; img2img, inpainting and, with
            `controlnet=...`, the ControlNet pipelines work too.
        device: device of all components; by default CUDA if available.
        dtype: dtype of the other components; by default the engine's on a GPU or with a ControlNet, otherwise float32
            on a CPU, where half precision is slower.
        torch_dtype: diffusers' older name of `dtype`.
        runner_options: how to open the engine: a `RunnerOptions`, or a mapping with some of its fields.
        encode_on_rank_0: over MPI, load the text encoders on rank 0 only, for `sample`.
        options: passed to `from_pretrained`; a component that the pipeline's folder lacks (`controlnet`) is passed to
            the pipeline class, on the same device and in the same dtype as the others.

    Raises:
        ValueError: if both `dtype` and `torch_dtype` are given, or a component without a pipeline class for it, `model`
            cannot be found or does not fit the engine, its folder is damaged, or the backend cannot run here.
        OSError: from diffusers, if a part of `model` cannot be found or downloaded.
    """
    if dtype is not None and torch_dtype is not None:
        raise ValueError(f"dtype {dtype} and torch_dtype {torch_dtype}: give only dtype")
    folder, model = EngineFolder.open(engine_dir), resolve_model(model)
    special = folder.architecture.pipelines
    added = {name: options.pop(name) for name in special.ADDED_COMPONENTS if options.get(name)}
    if added and pipeline_class is None:
        raise ValueError(f"{next(iter(added))}: pass a pipeline_class that accepts it")
    modules = [x for part in added.values() for x in (part if isinstance(part, (list, tuple)) else [part])]
    if not all(isinstance(module, torch.nn.Module) for module in modules):
        raise ValueError(f"{next(iter(added))}: pass a loaded model, as from_pretrained returns it")
    if not isinstance(runner_options, RunnerOptions):
        runner_options = with_changes(RunnerOptions(), runner_options or {})
    if device is not None:
        runner_options = with_changes(runner_options, {"device": device})
    if Path(model).exists() or HUB_OPTIONS.isdisjoint(options):
        check_pipeline(pipeline_folder(model, options.get("revision")), folder)
    runner = MMDiTRunner.from_engine(engine_dir, runner_options)
    # Pipelines prepare images for added components in the transformer's dtype.
    dtype = dtype or torch_dtype or (runner.dtype if runner.device.type == "cuda" or added else torch.float32)
    left_out = ["transformer", *(special.TEXT_ENCODERS if encode_on_rank_0 and runner.rank else ())]
    options = {"use_safetensors": True, **dict.fromkeys(left_out), **dtype_option(dtype), **options}
    default_class = special.default_class()
    with doing("loading the pipeline"):
        first_class = default_class if added else pipeline_class or default_class
        pipe = install(first_class.from_pretrained(model, **options).to(runner.device), runner)
        if not added:
            return pipe
        for module in modules:
            if module.dtype != dtype:
                module.to(dtype)
        # With the transformer, which these components may read when the pipeline is created.
        return install(pipeline_class(**pipe.components, **added).to(runner.device), runner)


def check_pipeline(path: Path, folder: EngineFolder) -> None:
    """Raises `ValueError` if the transformer of a pipeline's folder has inputs of other sizes than the engine.

    Nothing else of its config matters, since the engine takes its place.
    """
    file = path / TRANSFORMER_CONFIG
    theirs = read_json(file) if file.is_file() else {}
    for tensor in folder.architecture.inputs:
        for size in (dim for dim in tensor.shape if not is_dynamic(dim) and dim in theirs):
            found, wanted = theirs[size], getattr(folder.model, size)
            if found != wanted:
                raise ValueError(
                    f"the pipeline {path} does not fit {folder.path}: {tensor.name} has {size} {shown(found)} there, "
                    f"{wanted} in the engine; give the pipeline that the checkpoint was converted from"
                )


def install(pipe, runner: MMDiTRunner):
    """Replace a pipeline's transformer, or set a missing one, with `runner`. Returns the pipeline.

    Its `save_pretrained` raises `ValueError` as long as its transformer is a runner.

    A pipeline made from its components, `StableDiffusion3Img2ImgPipeline(**pipe.components)`, needs no `install`, even
    after `pipe` is deleted: it shares the scheduler, from which the runner reads the timesteps. If it has a scheduler
    of its own, install the runner in it too; otherwise its results are the same, but nothing is computed ahead.
    """
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    # diffusers leaves a component of an unknown class out of a saved pipeline, with only a warning. Now it calls the
    # runner's `save_pretrained`, but after it has saved other components, so this pipeline's own asks the runner first.
    LOADABLE_CLASSES["mmdit_lib"] = {"MMDiTRunner": ["save_pretrained", "from_pretrained"]}
    pipe.register_modules(transformer=runner)
    runner.timesteps = Timesteps(pipe)
    pipe.save_pretrained = partial(_save_pretrained, weakref.proxy(pipe))  # a cycle would delay freeing the memory
    runner.folder.architecture.pipelines.adapt(pipe, runner.folder.model)
    return pipe


class Timesteps:
    """The timesteps of a pipeline's scheduler, which may be replaced; once the pipeline is gone, of its last one.

    The runner holds only a weak reference to the pipeline, which refers to it: a cycle would delay freeing the memory.
    """

    def __init__(self, pipe):
        self._pipe, self._scheduler = weakref.ref(pipe), getattr(pipe, "scheduler", None)

    def __call__(self) -> torch.Tensor | None:
        self._scheduler = getattr(self._pipe(), "scheduler", self._scheduler)
        found = getattr(self._scheduler, "timesteps", None)
        return found if isinstance(found, torch.Tensor) else None


def _save_pretrained(pipe, *arguments, **options) -> None:
    if isinstance(pipe.transformer, MMDiTRunner):
        pipe.transformer.save_pretrained()
    pipe.__class__.save_pretrained(pipe, *arguments, **options)


def sample(
    pipe, prompt: str | list[str] | None, *, generator: torch.Generator | None = None, **options
) -> list[Image.Image]:
    """Run a pipeline on all ranks; every rank calls this and gets the same images.

    Text encoders and the VAE's decoder run on rank 0 only, which broadcasts the text embeddings (a few MB) and the
    noise, so all ranks start from the same latents. Control images are encoded on every rank, with the same random
    numbers.

    Args:
        pipe: from `load_pipeline`; with `encode_on_rank_0=True` only rank 0 loads the text encoders (T5-XXL: 9.5 GB).
        prompt: used on rank 0 only, as are the text encoders' options; None if `prompt_embeds` are given.
        generator: of the noise; used on rank 0 only.
        options: for the pipeline's call; `latents` is used on rank 0 only.

    Raises:
        ValueError: for an `output_type` other than pil.
        RuntimeError: on every rank, if the ranks' latents are not bitwise equal.
    """
    world = start_mpi().COMM_WORLD
    special = pipe.transformer.folder.architecture.pipelines
    if options.pop("output_type", "pil") != "pil":
        raise ValueError("output_type: every rank returns PIL images; use pil")
    latents = options.pop("latents", None)
    encoding = {name: options.pop(name) for name in special.ENCODER_OPTIONS if name in options}
    given = pixels = None
    with doing("encoding the prompt" if world.rank == 0 else "waiting for the encoded prompt"):
        if world.rank == 0:
            how = dict(generator=generator, latents=latents, options=options, encoding=encoding)
            given = special.encode(pipe, prompt, **how)
        given = broadcast(world, given, pipe.transformer.device)
    share_random_state(world, pipe.transformer.device)
    pipe.transformer.count_steps(options.get("num_inference_steps"))
    with doing("denoising"):
        latents = pipe(**given, **options, output_type="latent").images
        check_equal(world, latents, "latents")
    with doing("decoding" if world.rank == 0 else "waiting for the decoded image"):
        if world.rank == 0:
            pixels = {"pixels": as_pixels(special.decode(pipe, latents))}
        pixels = broadcast(world, pixels, torch.device("cpu"))["pixels"].numpy()
    return [Image.fromarray(picture) for picture in pixels]


def share_random_state(world, device: torch.device) -> None:
    """Give every rank rank 0's random state, for what pipelines draw without a generator (encoded control images)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    states = broadcast(world, states if world.rank == 0 else None, torch.device("cpu"))
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def as_pixels(images: list[Image.Image]) -> torch.Tensor:
    """uint8 [B, H, W, 3]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))
