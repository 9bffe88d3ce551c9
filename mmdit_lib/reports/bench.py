"""Timing one denoising step of an engine and of diffusers' own transformer."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..config import Resolution
from ..engine.backend import Inputs
from ..engine.device import current
from ..engine.inputs import sample_inputs
from ..runner import MMDiTRunner
from .reference import check_same_model, load_reference


class Loop:
    """The steps of one image, as a pipeline runs them: their timesteps are known to the backend from the first step on.

    Args:
        backend: inputs by name, and all timesteps -> output.
        inputs: those of every step; only the timestep changes.
        timestep: the name of that input.
    """

    steps = 28

    def __init__(self, backend: Callable[..., torch.Tensor], inputs: Inputs, timestep: str):
        with torch.inference_mode(False):  # as diffusers' pipelines, whose tensors have a version
            given = {name: x.clone() for name, x in inputs.items()}
            like = given[timestep]
            self.timesteps = torch.linspace(1000, 1000 / self.steps, self.steps, device=like.device)
            self.given = [{**given, timestep: x.expand_as(like)} for x in self.timesteps]
        self.backend = backend

    def first(self) -> torch.Tensor:
        return self.backend(self.given[0], self.timesteps)

    def __call__(self) -> None:
        for given in self.given:
            self.backend(given, self.timesteps)


def step_times(step: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 3) -> list[float]:
    """Milliseconds of each call of `step` after the warm-up: CUDA events on a GPU, wall time on a CPU.

    Of a `Loop`, the mean of its steps.
    """
    time_of = _cuda_time if device.type == "cuda" else _wall_time
    with current(device):  # where events are recorded
        for _ in range(warm_up):
            step()
        return [time_of(step) / steps_in(step) for _ in range(repeats)]


def _cuda_time(step: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wall_time(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - begin)


def steps_in(step: Callable[[], object]) -> int:
    """How many steps a call of `step` runs."""
    return step.steps if isinstance(step, Loop) else 1


def alternately(
    steps: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, rounds: int = 3
) -> dict[str, float]:
    """Median milliseconds of each step, in `rounds` alternating rounds of `repeats` steps, as a GPU's clock changes.

    Of a `Loop`, whole images are timed, with at least `repeats` steps: the median of their means.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            count = steps_in(step)
            times[name] += step_times(step, device, -(-repeats // count), warm_up=3 if count == 1 else 0)
    return {name: statistics.median(found) for name, found in times.items()}


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Peak memory of the GPU `device` during a call, beyond what was allocated before."""
    with current(device):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def conditions(device: torch.device) -> str:
    """Versions and, on a GPU, its name, driver, clock and power."""
    import diffusers

    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    if device.type != "cuda":
        return f"{versions}, {torch.get_num_threads()} CPU threads"
    ask = "name,driver_version,clocks.sm,clocks.max.sm,power.draw"
    # By UUID, which torch gives without its prefix: nvidia-smi also counts GPUs that CUDA_VISIBLE_DEVICES leaves out.
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={ask}", "--format=csv,noheader", f"--id={gpu}"]
    return f"{versions}; {subprocess.run(command, capture_output=True, text=True).stdout.strip()} ({ask})"


def recorded_on() -> str:
    """This machine's GPUs, the date and torch's version: the first line of what a notebook records on a GPU."""
    gpus = Counter(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    names = [f"{count} x {name}" if count > 1 else name for name, count in gpus.items()]
    return f"recorded on {', '.join(names)}, {date.today()}, torch {torch.__version__}"


def timed_output(
    engine_dir: str | Path,
    *,
    batch: int = 2,
    resolution: str | None = None,
    text_tokens: int | None = None,
    repeats: int = 20,
    **options,
) -> tuple[torch.Tensor, float]:
    """One step on random inputs, the same for every layout: its output, on the CPU, and its median milliseconds.

    Under `mpirun` and in a cluster, every rank calls this and gets the whole output, and its own time.

    Args:
        options: for `MMDiTRunner.from_engine`.

    Raises:
        ValueError: as `MMDiTRunner.from_engine`, and for a size outside the engine's profile.
    """
    runner = MMDiTRunner.from_engine(engine_dir, **options)
    inputs = sample_inputs(runner.folder, resolution=resolution, text_tokens=text_tokens, batch=batch)
    output, (prepared, _) = runner.run(inputs).cpu(), runner.prepare(inputs)
    times = step_times(partial(runner.backend, prepared), runner.device, repeats)
    return output, statistics.median(times)


def bench_steps(
    runner: MMDiTRunner, *, resolution: Resolution, batch: int, text_tokens: int, model_path: str | None
) -> dict[str, Callable[[], object]]:
    """Steps to time, by name: the engine and, with `model_path`, diffusers' transformer in the same dtype.

    On a GPU the engine runs all steps of an image, and diffusers' transformer comes twice, the second time with every
    block compiled.

    Raises:
        ValueError: the sizes are outside the profile, or `model_path` is not the engine's model.
    """
    device, architecture = runner.device, runner.folder.architecture
    inputs = sample_inputs(runner.folder, resolution=resolution, batch=batch, text_tokens=text_tokens)
    prepared, _ = runner.prepare(inputs)
    step = Loop(runner.backend, prepared, architecture.conditioning[0]) if device.type == "cuda" else None
    steps = {f"engine ({runner.backend.name})": step or partial(runner.backend, prepared)}
    if model_path is None:
        return steps

    def of(reference: torch.nn.Module) -> Callable[[], object]:
        arguments = architecture.reference.arguments(prepared, runner.folder.model, runner.folder.build_config)
        return torch.inference_mode()(partial(reference, **arguments, return_dict=False))

    reference = load_reference(model_path, architecture, runner.dtype, device)
    check_same_model(reference, runner.folder)
    steps["diffusers"] = of(reference)
    if device.type == "cuda":
        compiled = load_reference(model_path, architecture, runner.dtype, device)
        for block in compiled.get_submodule(architecture.blocks):
            block.compile(fullgraph=True)
        steps["diffusers, compiled"] = of(compiled)
    return steps


def bench_step(
    runner: MMDiTRunner, *, resolution: Resolution, batch: int, text_tokens: int, repeats: int, model_path: str | None
) -> dict[str, float]:
    """Milliseconds per step by name, for the steps of `bench_steps`."""
    sizes = dict(resolution=resolution, batch=batch, text_tokens=text_tokens)
    return alternately(bench_steps(runner, **sizes, model_path=model_path), runner.device, repeats)


def bench_table(
    runner: MMDiTRunner, sizes: Mapping[str, Any], steps: Mapping[str, Callable[[], object]], times: Mapping[str, float]
) -> Table:
    """Milliseconds per step and, if diffusers' were timed too, relative speed; on one GPU also peak memory.

    Args:
        sizes: resolution, batch and text_tokens.
        steps: as from `bench_steps`.
        times: as from `alternately`.
    """
    folder, device = runner.folder, runner.device
    columns = {"ms (median)": {name: f"{ms:.2f}" for name, ms in times.items()}}
    if "diffusers" in times:
        columns["speed relative to diffusers"] = {n: f"{times['diffusers'] / ms:.2f}" for n, ms in times.items()}
    if device.type == "cuda" and folder.layout.world_size == 1:
        columns["peak memory beyond weights, GB"] = {n: f"{peak_bytes(s, device) / 1e9:.2f}" for n, s in steps.items()}
    size = f"{sizes['resolution']}, batch {sizes['batch']}, {sizes['text_tokens']} text tokens"
    title = f"one step, {size}, {folder.dtype}, {device}"
    table = Table("", *columns, title=title, caption=conditions(device))
    for name in times:
        table.add_row(name, *(column[name] for column in columns.values()))
    return table
