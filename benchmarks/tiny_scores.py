"""What the tiny model draws through diffusers and through our engines, judged from pixels.

    python benchmarks/tiny_scores.py --runs diffusers-float32 engine-float32 engine-bfloat16

Writes one line per run into `benchmarks/results/tiny_scores.jsonl`, and the table beside it.
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

from mmdit_lib import build, convert, load_pipeline
from mmdit_lib.pipeline import dtype_option
from mmdit_lib.tiny import evaluate, heldout_prompts, model_path

RESULTS = Path(__file__).parent / "results" / "tiny_scores.jsonl"
NAMES = ("colour", "shape", "position", "size", "background", "count")


def pipeline(run: str, work: Path):
    """'engine-bfloat16' has an engine of that dtype in the tiny pipeline, 'diffusers-...' diffusers' transformer."""
    kind, dtype = run.split("-")
    if kind == "diffusers":
        return StableDiffusion3Pipeline.from_pretrained(model_path(), **dtype_option(getattr(torch, dtype)))
    checkpoint = convert(str(model_path()), str(work / "checkpoint"), dtype=dtype)
    engine = build(str(checkpoint), str(work / "engine"), max_batch_size=16)
    # Text encoders and VAE stay in float32, so that the engine alone makes the difference.
    return load_pipeline(model_path(), engine, dtype=torch.float32)


def table(rows: list[dict]) -> str:
    head = f"| run | {' | '.join(NAMES)} |\n|---|{'---:|' * len(NAMES)}\n"
    lines = (f"| {r['run']} | {' | '.join(f'{r[name]:.1%}' for name in NAMES)} |" for r in rows)
    about = rows[0]
    conditions = (
        f"{about['prompts']} held-out prompts ({about['objects']} objects), {about['steps']} steps, guidance "
        f"{about['guidance']}, 128x128, {77 + about['max_sequence_length']} text tokens; {about['device']}, "
        f"torch {about['torch']}."
    )
    return f"# The tiny model through our engines\n\n{conditions}\n\n{head}" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["diffusers-float32", "engine-float32", "engine-bfloat16"])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--max_sequence_length", type=int, default=77)
    options = parser.parse_args()
    call = {"steps": 28, "guidance": 4.0, "max_sequence_length": options.max_sequence_length}
    for run in options.runs:
        with tempfile.TemporaryDirectory() as work:
            pipe = pipeline(run, Path(work))
            scores = evaluate(pipe, heldout_prompts(options.prompts), **call)
        where = f"cpu ({platform.machine()})" if pipe.device.type == "cpu" else torch.cuda.get_device_name()
        row = {"run": run, **asdict(scores), **call, "device": where, "torch": torch.__version__}
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(run, scores)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    RESULTS.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
