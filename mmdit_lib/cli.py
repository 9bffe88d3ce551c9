"""The `mmdit` command. Every option is an argument of the function behind its subcommand."""

from __future__ import annotations

import difflib
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial, wraps
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from rich.console import Console

from .checkpoint import convert, export
from .config import Dtype, Resolution
from .engine.backend import RunnerOptions
from .engine.build import build
from .engine.folder import EngineFolder
from .engine.onnx_file import export_onnx
from .files import INTERRUPTED, complete_file, picture_file
from .parallel import check_launch, guard, launched_rank, launched_size
from .tiny.demo import demo

console = Console(highlight=False, markup=False)  # a path may look like markup

Runner = Annotated[RunnerOptions, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]  # options without a prefix
DEFAULTS = RunnerOptions()
Loras = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="lora", metavar="PATH:SCALE")]
OPTIONS = {"loras": Loras}  # arguments that have another type on the command line


def check_ranks(engine_dir: str | Path) -> None:
    """Under mpirun: raises `ValueError` if the engine folder is for another number of ranks."""
    check_launch(EngineFolder.open(engine_dir).layout, launched_size(), engine_dir)


def doctor_command() -> None:
    """Show what is installed, which GPUs are present, whether they can run a plan, and how to get what is missing."""
    from .reports.doctor import print_doctor

    print_doctor()


def inspect_command(
    folder: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = "engine_outputs",
) -> None:
    """Show the contents of an engine folder or a checkpoint folder: inputs, profile, layers, sizes, origin.

    Args:
        folder: an engine folder of `mmdit build` or a checkpoint folder of `mmdit convert`.
    """
    from .reports.inspection import print_inspection

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
        plot: image file for a plot of errors by depth (under mpirun, of rank 0).
    """
    from .reports.parity import all_ok, compare_layers, parity_report

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
        from .plots import error_by_depth

        with complete_file(plot) as partial:
            error_by_depth({engine_dir: result}).savefig(partial, dpi=120)
        console.print(f"plot: {plot}")
    if not all_ok(result):
        sys.exit(1)


def generate_command(
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")],
    *,
    model_path: str | Path = "tiny",
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
        model_path: the pipeline with text encoders and VAE: a folder, a hub id, or tiny.
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
    from .generate import generate

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


def bench_command(
    engine_dir: str | Path = "engine_outputs",
    *,
    model_path: str | Path | None = None,
    resolution: str | None = None,
    batch: int = 2,
    text_tokens: int = 333,
    repeats: int = 20,
    profile: bool = False,
    plot: str | Path | None = None,
    runner: Runner = DEFAULTS,
) -> None:
    """Time one denoising step of an engine and, if --model_path is given, of diffusers' transformer.

    The two alternate. On a GPU, diffusers' is also timed with every block compiled, and peak memory is shown.

    Args:
        engine_dir: an engine folder of `mmdit build`.
        model_path: the diffusers checkpoint to time in the same run, or tiny.
        resolution: HEIGHTxWIDTH in pixels; by default the one that the engine is optimized for.
        batch: rows; guidance uses two per image.
        text_tokens: number of text tokens.
        repeats: timed steps in each of three rounds; the median is shown.
        profile: also time every layer, and show the sums by module (under mpirun, of rank 0).
        plot: image file for a plot of the times: of each block with --profile, otherwise of the steps.
    """
    from .plots import time_bars, time_by_block
    from .reports.bench import alternately, bench_steps, bench_table
    from .reports.profile import by_module, profile_step, profile_table
    from .runner import MMDiTRunner

    if repeats < 1:
        raise ValueError(f"repeats {repeats}: give 1 or more")
    plot = picture_file(plot) if plot else None
    check_ranks(engine_dir)
    opened = MMDiTRunner.from_engine(engine_dir, runner)
    size = Resolution.read(resolution or opened.folder.build_config.opt_resolution)
    sizes = dict(resolution=size, batch=batch, text_tokens=text_tokens)
    layers = profile_step(opened, **sizes, repeats=repeats) if profile else None
    steps = bench_steps(opened, **sizes, model_path=model_path)
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
    from .reports.traffic import print_traffic

    print_traffic(resolution=Resolution.read(resolution), text_tokens=text_tokens, batch=batch, dtype=dtype)


COMMANDS = {
    "doctor": doctor_command,
    "convert": convert,
    "export": export,
    "build": build,
    "onnx": export_onnx,
    "inspect": inspect_command,
    "parity": parity_command,
    "generate": generate_command,
    "bench": bench_command,
    "traffic": traffic_command,
    "demo": demo,
}


def main() -> None:
    """Entry point of `mmdit`."""
    with one_line_errors("mmdit"):
        result = called(sys.argv[1:])
        if isinstance(result, Path):
            console.print(f"written: {result}")


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """A user's mistake is one line and exit code 1, or 2 if it is one of usage.

    Under mpirun one rank's error ends all ranks.
    """
    # Silences transformers' advice on image processors, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler: when it starts and stops
    logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(not_about_the_hub)
    with guard():
        try:
            yield
        except UsageError as error:
            print(f"{program}: {error}", file=sys.stderr)
            sys.exit(2)
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"{program}: {first_line(error)}")
        except KeyboardInterrupt:
            print(f"{program}: {INTERRUPTED}", file=sys.stderr)
            sys.exit(130)


def not_about_the_hub(record: logging.LogRecord) -> bool:
    """False for diffusers' two lines on a hub out of reach: without a cached copy its error says the same."""
    return not record.getMessage().startswith("Couldn't connect to the Hub")


TYRO = (tyro.conf.OmitArgPrefixes,)


class UsageError(Exception):
    """What is wrong with a command line, in one line."""


def called(arguments: list[str]) -> Any:
    """The result of a subcommand. Raises `UsageError` if its arguments cannot be parsed."""
    name, *rest = arguments or [""]
    if name in COMMANDS:
        return parsed(COMMANDS[name], f"mmdit {name}", rest)()
    if name in ("-h", "--help") or name.startswith("--tyro"):
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="mmdit", args=arguments, config=TYRO)
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"use {', '.join(COMMANDS)}"
    raise UsageError(f"{f'no command {name!r}' if name else 'no command given'}; {hint} (see mmdit --help)")


def parsed(function: Callable, prog: str, arguments: list[str]) -> Callable[[], Any]:
    """`function` with its options from the command line. Raises `UsageError`; `--help` prints tyro's text and exits."""

    @wraps(function)
    def later(*args, **options):
        return partial(function, *args, **options)

    del later.__wrapped__  # tyro would take the types from there
    later.__signature__ = inspect.signature(function)
    later.__annotations__ = types = get_type_hints(function, include_extras=True)
    types |= {name: OPTIONS[name] for name in OPTIONS.keys() & types.keys()}
    try:
        with redirect_stderr(io.StringIO()) as box:
            return tyro.cli(later, prog=prog, args=arguments, config=TYRO)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UsageError(f"{usage_fault(box.getvalue())} (see {prog} --help)") from None


def usage_fault(box: str) -> str:
    """The message in tyro's box of several sections, as one line, with the option that was probably meant."""
    box = re.sub(r"\x1b\[[\d;]*m", "", box)  # colors, on a terminal
    rows = [row.strip("│| ") for row in box.strip().splitlines()[1:-1]]
    sections = [" ".join(group) for rule, group in groupby(rows, lambda row: set(row) <= set("─-")) if not rule]
    fault = next((text for text in sections if text.startswith("Unrecognized")), sections[0])
    if unknown := re.match(r"Unrecognized options: (--[\w-]+)", fault):
        others = set(re.findall(r"--[\w-]+", box)) - {unknown[1], "--help"}
        near = difflib.get_close_matches(unknown[1].replace("_", "-"), others, 1)
        fault = f"unknown option {unknown[1]}{f'; did you mean {near[0]}?' if near else ''}"
    return fault[0].lower() + fault[1:].rstrip(".")


def first_line(error: Exception) -> str:
    """Our messages have one line; those of diffusers and the hub continue with advice that does not apply here."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    main()
