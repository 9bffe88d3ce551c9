"""Layer parity in float32 at full size, on a GPU: the published architectures with random weights.

    python -m benchmarks.layer_parity graphs --folder graphs      # needs TensorRT (tensorrt_rtx), but no GPU
    python -m benchmarks.layer_parity run --folder graphs --output layer_parity.json     # needs a GPU, but no TensorRT
    python -m benchmarks.layer_parity table --results layer_parity.json     # as Markdown

As `mmdit parity` does, it compares each value of our network with that of diffusers, and the output of the network as
it runs on a GPU. Both sides' weights and values stay in GPU memory: at 1024x1024, SD3.5-large needs an H200.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

import torch

from mmdit_lib import MMDiTRunner
from mmdit_lib.config import BuildConfig, Layout, PlanOptions, Resolution
from mmdit_lib.engine.folder import EngineFolder
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.reports.bench import conditions
from mmdit_lib.reports.parity import all_ok, compare, verdict
from mmdit_lib.sd3 import KNOWN_MODELS, SD3

from . import common

MODELS = {name: KNOWN_MODELS[f"stable-diffusion-{name}"] for name in ("3-medium", "3.5-medium", "3.5-large")}
PROFILE = BuildConfig.one_size(Resolution.read(1024), common.BATCH, common.TEXT_TOKENS)


def file_of(root: Path, model: str) -> Path:
    return root / f"{model}.float32.graph.json"


def write_graphs(options: Namespace) -> None:
    for model in options.models:
        common.write_graph(
            file_of(options.folder, model), MODELS[model], Layout().at(0), PROFILE.opt_resolution, "float32"
        )


def folder_of(model: str) -> EngineFolder:
    """What `build` would write, without files."""
    return EngineFolder(
        path=Path(model), architecture=SD3, model=MODELS[model], dtype="float32", layout=Layout(), build_config=PROFILE,
        builder="tensorrt", tensorrt=None, plan_options=PlanOptions(), files={}, checkpoint=None, config={},
    )  # fmt: skip


def measure(model: str, root: Path, device: torch.device) -> dict:
    torch.cuda.reset_peak_memory_stats(device)
    weights, folder = common.draw_weights(MODELS[model], device, torch.float32), folder_of(model)
    backend = common.backend_of(Graph.load(file_of(root, model)), weights, device)
    runner = MMDiTRunner(folder, backend, "it needs no TensorRT")
    found = compare(common.diffusers_transformer(MODELS[model], weights), runner, sample_inputs(folder))
    output = found[found.module == SD3.output.name].relative_error.item()
    peak = round(torch.cuda.max_memory_allocated(device) / 1e9, 1)
    return {"model": model, "ok": all_ok(found), "verdict": verdict(found), "output": output, "peak_gb": peak}


def run(options: Namespace) -> None:
    device = torch.device("cuda")
    result = {"conditions": conditions(device), "date": time.strftime("%Y-%m-%d"), "rows": []}
    for model in options.models:
        result["rows"].append(measure(model, options.folder, device))
        print(result["rows"][-1], flush=True)
        common.save(result, options.output)
        common.free()
    if wrong := [row["model"] for row in result["rows"] if not row["ok"]]:
        raise SystemExit(f"not in agreement with diffusers: {', '.join(wrong)}")


def table(result: dict) -> list[str]:
    """The result as Markdown."""
    rows = [
        [f"SD{row['model']}", row["verdict"], f"{row['output']:.1e}", f"{row['peak_gb']:.1f}"] for row in result["rows"]
    ]
    return [
        f"{result['conditions']}; {result['date']}. {PROFILE.opt_resolution}, {common.BATCH} rows, "
        f"{common.TEXT_TOKENS} text tokens, float32 without TF32, random weights.",
        "",
        *common.markdown(["", "verdict", "error of the output", "peak GB"], rows, left=(0, 1)),
        "",
    ]


def main() -> None:
    parser = common.parser(__doc__, MODELS, list(MODELS), "layer_parity.json")
    common.main(parser.parse_args(), write_graphs, run, "Layer parity at full size", table)


if __name__ == "__main__":
    main()
