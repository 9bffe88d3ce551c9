"""The `mmdit` command. Every option is an argument of the function behind its subcommand."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from .checkpoint import convert
from .config import Dtype, Resolution
from .demo import demo
from .engine.build import build
from .parallel import guard
from .pipeline import BackendName

console = Console(highlight=False)


def picture_file(name: str) -> Path:
    """Raises `ValueError` where no picture of this name can be written; asked before the work starts."""
    path = Path(name).expanduser()
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or path.is_dir():
        raise ValueError(f"{name}: give the picture's file a name such as picture.png")
    if not path.parent.is_dir():
        raise ValueError(f"{name}: there is no folder {path.parent}")
    return path


def check_ranks(engine_dir: str) -> None:
    """Under mpirun: raises `ValueError` where the engine folder is for another number of ranks."""
    from .engine.folder import EngineFolder
    from .parallel import check_launch, launched_size

    check_launch(EngineFolder.open(engine_dir).mapping, launched_size(), engine_dir)


def doctor_command() -> None:
    """What is installed, which GPUs there are, whether a plan can run on them, and what is missing for what."""
    from .doctor import print_doctor

    print_doctor()


def inspect_command(
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = "engine_outputs",
) -> None:
    """Show what an engine folder or a checkpoint folder holds: inputs, profile, layers, sizes, origin.

    Args:
        folder: as `mmdit build` or `mmdit convert` wrote it.
    """
    from .inspection import print_inspection

    print_inspection(folder)


def parity_command(
    model_path: str,
    engine_dir: str = "engine_outputs",
    *,
    checkpoint_dir: str | None = None,
    resolution: str | None = None,
    text_tokens: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    full: bool = False,
    plot: str | None = None,
) -> None:
    """Compare every module of an engine's network with diffusers' transformer, on the same inputs.

    Exits with 1 where a module differs.

    Args:
        model_path: the diffusers checkpoint that was converted; tiny is the one that ships with the package.
        engine_dir: as `mmdit build` wrote it.
        checkpoint_dir: where the converted checkpoint is, if it was moved away from the engine folder.
        resolution: HEIGHTxWIDTH in pixels; the one that the engine is optimised for if not given.
        text_tokens: length of the text; the same.
        batch: rows; the same.
        seed: of the random inputs.
        full: show every module, not only the worst of each block.
        plot: a PNG file for the error against depth; under mpirun rank 0's.
    """
    from .parallel import launched_rank
    from .parity import all_ok, compare_layers, parity_report

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

        error_by_depth({engine_dir: result}).savefig(plot, dpi=120)
        console.print(f"plot: {plot}")
    if not all_ok(result):
        sys.exit(1)


def generate_command(
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")],
    *,
    model_path: str = "tiny",
    engine_dir: str = "engine_outputs",
    checkpoint_dir: str | None = None,
    output: str = "sd3.5-mmdit.png",
    negative_prompt: str = "",
    resolution: str | None = None,
    num_inference_steps: int = 28,
    guidance_scale: float = 7.0,
    seed: int = 0,
    backend: BackendName = "auto",
    device: str | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
) -> None:
    """Paint a prompt, with an engine in place of the transformer. Under mpirun all ranks paint one picture.

    Args:
        prompt: what to paint.
        model_path: the pipeline with text encoders and VAE: a folder, a hub id, or tiny.
        engine_dir: as `mmdit build` wrote it.
        checkpoint_dir: where the converted checkpoint is, if it was moved away from the engine folder.
        output: the PNG file to write.
        negative_prompt: what not to paint.
        resolution: HEIGHTxWIDTH in pixels; the one that the engine is optimised for if not given.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        seed: of the noise.
        backend: tensorrt, pytorch, or auto: tensorrt where the plan can run.
        device: a CUDA device or cpu; CUDA where there is one, if not given.
        compile: pytorch backend: compile with `torch.compile`.
        cuda_graph: replay each step as a CUDA graph.
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
        seed=seed,
        device=device,
        runner_options={
            "checkpoint_dir": checkpoint_dir, "backend": backend, "compile": compile, "cuda_graph": cuda_graph,
        },
    )  # fmt: skip
    if report.image is not None:  # rank 0
        partial = file.with_name(f".{file.stem}.partial{file.suffix}")
        report.image.save(partial)
        os.replace(partial, file)
        console.print(f"backend {report.backend} ({report.reason}); {report.seconds:.1f} s; picture: {output}")


def bench_command(
    engine_dir: str = "engine_outputs",
    *,
    model_path: str | None = None,
    checkpoint_dir: str | None = None,
    resolution: str | None = None,
    batch: int = 2,
    text_tokens: int = 333,
    repeats: int = 20,
    backend: BackendName = "auto",
    device: str | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
) -> None:
    """Time one denoising step of an engine and, where --model_path is given, of diffusers' transformer.

    Args:
        engine_dir: as `mmdit build` wrote it.
        model_path: the diffusers checkpoint to time beside it, or tiny.
        checkpoint_dir: where the converted checkpoint is, if it was moved away from the engine folder.
        resolution: HEIGHTxWIDTH in pixels; the one that the engine is optimised for if not given.
        batch: rows; guidance takes two per image.
        text_tokens: length of the text.
        repeats: timed steps; the median is shown.
        backend: tensorrt, pytorch or auto.
        device: a CUDA device or cpu.
        compile: pytorch backend: compile with `torch.compile`.
        cuda_graph: replay each step as a CUDA graph.
    """
    from .bench import bench_step
    from .pipeline import MMDiTRunner

    check_ranks(engine_dir)
    runner = MMDiTRunner.from_engine(
        engine_dir,
        checkpoint_dir=checkpoint_dir,
        backend=backend,
        device=device,
        compile=compile,
        cuda_graph=cuda_graph,
    )
    size = Resolution.read(resolution or runner.folder.build.opt_resolution)
    times = bench_step(
        runner, resolution=size, batch=batch, text_tokens=text_tokens, repeats=repeats, model_path=model_path
    )
    if runner.rank == 0:
        title = f"one step, {size}, batch {batch}, {text_tokens} text tokens, {runner.folder.dtype}, {runner.device}"
        table = Table("", "ms (median)", *(["times as fast as diffusers"] if model_path else []), title=title)
        for name, ms in times.items():
            table.add_row(name, f"{ms:.2f}", *([f"{times['diffusers'] / ms:.2f}"] if model_path else []))
        console.print(table)


def traffic_command(
    *, resolution: str = "1024x1024", text_tokens: int = 333, batch: int = 2, dtype: Dtype = "bfloat16"
) -> None:
    """Bytes that each collective moves per step, counted from the networks of the published models.

    Args:
        resolution: HEIGHTxWIDTH in pixels.
        text_tokens: length of the text.
        batch: rows.
        dtype: of the network.
    """
    from .traffic import print_traffic

    print_traffic(resolution=Resolution.read(resolution), text_tokens=text_tokens, batch=batch, dtype=dtype)


COMMANDS = {
    "doctor": doctor_command,
    "convert": convert,
    "build": build,
    "inspect": inspect_command,
    "parity": parity_command,
    "generate": generate_command,
    "bench": bench_command,
    "traffic": traffic_command,
    "demo": demo,
}


def main() -> None:
    """Entry point: errors of the user's making are one line and exit code 1; under mpirun one rank's error ends all."""
    # transformers' advice on image processors that nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with guard():
        try:
            result = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="mmdit")
            if isinstance(result, Path):
                console.print(f"written: {result}")
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"mmdit: {first_line(error)}")
        except KeyboardInterrupt:
            print("mmdit: interrupted; nothing half-written was left", file=sys.stderr)
            sys.exit(130)


def first_line(error: Exception) -> str:
    """Our own messages have one line; those of diffusers and the hub go on with advice that is not for here."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    main()
