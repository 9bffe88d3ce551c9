"""Time and peak memory of converting and building full-size SD3.5-medium with random weights.

    python benchmarks/full_size.py --work /big/disk [--model stable-diffusion-3.5-medium]

Needs 20 GB of disk and 16 GB of memory. Writes `benchmarks/results/full_size.md`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmdit_lib.network.trt import installed

RESULTS = Path(__file__).parent / "results" / "full_size.md"
MMDIT = [sys.executable, "-m", "mmdit_lib.cli"]


def measured(command: list[str]) -> tuple[float, int]:
    """Run a process; returns its seconds and peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder on a disk with enough space")
    parser.add_argument("--model", default="stable-diffusion-3.5-medium")
    options = parser.parse_args()
    work = options.work
    source, checkpoint, engine, copy = (work / n for n in ("source", "tllm_checkpoint", "engine_outputs", "copy"))
    make = (
        "from mmdit_lib.checkpoint.random_weights import write_random_transformer as w; "
        f"from mmdit_lib.sd3 import KNOWN_MODELS as k; w({str(source / 'transformer')!r}, k[{options.model!r}])"
    )
    steps = {
        "write random weights": [sys.executable, "-c", make],
        "plain copy of the same bytes": ["cp", "-r", source, copy],
        "convert": [*MMDIT, "convert", "--model_path", source / "transformer", "--output_dir", checkpoint],
        "build": [*MMDIT, "build", "--checkpoint_dir", checkpoint, "--output_dir", engine],
    }
    made = dict(zip(steps, (source, copy, checkpoint, engine), strict=True))
    rows = []
    for name, command in steps.items():
        seconds, memory = measured(command)
        rows.append(f"| {name} | {seconds:.1f} | {memory / 2**30:.2f} | {size_of(made[name]) / 1e9:.2f} |")
        print(rows[-1], flush=True)
    shutil.rmtree(copy)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    RESULTS.write_text(
        f"# {options.model} at full size, float16, random weights\n\n"
        f"{os.cpu_count()} cores ({platform.machine()}), no GPU; {installed()}, torch {torch.__version__}; "
        f"{datetime.date.today()}; load average at the end {load}.\n\n"
        "| step | seconds | peak RSS, GiB | written, GB |\n|---|---:|---:|---:|\n" + "\n".join(rows) + "\n\n"
        "The build's peak includes the checkpoint's pages, which are mapped from disk and which the system can drop.\n"
    )


if __name__ == "__main__":
    main()
