"""Memory of one process that generates many images: changing sizes, batches, text lengths and step counts.

    python -m benchmarks.long_run --pictures 500 --output long_run.json

    # On a GPU, without TensorRT, with an engine folder of `mmdit build --no-plan --max_batch_size 4`:
    python -m benchmarks.long_run --engine_dir engine_outputs --compile --cuda_graph --output long_run_gpu.json \\
        --plot long_run_gpu.png

Records memory after each call of the pipeline (resident, in use according to glibc's malloc, and a GPU's allocated
and reserved), fits a line to what follows the warm-up, and prints the result as Markdown. Resident exceeds in use:
malloc keeps freed memory.
"""

from __future__ import annotations

import ctypes
import json
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from tqdm import tqdm

from mmdit_lib import EngineFolder, build, convert, load_pipeline
from mmdit_lib.files import complete_file
from mmdit_lib.plots.figure import COLOURS, Figure, new_axes

RESULTS = Path(__file__).parent / "results"
LABELS = {"rss": "resident", "in_use": "in use", "allocated": "GPU, allocated", "reserved": "GPU, reserved"}
MB = 1e6


MALLINFO2 = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


class MallInfo2(ctypes.Structure):
    """glibc's statistics of malloc, see `man mallinfo`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO2)


LIBC = ctypes.CDLL("libc.so.6")
LIBC.mallinfo2.restype = MallInfo2


@dataclass(frozen=True)
class Options:
    pictures: int = 500
    """calls of the pipeline"""
    output: Path = Path("long_run.json")
    """all measurements"""
    plot: Path = RESULTS / "long_run.png"
    """the curves"""
    engine_dir: Path | None = None
    """an engine folder of the tiny model; by default one is built without a plan, which needs TensorRT"""
    device: str | None = None
    """by default CUDA if available"""
    compile: bool = False
    """compile with `torch.compile`"""
    cuda_graph: bool = False
    """replay each step as a CUDA graph"""
    warm_up: int = 150
    """calls before the line is fitted"""
    seed: int = 0
    """of the sizes"""


def draw(folder: EngineFolder, drawn: random.Random) -> dict[str, int | float]:
    """Random arguments of a pipeline call that the engine supports."""
    config = folder.build_config
    step = folder.model.pixel_step(config.vae_scale_factor)
    low, high = config.min_resolution, config.max_resolution
    guided = drawn.random() < 0.7
    return {
        "height": drawn.randrange(low.height, high.height + 1, step),
        "width": drawn.randrange(low.width, high.width + 1, step),
        "num_images_per_prompt": drawn.randint(1, config.max_batch_size // (2 if guided else 1)),
        "guidance_scale": 4.0 if guided else 1.0,
        "max_sequence_length": drawn.choice((77, 128, 256)),
        "num_inference_steps": drawn.randint(2, 4),
    }


def memory() -> dict[str, int]:
    """Bytes."""
    malloc = LIBC.mallinfo2()
    found = {"rss": psutil.Process().memory_info().rss, "in_use": malloc.uordblks + malloc.hblkhd}
    if torch.cuda.is_available():
        found |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return found


def small_engine(work: Path) -> Path:
    checkpoint = convert("tiny", work / "checkpoint", dtype="float32", progress=False)
    return build(checkpoint, work / "engine", max_batch_size=4, plan=False, progress=False)


def paint(engine: Path, options: Options) -> Iterator[dict]:
    """One row per call: its arguments, its seconds, and the memory after it."""
    runner = {"backend": "pytorch", "compile": options.compile, "cuda_graph": options.cuda_graph}
    pipe = load_pipeline("tiny", engine, device=options.device, runner_options=runner)
    pipe.set_progress_bar_config(disable=True)
    drawn = random.Random(options.seed)
    for number in tqdm(range(options.pictures), desc="pictures"):
        arguments = draw(pipe.transformer.folder, drawn)
        start = time.perf_counter()
        pipe(f"a red circle, number {number}", generator=torch.Generator().manual_seed(number), **arguments)
        yield arguments | {"seconds": round(time.perf_counter() - start, 3)} | memory()


def slope(values: list[int]) -> float:
    """Bytes per call, by least squares."""
    return float(np.polyfit(range(len(values)), values, 1)[0])


def report(rows: list[dict], conditions: dict) -> str:
    """Markdown."""
    after = conditions["warm_up"]
    shapes = {tuple(row[name] for name in ("height", "width", "num_images_per_prompt", "guidance_scale",
                                           "max_sequence_length")) for row in rows}  # fmt: skip
    lines = [
        f"{len(rows)} calls in one process, {len(shapes)} different sets of sizes, "
        f"{sum(row['seconds'] for row in rows):.0f} s. {', '.join(f'{k} {v}' for k, v in conditions.items())}.\n",
        f"| memory | after call {after}, MB | at the end, MB | most, MB | slope after call {after}, MB per 100 calls |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, label in LABELS.items():
        if name in rows[0]:
            values = [row[name] for row in rows]
            numbers = (values[after] / MB, values[-1] / MB, max(values) / MB)
            shown = " | ".join(f"{number:.1f}" for number in numbers)
            lines.append(f"| {label} | {shown} | {100 * slope(values[after:]) / MB:+.2f} |")
    return "\n".join(lines)


def curves(rows: list[dict], warm_up: int) -> Figure:
    figure, axes = new_axes(8.5, 3.6)
    for colour, (name, label) in zip(COLOURS, LABELS.items(), strict=False):
        if name in rows[0]:
            axes.plot([row[name] / MB for row in rows], color=colour, label=label, linewidth=1.2)
    axes.axvline(warm_up, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("calls of the pipeline")
    axes.set_ylabel("MB")
    axes.set_title("Memory after each call (dotted: end of the warm-up)", loc="left")
    axes.legend(frameon=False)
    return figure


def main(options: Options) -> None:
    if options.warm_up >= options.pictures - 1:
        raise SystemExit(f"warm_up {options.warm_up}: give less than pictures ({options.pictures}) - 1")
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    conditions = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: value for name, value in asdict(options).items() if name in ("compile", "cuda_graph", "warm_up")},
    }
    rows = []
    with tempfile.TemporaryDirectory(prefix="mmdit-long-run-") as work:
        for row in paint(options.engine_dir or small_engine(Path(work)), options):
            rows.append(row)
            with complete_file(options.output) as partial:
                partial.write_text(json.dumps({"conditions": conditions, "calls": rows}) + "\n")
    curves(rows, options.warm_up).savefig(options.plot, dpi=110)
    print(report(rows, conditions))


if __name__ == "__main__":
    main(tyro.cli(Options))
