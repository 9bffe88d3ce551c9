"""Seconds from the start of a process to each image, compared with diffusers, eager and compiled.

    python -m benchmarks.start_up run --model_path tiny --engine_dir engine_outputs --output start_up.json
    python -m benchmarks.start_up table --results start_up.json

`run` needs a GPU. It starts a new process with empty compile caches for each way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START = time.time()
PROMPT = "a large yellow star on a purple background"
WAYS = {
    "diffusers": None,
    "diffusers, compiled": None,
    "ours": dict(),
    "ours, CUDA graph": dict(cuda_graph=True),
}
STAGES = ("opened", "1st image", "2nd image", "other size", "other size again", "no guidance", "no guidance again")


def paint(way: str, model_path: str, engine_dir: str, steps: int, output: Path) -> dict[str, float]:
    """Runs in its own process: seconds since it started, after each stage."""
    import torch

    from mmdit_lib import EngineFolder

    folder = EngineFolder.open(engine_dir)
    profile = folder.build_config
    marks = {}
    pipe = load(way, model_path, engine_dir)
    marks["opened"] = time.time() - START
    sizes = [profile.opt_resolution] * 2 + [profile.min_resolution] * 2 + [profile.opt_resolution] * 2
    for stage, size, guidance in zip(STAGES[1:], sizes, (4.0, 4.0, 4.0, 4.0, 1.0, 1.0), strict=True):
        image = pipe(
            PROMPT, height=size.height, width=size.width, num_inference_steps=steps, guidance_scale=guidance,
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
        image.save(output)
        marks[stage] = time.time() - START
    return marks


def load(way: str, model_path: str, engine_dir: str):
    import torch

    from mmdit_lib import load_pipeline
    from mmdit_lib.checkpoint.hub import resolve_model

    if WAYS[way] is not None:
        return load_pipeline(model_path, engine_dir, runner_options=WAYS[way])
    from diffusers import StableDiffusion3Pipeline

    from mmdit_lib import EngineFolder
    from mmdit_lib.config import TORCH_DTYPES, dtype_option

    dtype = TORCH_DTYPES[EngineFolder.open(engine_dir).dtype]
    pipe = StableDiffusion3Pipeline.from_pretrained(resolve_model(model_path), **dtype_option(dtype)).to("cuda")
    if way.endswith("compiled"):
        torch._dynamo.config.recompile_limit = 64  # its blocks share one function
        for block in pipe.transformer.transformer_blocks:
            block.compile(fullgraph=True)
    return pipe


def run(model_path: str, engine_dir: str, steps: int, output: Path) -> None:
    import diffusers
    import torch

    found = {
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(model_path).name,
        "steps": steps,
        "ways": {},
    }
    for way in WAYS:
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
            arguments = ["--way", way, "--model_path", model_path, "--engine_dir", engine_dir, "--steps", str(steps)]
            command = [sys.executable, "-m", "benchmarks.start_up", "paint", *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            found["ways"][way] = {"fault": done.stderr[-2000:]}
        else:
            found["ways"][way] = json.loads(done.stdout.splitlines()[-1])
        print(way, found["ways"][way], flush=True)
        output.write_text(json.dumps(found, indent=1) + "\n")


def table(paths: list[Path]) -> str:
    """The results as Markdown."""
    lines = ["# From the start of a process to the first image", ""]
    for path in paths:
        found = json.loads(path.read_text())
        lines += [
            f"{found['model']}: {found['hardware']}, torch {found['torch']}, diffusers {found['diffusers']}, "
            f"{found['date']}; {found['steps']} steps. Seconds per stage. Every row is a "
            "new process with empty compile caches. The commands are at the top of `benchmarks/start_up.py`.",
            "",
            "| | process start to pipeline loaded | " + " | ".join(STAGES[1:]) + " |",
            "|---" + "|---:" * len(STAGES) + "|",
        ]
        for way, marks in found["ways"].items():
            times = [marks[stage] for stage in STAGES] if "fault" not in marks else []
            spent = [f"{b - a:.1f}" for a, b in zip([0.0, *times], times, strict=False)]
            lines.append(f"| {way} | " + " | ".join(spent or ["-"] * len(STAGES)) + " |")
        lines += ["", *found.get("notes", [])]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "paint", "table"))
    parser.add_argument("--model_path", default="tiny")
    parser.add_argument("--engine_dir", default="engine_outputs")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--output", type=Path, default=Path("start_up.json"))
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--results", type=Path, nargs="+", default=[Path("start_up.json")])
    options = parser.parse_args()
    if options.what == "run":
        run(options.model_path, options.engine_dir, options.steps, options.output)
    elif options.what == "paint":
        with tempfile.TemporaryDirectory() as folder:
            image = Path(folder, "image.png")
            print(json.dumps(paint(options.way, options.model_path, options.engine_dir, options.steps, image)))
    else:
        print(table(options.results))


if __name__ == "__main__":
    main()
