"""Timing one denoising step of an engine, beside diffusers' own transformer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from .config import Resolution
from .engine.folder import EngineFolder
from .pipeline import MMDiTRunner


def random_inputs(folder: EngineFolder, resolution: Resolution, batch: int, text_tokens: int, seed: int = 0) -> dict:
    """Inputs of one step, float32 on the CPU: the same for every rank and backend."""
    generator = torch.Generator().manual_seed(seed)
    model, scale = folder.model, folder.build.vae_scale_factor

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": draw(batch, model.in_channels, resolution.height // scale, resolution.width // scale),
        "encoder_hidden_states": draw(batch, text_tokens, model.joint_attention_dim),
        "pooled_projections": draw(batch, model.pooled_projection_dim),
        "timestep": torch.full((batch,), 500.0),
    }


def median_ms(step: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 3) -> float:
    """The median time of `step` in milliseconds: by CUDA events on a GPU, by the clock on a CPU."""
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def bench_step(
    runner: MMDiTRunner, *, resolution: Resolution, batch: int, text_tokens: int, repeats: int, model_path: str | None
) -> dict[str, float]:
    """Milliseconds per step by name: the engine and, with `model_path`, diffusers' transformer in the same dtype."""
    device = runner.backend.device
    inputs = random_inputs(runner.folder, resolution, batch, text_tokens)
    prepared, _ = runner.prepare(inputs)
    times = {f"engine ({runner.backend.name})": median_ms(lambda: runner.backend(prepared), device, repeats)}
    if model_path is not None:
        from .parity import load_reference

        reference = load_reference(model_path, runner.dtype, device)
        with torch.inference_mode():
            times["diffusers"] = median_ms(lambda: reference(**prepared, return_dict=False), device, repeats)
    return times
