"""Generating images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ..engine.backend import RunnerOptions
from ..engine.folder import EngineFolder
from ..files import complete_file, picture_file
from ..parallel import check_launch, launched_size
from .usage import Loras, console

Runner = Annotated[RunnerOptions, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]  # options without a prefix
DEFAULTS = RunnerOptions()


def check_ranks(engine_dir: str | Path) -> None:
    """Under mpirun: raises `ValueError` if the engine folder is for another number of ranks."""
    check_launch(EngineFolder.open(engine_dir).layout, launched_size(), engine_dir)


def generate_command(
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")],
    *,
    model_path: str | Path | None = None,
    engine_dir: str | Path = "engine_outputs",
    output: str | Path = "sd3.5-mmdit.png",
    negative_prompt: str = "",
    resolution: str | None = None,
    num_inference_steps: int = 28,
    guidance_scale: float = 7.0,
    skip_guidance_layers: tuple[int, ...] = (),
    max_sequence_length: int = 256,
    seed: int = 0,
    loras: Loras = (),
    runner: Runner = DEFAULTS,
) -> None:
    """Generate an image from a prompt with an engine. Under mpirun, all ranks generate one image together.

    Args:
        prompt: what to draw.
        model_path: the pipeline with text encoders and VAE: a folder, a hub id, or tiny; by default the
            one that the engine's checkpoint was converted from.
        engine_dir: an engine folder of `mmdit build`.
        output: the image file to write.
        negative_prompt: what not to draw.
        resolution: HEIGHTxWIDTH in pixels; by default the one that the engine is optimized for.
        num_inference_steps: denoising steps.
        guidance_scale: scale of classifier-free guidance; 1 turns it off.
        skip_guidance_layers: blocks to skip for skip-layer guidance, for instance 7 8 9; build with --skip_layers.
        max_sequence_length: number of T5 tokens, up to 512.
        seed: seed of the noise.
        loras: a LoRA to fuse into the engine's weights, with its scale, as for mmdit convert.
    """
    from ..generate import generate

    file = picture_file(output)
    check_ranks(engine_dir)
    report = generate(
        prompt,
        model_path,
        engine_dir,
        negative_prompt=negative_prompt,
        resolution=resolution,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        skip_guidance_layers=list(skip_guidance_layers) or None,
        max_sequence_length=max_sequence_length,
        seed=seed,
        adapters=loras,
        runner_options=runner,
    )
    if report.image is not None:  # rank 0
        with complete_file(file) as partial:
            report.image.save(partial)
        console.print(f"backend {report.backend} ({report.reason}); {report.seconds:.1f} s; image: {output}")
