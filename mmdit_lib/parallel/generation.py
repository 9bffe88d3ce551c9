"""One picture on several ranks: rank 0 reads the prompt and decodes; every rank runs the denoising loop.

Text encoders belong to rank 0 alone: T5-XXL is 9.5 GB that the other ranks neither load nor run, and
what comes out of it, a few MB, travels in one broadcast. The noise travels with it, so ranks cannot
start from different pictures.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..generate import Picture
from ..pipeline import load_pipeline as load_whole_pipeline
from .faults import start_mpi, wait

ENCODING = (
    "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "num_images_per_prompt",
    "clip_skip", "max_sequence_length",
)  # fmt: skip
"""Options of a pipeline's call that belong to its text encoders."""

Tensors = dict[str, torch.Tensor]


def generate_together(
    prompt: str, model: str | Path, engine_dir: str | Path, device, runner_options: dict[str, Any], call_options: dict
) -> Picture:
    """`generate` on every rank of this mpirun; the picture is rank 0's."""
    pipe = load_pipeline(model, engine_dir, device=device, runner_options=runner_options)
    runner = pipe.transformer
    if runner.rank:
        pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    images = sample(pipe, prompt, **call_options)
    seconds = time.perf_counter() - start
    return Picture(images[0] if runner.rank == 0 else None, seconds, runner.backend.name, runner.reason)


def load_pipeline(model: str | Path, engine_dir: str | Path, **options):
    """As `mmdit_lib.load_pipeline`; ranks other than 0 get no text encoders."""
    if start_mpi().COMM_WORLD.rank:
        options |= {"text_encoder": None, "text_encoder_2": None, "text_encoder_3": None}
    return load_whole_pipeline(model, engine_dir, **options)


def sample(pipe, prompt: str | list[str], *, generator: torch.Generator | None = None, **options) -> list[Image.Image]:
    """Run a pipeline of `load_pipeline` on all ranks; every rank returns the same pictures.

    Args:
        prompt: only rank 0's counts, as do the options of the text encoders and the noise.
        generator: of the noise.
        options: of `StableDiffusion3Pipeline`'s call; `latents` counts on rank 0 only.

    Raises:
        ValueError: for another `output_type` than pil.
        RuntimeError: on every rank, if the ranks' latents are not the same to the last bit.
    """
    world = start_mpi().COMM_WORLD
    if options.pop("output_type", "pil") != "pil":
        raise ValueError("output_type: every rank returns PIL images; use pil")
    latents = options.pop("latents", None)
    encoding = {name: options.pop(name) for name in ENCODING if name in options}
    given = encode(pipe, prompt, generator, latents, options, encoding) if world.rank == 0 else None
    given = broadcast(world, given, pipe.transformer.device)
    with torch.inference_mode():
        latents = pipe(**given, **options, output_type="latent").images
    check_same_latents(world, latents)
    pixels = decode(pipe, latents) if world.rank == 0 else None
    pixels = broadcast(world, pixels, torch.device("cpu"))["pixels"].numpy()
    return [Image.fromarray(picture) for picture in pixels]


@torch.inference_mode()
def encode(pipe, prompt, generator, latents, options: dict, encoding: dict) -> Tensors:
    """What the denoising loop starts from, as arguments of the pipeline's call."""
    guidance = options.get("guidance_scale", 7.0) > 1
    texts = {"prompt_2": None, "prompt_3": None} | encoding
    found = pipe.encode_prompt(prompt, device=pipe._execution_device, do_classifier_free_guidance=guidance, **texts)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = {name: value for name, value in zip(names, found, strict=True) if value is not None}
    side = pipe.default_sample_size * pipe.vae_scale_factor
    embeds, channels = given["prompt_embeds"], pipe.transformer.config.in_channels
    height, width = options.get("height") or side, options.get("width") or side
    given["latents"] = pipe.prepare_latents(
        len(embeds), channels, height, width, embeds.dtype, embeds.device, generator, latents
    )
    return given


@torch.inference_mode()
def decode(pipe, latents: torch.Tensor) -> Tensors:
    """Latents -> 'pixels', uint8 [B, H, W, 3]."""
    vae = pipe.vae
    latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
    images = pipe.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pil")
    return {"pixels": torch.from_numpy(np.stack([np.asarray(image) for image in images]))}


def broadcast(world, tensors: Tensors | None, device: torch.device) -> Tensors:
    """Rank 0's tensors by name, to every rank: plain bytes over MPI, the waiting ranks asleep."""
    if world.size == 1:
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    head, body = b"", np.empty(0, np.uint8)
    if tensors is not None:
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        head = json.dumps({n: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in kept.items()}).encode()
        body = np.concatenate([t.view(torch.uint8).numpy().reshape(-1) for t in kept.values()])
    sizes = np.array([len(head), body.size], np.int64)
    wait(world.Ibcast(sizes))
    head = np.frombuffer(bytearray(head) or bytearray(int(sizes[0])), np.uint8)
    body = body if world.rank == 0 else np.empty(int(sizes[1]), np.uint8)
    wait(world.Ibcast(head))
    wait(world.Ibcast(body))
    found, start = {}, 0
    for name, (dtype, shape) in json.loads(head.tobytes()).items():
        target = torch.empty(shape, dtype=getattr(torch, dtype))
        part = torch.from_numpy(body[start : start + target.nbytes].copy())
        found[name] = part.view(target.dtype).reshape(shape).to(device)
        start += target.nbytes
    return found


def check_same_latents(world, latents: torch.Tensor) -> None:
    digest = hashlib.sha256(latents.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    everyone = world.allgather(digest)
    differ = [rank for rank, found in enumerate(everyone) if found != everyone[0]]
    if differ:
        raise RuntimeError(
            f"rank {differ[0]} ended with other latents than rank 0: the ranks did not calculate the same"
        )
