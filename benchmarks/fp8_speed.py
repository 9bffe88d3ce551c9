"""One GPU with FP8 tensor cores: ms per step in FP8 and in bfloat16, and each FP8 pass. Not run yet.

    python -m benchmarks.fp8_speed graphs --folder graphs     # needs TensorRT (tensorrt_rtx), but no GPU
    python -m benchmarks.fp8_speed run --folder graphs --output fp8_speed.json     # needs a GPU, but no TensorRT

Random weights, 333 text tokens. Everything that is compared runs alternately in one process; the median of all steps
counts. With `--torchao`, diffusers with torchao's float8 (dynamic, per row), every block compiled, runs beside it.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from mmdit_lib.checkpoint.quantization import NONE, Quantization, quantized_weight
from mmdit_lib.config import Layout, Resolution
from mmdit_lib.engine.cuda_graph import GraphedStep
from mmdit_lib.engine.dry_graph import dry_graph
from mmdit_lib.engine.fp8_passes import FP8_GEMMS, FP8_KERNELS
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.kernel_passes import KERNELS
from mmdit_lib.engine.passes import NUMERICS, SPEED
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.network.layers import ACTIVATION_SCALE, WEIGHT_SCALE
from mmdit_lib.reports.bench import alternately
from mmdit_lib.sd3 import SD3, SD3Config

from . import common
from .common import draw_weights, relative_error
from .single_gpu import MODELS, PROFILE

SCHEMES = {"bf16": NONE, "fp8": Quantization.fp8(SD3)}
STAGES = {
    "emulated": NUMERICS + SPEED + KERNELS,
    "FP8 GEMMs": FP8_GEMMS + NUMERICS + SPEED + KERNELS,
    "and FP8 kernels": FP8_GEMMS + NUMERICS + SPEED + KERNELS + FP8_KERNELS,
}
ACTIVATIONS = 2.0**-5
"""Scale of activations; those of random weights stay near unit size."""


def write_graphs(options: argparse.Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        for kind, scheme in SCHEMES.items():
            graph = dry_graph(MODELS[name], Layout().at(0), PROFILE, "bfloat16", scheme)
            graph.save(options.folder / f"{name}.{kind}.graph.json")


def in_fp8(weights: dict[str, torch.Tensor], model: SD3Config) -> dict[str, torch.Tensor]:
    """The weights as a quantized checkpoint has them."""
    found = dict(weights)
    for module in SCHEMES["fp8"].modules(SD3, model):
        name = f"{module}.weight"
        found[name], scale = quantized_weight(weights[name], name)
        found[f"{module}.{WEIGHT_SCALE}"] = scale.to(found[name].device)
        found[f"{module}.{ACTIVATION_SCALE}"] = torch.full_like(found[f"{module}.{WEIGHT_SCALE}"], ACTIVATIONS)
    return found


@torch.inference_mode()
def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict:
    model = MODELS[name]
    weights = draw_weights(model, device)
    graphs = {kind: Graph.load(options.folder / f"{name}.{kind}.graph.json") for kind in SCHEMES}
    quantized = in_fp8(weights, model)
    inputs = common.inputs_on(device, model, Resolution.read(options.side), options.batch)
    backends = {"ours bf16": PyTorchBackend(graphs["bf16"], weights, device=device)}
    for label, passes in STAGES.items():
        backends[f"ours fp8, {label}"] = PyTorchBackend(graphs["fp8"], quantized, device=device, passes=passes)
    exact = backends["ours bf16"]._run(inputs)
    result: dict = {"model": name, "side": options.side, "batch": options.batch}
    result["difference from bf16"] = {way: relative_error(x._run(inputs), exact) for way, x in backends.items()}
    steps = {way: partial(GraphedStep(backend._run), inputs) for way, backend in backends.items()}
    diffusers = {"diffusers bf16 compiled": common.diffusers_transformer(model, weights)}
    if options.torchao:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        diffusers["diffusers torchao float8 compiled"] = common.diffusers_transformer(model, weights)
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        quantize_(diffusers["diffusers torchao float8 compiled"].transformer_blocks, config)
    for way, reference in diffusers.items():
        common.compile_blocks(reference)
        steps[way] = partial(GraphedStep(lambda given, step=reference: step(**given, return_dict=False)[0]), inputs)
    result["ms"] = {way: round(ms, 2) for way, ms in alternately(steps, device, options.repeats).items()}
    result["kernels"] = {way: common.kernel_times(steps[way]) for way in backends}
    result["GB of weights"] = {
        kind: round(sum(x.nbytes for x in of.values()) / 1e9, 3) for kind, of in (("bf16", weights), ("fp8", quantized))
    }
    return result


def run(options: argparse.Namespace) -> None:
    torch._dynamo.config.recompile_limit = 64  # diffusers' blocks share one function
    found = {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    for name in options.models:
        found["rows"].append(measure(name, options, torch.device("cuda")))
        print(json.dumps(found["rows"][-1], indent=1), flush=True)
        common.save(found, options.output)
        common.free()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("graphs", "run"))
    parser.add_argument("--folder", type=Path, default=Path("graphs"), help="folder of the graph files")
    parser.add_argument("--output", type=Path, default=Path("fp8_speed.json"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["3.5-medium", "3.5-large"])
    parser.add_argument("--side", type=int, default=1024, help="of the image, in pixels")
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--torchao", action="store_true", help="also time diffusers with torchao's float8")
    options = parser.parse_args()
    (write_graphs if options.what == "graphs" else run)(options)


if __name__ == "__main__":
    main()
