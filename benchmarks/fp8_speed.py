"""One GPU with FP8 tensor cores: ms per step in FP8 and in bfloat16, with some FP8 passes and with all.

    python -m benchmarks.fp8_speed graphs --folder graphs     # needs TensorRT (tensorrt_rtx), but no GPU
    python -m benchmarks.fp8_speed run --folder graphs --output fp8_speed.json     # needs a GPU, but no TensorRT
    python -m benchmarks.fp8_speed table --results fp8_speed.json     # as Markdown

Random weights, 333 text tokens. Everything that is compared runs alternately in one process; of ours the mean of an
image's steps counts, of diffusers the median of all steps. With `--torchao`, diffusers with torchao's float8 (dynamic,
per row), every block compiled, runs beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch

from mmdit_lib.checkpoint.quantization import NONE, Quantization, quantized_weight
from mmdit_lib.config import Layout, Resolution
from mmdit_lib.engine.cuda_graph import GraphedStep
from mmdit_lib.engine.dry_graph import dry_graph
from mmdit_lib.engine.fp8_passes import FP8_ATTENTION, FP8_EPILOGUES, FP8_GEMMS, FP8_KERNELS
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.pytorch_backend import GPU_PASSES, PyTorchBackend
from mmdit_lib.network.layers import ACTIVATION_SCALE, WEIGHT_SCALE
from mmdit_lib.reports.bench import Loop, alternately, conditions
from mmdit_lib.reports.parity import relative_error
from mmdit_lib.sd3 import SD3, SD3Config

from . import common
from .common import draw_weights
from .single_gpu import MODELS, PROFILE

SCHEMES = {"bf16": NONE, "fp8": Quantization.fp8(SD3)}
GRAPHS = {"bf16": "bf16", "fp8": "fp8", "fp8_attention": "fp8"}
"""The scheme of each graph; the last has attention in FP8 too."""
STAGES = {
    "FP8 GEMMs": ("fp8", FP8_GEMMS + GPU_PASSES),
    "and FP8 kernels": ("fp8", FP8_GEMMS + GPU_PASSES + FP8_KERNELS),
    "and GELU in the GEMM": ("fp8", FP8_GEMMS + GPU_PASSES + FP8_KERNELS + FP8_EPILOGUES),
    "and FP8 attention": ("fp8_attention", FP8_ATTENTION + FP8_GEMMS + GPU_PASSES + FP8_KERNELS + FP8_EPILOGUES),
}
"""Graph and passes. The last needs FlashAttention-3 (`fa3-fwd`)."""
ACTIVATIONS = 2.0**-5
"""Scale of activations; those of random weights stay near unit size."""


def write_graphs(options: argparse.Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        for kind, scheme in GRAPHS.items():
            profile = PROFILE.model_copy(update={"fp8_attention": kind == "fp8_attention"})
            graph = dry_graph(MODELS[name], Layout().at(0), profile, "bfloat16", SCHEMES[scheme])
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
    graphs = {kind: Graph.load(options.folder / f"{name}.{kind}.graph.json") for kind in GRAPHS}
    quantized = in_fp8(weights, model)
    inputs = common.inputs_on(device, model, Resolution.read(options.side), options.batch)
    ways = {"ours bf16": ("bf16", weights, None)}
    ways |= {f"ours fp8, {label}": (kind, quantized, passes) for label, (kind, passes) in STAGES.items()}

    def backend(way: str) -> PyTorchBackend:
        kind, tensors, passes = ways[way]
        return common.backend_of(graphs[kind], tensors, device, passes=passes)

    result: dict = {"model": name, "side": options.side, "batch": options.batch}
    result["error to float32, 512x512"] = errors(model, weights, {way: partial(backend, way) for way in ways})
    common.free()
    backends = {way: backend(way) for way in ways}
    steps = {way: common.loop(common.with_cuda_graphs(backend), inputs) for way, backend in backends.items()}
    result["GB beyond the weights"] = {
        way: round(common.peak_of_image(common.loop(x, inputs)) / 1e9, 2) for way, x in backends.items()
    }
    for way, reference in references(model, weights, options.torchao).items():
        common.compile_blocks(reference)
        steps[way] = partial(GraphedStep(lambda given, step=reference: step(**given, return_dict=False)[0]), inputs)
    result["ms"] = {way: round(ms, 2) for way, ms in alternately(steps, device, options.repeats).items()}
    result["conditions"] = conditions(device)  # before the profile, during which the GPU is idle
    result["kernels"] = {way: common.kernel_times(steps[way]) for way in backends}
    result["GB of weights"] = {
        kind: round(sum(x.nbytes for x in of.values()) / 1e9, 3) for kind, of in (("bf16", weights), ("fp8", quantized))
    }
    return result


def errors(model: SD3Config, weights: dict[str, torch.Tensor], backends: dict[str, Callable]) -> dict[str, float]:
    """Distance of one step's output from diffusers in float32, of diffusers in bf16 and of each backend."""
    inputs = common.inputs_on(next(iter(weights.values())).device, model, Resolution.read(512))
    found = {}
    for way, open_backend in backends.items():  # one at a time: all of them and float32 do not fit into 80 GB
        found[way] = common.loop(open_backend(), inputs).first()
    reference = common.diffusers_transformer(model, weights)
    found["diffusers bf16"] = reference(**inputs, return_dict=False)[0]
    wide = {name: x.float() for name, x in inputs.items()}
    exact = reference.float()(**wide, return_dict=False)[0]
    return {way: relative_error(x, exact) for way, x in found.items()}


def references(model: SD3Config, weights: dict[str, torch.Tensor], torchao: bool) -> dict[str, torch.nn.Module]:
    found = {"diffusers bf16 compiled": common.diffusers_transformer(model, weights)}
    if torchao:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        # Without its settings for Inductor, which tune for minutes.
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        found["diffusers torchao float8 compiled"] = common.diffusers_transformer(model, weights)
        quantize_(found["diffusers torchao float8 compiled"].transformer_blocks, config)
    return found


def run(options: argparse.Namespace) -> None:
    torch._dynamo.config.recompile_limit = 64  # diffusers' blocks share one function
    found = {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
             "attention": common.attention_kernel(), "conditions": "", "rows": []}  # fmt: skip
    for name in options.models:
        found["rows"].append(measure(name, options, torch.device("cuda")))
        found["conditions"] = found["rows"][-1].pop("conditions")
        print(json.dumps(found["rows"][-1]), flush=True)
        common.save(found, options.output)
        common.free()


def table(found: dict) -> list[str]:
    """One result as Markdown."""
    lines = [
        f"{found['hardware']}, torch {found['torch']}, {found['date']}. Milliseconds per denoising step: random "
        f"weights, {common.TEXT_TOKENS} text tokens, CUDA graphs, run alternately in one process. Ours: means of an "
        f"image's {Loop.steps} steps, median of three images; diffusers': medians of all steps. "
        f"Our attention: {found['attention']}. At the end: {found['conditions']}.",
        "",
        "The commands are at the top of `benchmarks/fp8_speed.py`. Each row in FP8 adds to the one above it: linear "
        "layers as FP8 GEMMs, then kernels for norms and GELU that round their results to FP8 themselves, then GELU "
        "and its rounding in the GEMM before it, then attention in FP8 (`fp8_attention`). torchao's float8 scales "
        'activations dynamically, per row. "rounding to FP8" is separate kernels, which also compute GELU if the GEMM '
        'does not. In the first FP8 row, GELU is a PyTorch kernel, counted as "other". With attention in FP8, "heads" '
        "also rounds queries, keys and values, and computes the mean of the values.",
    ]
    for row in found["rows"]:
        base = row["ms"]["diffusers bf16 compiled"]
        lines += ["", f"## SD{row['model']}, {row['side']}x{row['side']}, batch {row['batch']}", ""]
        head = ["", "ms", "diffusers bf16 compiled / this", "error to float32, 512x512", "peak GB beyond the weights"]
        cells = []
        for way, ms in row["ms"].items():
            error, held = (row[key].get(way) for key in ("error to float32, 512x512", "GB beyond the weights"))
            optional = [f"{error:.4f}" if error else "", f"{held:.2f}" if held else ""]
            cells.append([way, f"{ms:.1f}", f"{base / ms:.2f}x", *optional])
        lines += common.markdown(head, cells)
        stored = row["GB of weights"]
        lines += ["", f"diffusers in bf16: error {row['error to float32, 512x512']['diffusers bf16']:.4f}. Weights: "
                  f"{stored['bf16']} GB in bf16, {stored['fp8']} GB in FP8.", ""]  # fmt: skip
        lines += common.kinds_table("ms of our kernels, by kind", row["kernels"])
    return lines


def main() -> None:
    parser = common.parser(__doc__, MODELS, ["3.5-medium", "3.5-large"], "fp8_speed.json", 10)
    parser.add_argument("--side", type=int, default=1024, help="of the image, in pixels")
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--torchao", action="store_true", help="also time diffusers with torchao's float8")
    common.main(parser.parse_args(), write_graphs, run, "FP8 on one GPU", table)


if __name__ == "__main__":
    main()
