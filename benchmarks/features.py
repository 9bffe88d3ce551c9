"""What optional inputs cost: milliseconds per step of SD3.5-medium with and without them. Random weights, one GPU.

    python -m benchmarks.features graphs --folder graphs      # needs TensorRT (tensorrt_rtx), but no GPU
    python -m benchmarks.features run --folder graphs --output features.json     # needs a GPU, but no TensorRT
    python -m benchmarks.features table --results features.json     # as Markdown

All builds run alternately, as CUDA graphs: one step with guidance (two rows), and one with a single row, like the extra
call of skip-layer guidance. Without the Triton kernels, as on a CPU, the costs differ.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from mmdit_lib.config import BuildConfig, Layout, Resolution, Sizes
from mmdit_lib.engine.cuda_graph import GraphedStep
from mmdit_lib.engine.dry_graph import dry_graph
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.inputs import draw_inputs
from mmdit_lib.engine.precision import without_tf32
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.bench import alternately, conditions
from mmdit_lib.sd3 import KNOWN_MODELS, SD3
from mmdit_lib.sd3.inputs import KEPT_LAYERS

from . import common

MODELS = {"medium": KNOWN_MODELS["stable-diffusion-3.5-medium"]}
PROFILE = BuildConfig.one_size(Resolution.read(1024), common.BATCH, common.TEXT_TOKENS)
BUILDS = {
    "plain": {},
    "skip layers": dict(skip_layers=True),
    "12 residuals": dict(controlnet_residuals=12),
    "skip layers, 12 residuals": dict(skip_layers=True, controlnet_residuals=12),
}
SKIPPED = (7, 8, 9)


def build_of(name: str) -> BuildConfig:
    return PROFILE.model_copy(update=BUILDS[name])


def file_of(root: Path, model: str, name: str) -> Path:
    return root / f"{model}_{name}.graph.json".replace(" ", "_").replace(",", "")


def write_graphs(options: Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        for name in BUILDS:
            graph = dry_graph(MODELS[model], Layout().at(0), build_of(name), "bfloat16")
            graph.save(file_of(options.folder, model, name))


def measure(model: str, batch: int, root: Path, weights: dict, device: torch.device, repeats: int) -> list[dict]:
    sizes = Sizes(batch, 1024, 1024, common.TEXT_TOKENS)
    steps = {}
    for name in BUILDS:
        given = draw_inputs(SD3, MODELS[model], sizes, "bfloat16", seed=1, build=build_of(name))
        if KEPT_LAYERS.name in given:
            given[KEPT_LAYERS.name][list(SKIPPED)] = False
        given = {key: value.to(device) for key, value in given.items()}
        backend = PyTorchBackend(Graph.load(file_of(root, model, name)), weights, device=device)
        steps[name] = partial(torch.inference_mode()(GraphedStep(backend._run)), given)
    found = alternately(steps, device, repeats)
    return [{"model": model, "batch": batch, "build": name, "ms": round(found[name], 2)} for name in BUILDS]


def run(options: Namespace) -> None:
    device, rows = torch.device("cuda"), []
    for model in options.models:
        weights = common.draw_weights(MODELS[model], device)
        for batch in (2, 1):
            with without_tf32():
                rows += measure(model, batch, options.folder, weights, device, options.repeats)
            common.free()
            common.save({"conditions": conditions(device), "repeats": options.repeats, "rows": rows}, options.output)
    print(*rows, sep="\n")


def table(result: dict) -> list[str]:
    """The result as Markdown."""
    rows = result["rows"]
    plain = {(row["model"], row["batch"]): row["ms"] for row in rows if row["build"] == "plain"}
    lines = [
        f"{result['conditions']}. 1024x1024, {common.TEXT_TOKENS} text tokens, bf16, random weights, CUDA graph; "
        f"median of three alternating rounds of {result['repeats']} steps. Blocks {SKIPPED} are skipped; the residuals "
        "are random.",
        "",
        "| model | rows | built with | ms per step | over plain |",
        "|---|---:|---|---:|---:|",
    ]
    for row in rows:
        more = row["ms"] - plain[row["model"], row["batch"]]
        cells = [row["build"], f"{row['ms']:.2f}", f"{more:+.2f}"]
        lines.append(f"| SD3.5-{row['model']} | {row['batch']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = common.parser(__doc__, MODELS, ["medium"], "features.json", repeats=20)
    common.main(parser.parse_args(), write_graphs, run, "Optional inputs", table)


if __name__ == "__main__":
    main()
