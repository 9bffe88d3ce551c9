"""What the tiny model draws through diffusers and through our engines, judged from pixels.

    python benchmarks/tiny_scores.py --runs diffusers-float32 engine-float32 engine-bfloat16

Writes one line per run into `benchmarks/results/tiny_scores.jsonl`, and the table beside it. Engines run with the
`pytorch` backend, so their graph files suffice: with `--work DIR` they are kept, and `--build_only` on a machine with
TensorRT makes the folder that a GPU machine without it can use.
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

BATCH = 8  # pictures at once; guidance makes two rows of each
NAMES = ("colour", "shape", "position", "size", "background", "count")


def engine_folder(dtype: str, work: Path) -> Path:
    """The tiny model's engine folder of this dtype in `work`, made if it is not there."""
    checkpoint, engine = work / f"checkpoint-{dtype}", work / f"engine-{dtype}"
    if not checkpoint.exists():
        convert(str(model_path()), str(checkpoint), dtype=dtype)
    if not engine.exists():
        build(str(checkpoint), str(engine), max_batch_size=2 * BATCH, plan=False)
    return engine


def pipeline(run: str, work: Path, device: str):
    """'engine-bfloat16' has an engine of that dtype in the tiny pipeline, 'diffusers-...' diffusers' transformer."""
    kind, dtype = run.split("-")
    if kind == "diffusers":
        return StableDiffusion3Pipeline.from_pretrained(model_path(), **dtype_option(getattr(torch, dtype))).to(device)
    # Text encoders and VAE stay in float32, so that the engine alone makes the difference.
    options = {"backend": "pytorch"}
    return load_pipeline(
        model_path(), engine_folder(dtype, work), device=device, dtype=torch.float32, runner_options=options
    )


def table(rows: list[dict]) -> str:
    head = f"| run | device | {' | '.join(NAMES)} |\n|---|---|{'---:|' * len(NAMES)}\n"
    lines = (f"| {r['run']} | {r['device']} | {' | '.join(f'{r[name]:.1%}' for name in NAMES)} |" for r in rows)
    about = rows[0]
    conditions = (
        f"{about['prompts']} held-out prompts ({about['objects']} objects), {about['steps']} steps, guidance "
        f"{about['guidance']}, 128x128, {77 + about['max_sequence_length']} text tokens; "
        f"torch {' and '.join(sorted({r['torch'] for r in rows}))}."
    )
    return f"# The tiny model through our engines\n\n{conditions}\n\n{head}" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["diffusers-float32", "engine-float32", "engine-bfloat16"])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--max_sequence_length", type=int, default=77)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, help="where engine folders are kept; a temporary folder if not given")
    parser.add_argument("--build_only", action="store_true", help="make the engine folders in --work and stop")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "tiny_scores.jsonl")
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
    options.results.with_suffix(".md").write_text(table(rows))


def measure(run: str, work: Path, options: argparse.Namespace) -> None:
    """Score one run and add its line to the results."""
    call = {"steps": 28, "guidance": 4.0, "max_sequence_length": options.max_sequence_length}
    scores = evaluate(pipeline(run, work, options.device), heldout_prompts(options.prompts), batch=BATCH, **call)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu ({platform.machine()})"
    row = {"run": run, **asdict(scores), **call, "device": where, "torch": torch.__version__}
    with open(options.results, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(run, scores, flush=True)


if __name__ == "__main__":
    main()
