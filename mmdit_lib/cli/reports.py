"""Commands that show something: what is installed, what is in a folder, errors, times, traffic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from ..config import Dtype, Resolution
from ..files import complete_file, picture_file
from ..parallel import launched_rank
from .images import DEFAULTS, Runner, check_ranks
from .usage import console


def doctor_command() -> None:
    """Show what is installed, which GPUs are present, whether they can run a plan, and how to get what is missing."""
    from ..reports.doctor import print_doctor

    print_doctor()


def inspect_command(
    folder: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = "engine_outputs",
) -> None:
    """Show the contents of an engine folder or a checkpoint folder: inputs, profile, layers, sizes, origin.

    Args:
        folder: an engine folder of `mmdit build` or a checkpoint folder of `mmdit convert`.
    """
    from ..reports.inspection import print_inspection

    print_inspection(folder)


def parity_command(
    model_path: str | Path,
    engine_dir: str | Path = "engine_outputs",
    *,
    checkpoint_dir: str | Path | None = None,
    resolution: str | None = None,
    text_tokens: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    full: bool = False,
    plot: str | Path | None = None,
) -> None:
    """Compare every module of an engine's network with diffusers' transformer, on the same inputs.

    Exits with 1 if a module differs.

    Args:
        model_path: the diffusers checkpoint that was converted, or tiny (the model that ships with the package).
        engine_dir: an engine folder of `mmdit build`.
        checkpoint_dir: the converted checkpoint, if it is no longer at its path relative to the engine folder.
        resolution: HEIGHTxWIDTH in pixels; by default the one that the engine is optimized for.
        text_tokens: number of text tokens; by default the engine's optimal one.
        batch: rows; by default the engine's optimal batch.
        seed: seed of the random inputs.
        full: show every module, not only the worst of each block.
        plot: image file for a plot of errors by depth (under mpirun, of rank 0); of what FP8 adds, if the engine is
            quantized.
    """
    from ..reports.parity import all_ok, compare_layers, parity_report

    plot = picture_file(plot) if plot else None
    check_ranks(engine_dir)
    result = compare_layers(
        model_path,
        engine_dir,
        checkpoint_dir=checkpoint_dir,
        resolution=resolution,
        text_tokens=text_tokens,
        batch=batch,
        seed=seed,
    )
    console.print(parity_report(result, full=full))
    if plot and launched_rank() == 0:
        from ..plots import error_by_depth, error_of_fp8

        figure = error_of_fp8(result) if result.attrs["quantized"] else error_by_depth({engine_dir: result})
        with complete_file(plot) as partial:
            figure.savefig(partial, dpi=120)
        console.print(f"plot: {plot}")
    if not all_ok(result):
        sys.exit(1)


def bench_command(
    engine_dir: str | Path = "engine_outputs",
    *,
    model_path: str | Path | None = None,
    resolution: str | None = None,
    batch: int | None = None,
    text_tokens: int | None = None,
    repeats: int = 20,
    profile: bool = False,
    plot: str | Path | None = None,
    runner: Runner = DEFAULTS,
) -> None:
    """Time one denoising step of an engine and, if --model_path is given, of diffusers' transformer.

    The two alternate. On a GPU, the engine runs all 28 steps of an image, so that the time includes what it computes
    ahead. diffusers' transformer is also timed with every block compiled, and peak memory is shown.

    Args:
        engine_dir: an engine folder of `mmdit build`.
        model_path: the diffusers checkpoint to time in the same run, or tiny.
        resolution: HEIGHTxWIDTH in pixels; by default the one that the engine is optimized for.
        batch: rows; guidance uses two per image. By default build's --opt_batch_size if it was given, otherwise 2, or
            1 if the engine allows no more.
        text_tokens: number of text tokens; by default the engine's optimal one.
        repeats: timed steps in each of three rounds; the median is shown.
        profile: also time every layer, and show the sums by module (under mpirun, of rank 0).
        plot: image file for a plot of the times: of each block with --profile, otherwise of the steps.
    """
    from ..plots import time_bars, time_by_block
    from ..reports.bench import alternately, bench_steps, bench_table
    from ..reports.profile import by_module, profile_step, profile_table
    from ..runner import MMDiTRunner

    if repeats < 1:
        raise ValueError(f"repeats {repeats}: give 1 or more")
    plot = picture_file(plot) if plot else None
    check_ranks(engine_dir)
    opened = MMDiTRunner.from_engine(engine_dir, runner)
    build = opened.folder.build_config
    sizes = dict(
        resolution=Resolution.read(resolution or build.opt_resolution),
        batch=(build.opt_batch_size or min(2, build.max_batch_size)) if batch is None else batch,
        text_tokens=build.opt_text_tokens if text_tokens is None else text_tokens,
    )
    steps = bench_steps(opened, **sizes, model_path=model_path)
    layers = profile_step(opened, **sizes, repeats=repeats) if profile else None
    times = alternately(steps, opened.device, repeats)
    if opened.rank == 0:
        console.print(bench_table(opened, sizes, steps, times))
        blocks = opened.folder.architecture.blocks
        if layers is not None:
            console.print(profile_table(layers, blocks, f"layers of one step, {opened.backend.name} backend"))
        if plot:
            figure = time_bars(times) if layers is None else time_by_block(by_module(layers, blocks))
            with complete_file(plot) as partial:
                figure.savefig(partial, dpi=120)
            console.print(f"plot: {plot}")


def traffic_command(
    *, resolution: str = "1024x1024", text_tokens: int = 333, batch: int = 2, dtype: Dtype = "bfloat16"
) -> None:
    """Count the bytes that each collective moves per step, from the networks of the published models.

    Args:
        resolution: HEIGHTxWIDTH in pixels.
        text_tokens: number of text tokens.
        batch: rows.
        dtype: dtype of the network.
    """
    from ..reports.traffic import print_traffic

    print_traffic(resolution=Resolution.read(resolution), text_tokens=text_tokens, batch=batch, dtype=dtype)
