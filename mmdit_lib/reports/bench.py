"""Timing one denoising step of an engine and of diffusers' own transformer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ..config import Resolution
from ..engine.inputs import sample_inputs
from ..runner import MMDiTRunner
from .reference import load_reference


def step_times(step: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 3) -> list[float]:
    """Milliseconds of each call of `step` after the warm-up: CUDA events on a GPU, wall time on a CPU."""
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
    return times


def median_ms(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    return statistics.median(step_times(step, device, repeats))


def bench_step(
    runner: MMDiTRunner, *, resolution: Resolution, batch: int, text_tokens: int, repeats: int, model_path: str | None
) -> dict[str, float]:
    """Milliseconds per step by name: the engine and, with `model_path`, diffusers' transformer in the same dtype."""
    device = runner.device
    inputs = sample_inputs(runner.folder, resolution=resolution, batch=batch, text_tokens=text_tokens)
    prepared, _ = runner.prepare(inputs)
    times = {f"engine ({runner.backend.name})": median_ms(lambda: runner.backend(prepared), device, repeats)}
    if model_path is not None:
        reference = load_reference(model_path, runner.folder.architecture, runner.dtype, device)
        with torch.inference_mode():
            given = runner.folder.architecture.given(prepared)
            times["diffusers"] = median_ms(lambda: reference(**given, return_dict=False), device, repeats)
    return times
