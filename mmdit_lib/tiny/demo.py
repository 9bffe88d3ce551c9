"""`mmdit demo`: every step with the tiny model that ships with the package, on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..checkpoint import convert
from ..config import TORCH_DTYPES, Dtype
from ..engine.build import build
from ..engine.folder import EngineFolder, plan_file
from ..generate import Picture, generate, generate_by_diffusers
from ..plots import images_side_by_side
from ..reports.parity import all_ok, compare_layers, parity_report
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
    console, stages = Console(), Stages()
    model, out = str(model_path()), Path(output_dir)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, engine = out / "tllm_checkpoint", out / "engine_outputs"

    stages.run("convert", lambda: convert(model, checkpoint, dtype=dtype), lambda _: size_of(checkpoint), "checkpoint")
    stages.run("build", lambda: build(checkpoint, engine), lambda _: size_of(engine), plan_of(engine))
    worst = stages.run("parity", lambda: parity(model, engine), None, lambda worst: f"worst relative error {worst:.1e}")
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": GUIDANCE, "seed": seed}
    folder = EngineFolder.open(engine)
    options |= {"resolution": folder.build_config.opt_resolution}
    ours = stages.run("generate with our network", lambda: generate(prompt, model, engine, **options), None, describe)
    options |= {"dtype": TORCH_DTYPES[dtype]}
    reference = folder.architecture.pipelines.default_class()
    theirs = stages.run(
        "generate with diffusers", lambda: generate_by_diffusers(prompt, model, reference, **options), None, describe
    )

    picture, side_by_side = out / "picture.png", out / "beside_diffusers.png"
    ours.image.save(picture)
    difference = grey_levels(ours.image, theirs.image)
    images_side_by_side([theirs.image, ours.image], ["diffusers", "engine"]).savefig(side_by_side, dpi=110)
    console.print(stages.table())
    console.print(f"backend {ours.backend}: {ours.reason}")
    console.print(f"parity: every module agrees with diffusers; worst relative error {worst:.1e} in {dtype}")
    console.print(f"largest difference from diffusers' image: {difference} of 255 gray levels ({side_by_side})")
    console.print(f"image: {picture}")
    if dtype == "float32" and difference > 1:
        raise ValueError(f"the two images differ by {difference} gray levels; rounding in float32 explains at most 1")


class Stages:
    """Runs the steps of the demo and records their times and results."""

    def __init__(self):
        self.rows: list[tuple[str, ...]] = []

    def run(self, name: str, work: Callable, size: Callable | None, result):
        start = time.perf_counter()
        value = work()
        seconds = time.perf_counter() - start
        outcome = result(value) if callable(result) else result
        self.rows.append((name, f"{seconds:.1f} s", size(value) if size else "", outcome))
        return value

    def table(self) -> Table:
        table = Table("stage", "time", "size", "result")
        for row in self.rows:
            table.add_row(*row)
        return table


def size_of(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB"


def plan_of(engine: Path) -> Callable:
    def say(_) -> str:
        folder = EngineFolder.open(engine)
        return f"{plan_file(0)} by {folder.tensorrt}, {len(folder.graph(0).layers)} layers"

    return say


def parity(model: str, engine: Path) -> float:
    """Compare every module with diffusers; returns the worst relative error."""
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
