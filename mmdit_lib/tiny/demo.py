"""`mmdit demo`: every step with the tiny model that ships with the package, on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from rich.console import Console
from rich.table import Table

from ..checkpoint import convert
from ..config import TORCH_DTYPES, Dtype
from ..engine.build import build
from ..engine.folder import EngineFolder, plan_file
from ..files import complete_file
from ..generate import Picture, generate, generate_by_diffusers
from . import model_path

PROMPT = "a small red circle to the left of a large blue triangle on a yellow background"
GUIDANCE = 4.0
"""The guidance scale at which the tiny model draws best."""


def demo(
    output_dir: str | Path = "demo_output",
    *,
    prompt: str = PROMPT,
    dtype: Dtype = "float32",
    num_inference_steps: int = 28,
    seed: int = 0,
) -> None:
    """Convert the tiny model, build its engine, check every layer, and generate the same image as diffusers.

    Args:
        output_dir: folder for checkpoint, engine folder and images.
        prompt: what to draw.
        dtype: dtype of the engine.
        num_inference_steps: denoising steps.
        seed: seed of the noise.

    Raises:
        ValueError: if a module or, in float32, the image differs from diffusers'.
    """
    console, stages = Console(), Table("stage", "time", "size", "result")
    model, out = str(model_path()), Path(output_dir).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, seconds = timed(convert, model, out / "tllm_checkpoint", dtype=dtype)
    stages.add_row("convert", seconds, size_of(checkpoint), "checkpoint")
    engine, seconds = timed(build, checkpoint, out / "engine_outputs")
    folder = EngineFolder.open(engine)
    plan = f"{plan_file(0)} by {folder.tensorrt}, {len(folder.graph(0).layers)} layers"
    stages.add_row("build", seconds, size_of(engine), plan)
    worst, seconds = timed(parity, model, engine)
    stages.add_row("parity", seconds, "", f"worst relative error {worst:.1e}")
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": GUIDANCE, "seed": seed}
    options |= {"resolution": folder.build_config.opt_resolution}
    ours, seconds = timed(generate, prompt, model, engine, **options)
    stages.add_row("generate with our network", seconds, "", describe(ours))
    pipeline = folder.architecture.pipelines.default_class()
    theirs, seconds = timed(generate_by_diffusers, prompt, model, pipeline, dtype=TORCH_DTYPES[dtype], **options)
    stages.add_row("generate with diffusers", seconds, "", describe(theirs))

    picture, side_by_side = save_images(out, ours.image, theirs.image)
    difference = grey_levels(ours.image, theirs.image)
    console.print(stages)
    console.print(f"backend {ours.backend}: {ours.reason}")
    console.print(f"parity: every module agrees with diffusers; worst relative error {worst:.1e} in {dtype}")
    console.print(f"largest difference from diffusers' image: {difference} of 255 gray levels ({side_by_side})")
    console.print(f"image: {picture}")
    if dtype == "float32" and difference > 1:
        raise ValueError(f"the two images differ by {difference} gray levels; rounding in float32 explains at most 1")


def save_images(folder: Path, ours: Image, theirs: Image) -> tuple[Path, Path]:
    """Write our image, and both side by side; returns their files."""
    from ..plots import images_side_by_side  # imports matplotlib, which other commands do not need

    picture, side_by_side = folder / "picture.png", folder / "beside_diffusers.png"
    with complete_file(picture) as partial:
        ours.save(partial)
    with complete_file(side_by_side) as partial:
        images_side_by_side([theirs, ours], ["diffusers", "engine"]).savefig(partial, dpi=110)
    return picture, side_by_side


def timed(work: Callable, *arguments, **options) -> tuple[Any, str]:
    """The result of a call, and its time."""
    start = time.perf_counter()
    result = work(*arguments, **options)
    return result, f"{time.perf_counter() - start:.1f} s"


def size_of(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB"


def parity(model: str, engine: Path) -> float:
    """Compare every module with diffusers; returns the worst relative error."""
    from ..reports.parity import all_ok, compare_layers, parity_report  # imports pandas, likewise

    result = compare_layers(model, engine)
    if not all_ok(result):
        Console().print(parity_report(result))
        raise ValueError("parity: the network differs from diffusers' transformer; see the table above")
    return float(result["relative_error"].max())


def describe(picture: Picture) -> str:
    return f"{picture.image.width}x{picture.image.height} by {picture.backend}, {picture.seconds:.1f} s without loading"


def grey_levels(a, b) -> int:
    """The largest difference of two images in any channel of any pixel."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())
