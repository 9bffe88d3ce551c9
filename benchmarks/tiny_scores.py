"""Prompt-following scores of the tiny model with diffusers' transformer and with engines, measured from pixels.

From the repository root:

    python -m benchmarks.tiny_scores --runs diffusers-float32 engine-float32 engine-bfloat16

Appends one line per run to `benchmarks/results/tiny_scores.jsonl` and rewrites the tables next to it. Engines run on
the `pytorch` backend, which needs only their graph files. `--work DIR` keeps the engine folders; with `--build_only`, a
machine with TensorRT builds them for a GPU machine without it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from mmdit_lib import build, convert, load_pipeline, tiny
from training import evaluation
from training.captions import heldout_prompts

from .common import markdown

RESULTS = Path(__file__).parent / "results" / "tiny_scores.jsonl"
BATCH = 8  # images; guidance doubles the batch of the transformer
TITLE = "# Scores of the tiny model with engines"
REPRODUCE = "Reproduce with `python -m benchmarks.tiny_scores` in the repository's root."


def engine_folder(dtype: str, work: Path) -> Path:
    """The tiny model's engine folder of this dtype in `work`, built if it does not exist."""
    checkpoint, engine = work / f"checkpoint-{dtype}", work / f"engine-{dtype}"
    if not checkpoint.exists():
        convert(str(tiny.model_path()), str(checkpoint), dtype=dtype)
    if not engine.exists():
        build(str(checkpoint), str(engine), max_batch_size=2 * BATCH, plan=False)
    return engine


def pipeline(run: str, work: Path, device: str) -> StableDiffusion3Pipeline:
    """The tiny pipeline for a run: "engine-bfloat16" uses an engine of that dtype, "diffusers-..." uses none."""
    kind, dtype = run.split("-")
    if kind == "diffusers":
        return evaluation.Pipeline(None, dtype, device).load()
    # Text encoders and VAE stay in float32, so that runs differ only in the engine.
    options = {"backend": "pytorch"}
    return load_pipeline(
        tiny.model_path(), engine_folder(dtype, work), device=device, dtype=torch.float32, runner_options=options
    )


def report(rows: list[dict]) -> str:
    """All runs as Markdown: one table for each set of conditions."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(conditions(row), []).append(row)
    return "\n\n".join([TITLE, REPRODUCE, *(f"{about}\n\n{table(same)}" for about, same in groups.items())]) + "\n"


def conditions(row: dict) -> str:
    """How a run was scored, in one line; only scores under equal conditions are comparable."""
    return (
        f"{row['prompts']} held-out prompts ({row['objects']} objects), {row['steps']} steps, guidance "
        f"{row['guidance']}, 128x128, {77 + row['max_sequence_length']} text tokens; torch {row['torch']}."
    )


def table(rows: list[dict]) -> str:
    scores = ([f"{row[name]:.1%}" for name in evaluation.ASPECTS] for row in rows)
    lines = [[row["run"], row["device"], *of_run] for row, of_run in zip(rows, scores, strict=True)]
    return "\n".join(markdown(["run", "device", *evaluation.ASPECTS], lines, left=(0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["diffusers-float32", "engine-float32", "engine-bfloat16"])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--max_sequence_length", type=int, default=77)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="folder to keep the engines in; by default a temporary one")
    parser.add_argument("--build_only", action="store_true", help="build the engine folders in --work and stop")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if options.build_only:
            for run in options.runs:
                engine_folder(run.split("-")[1], work)
            return
        for run in options.runs:
            measure(run, work, options)
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    options.results.with_suffix(".md").write_text(report(rows))


def measure(run: str, work: Path, options: argparse.Namespace) -> None:
    """Score one run and append its line to the results."""
    call = {"steps": 28, "guidance": 4.0, "max_sequence_length": options.max_sequence_length}
    scores = evaluation.evaluate(
        pipeline(run, work, options.device), heldout_prompts(options.prompts), batch=BATCH, **call
    )
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu ({platform.machine()})"
    row = {"run": run, **asdict(scores), **call, "device": name, "torch": torch.__version__}
    with open(options.results, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(run, scores, flush=True)


if __name__ == "__main__":
    main()
