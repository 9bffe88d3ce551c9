"""The CPU's time for the views of one step's modulations, as slices and after the pass `unbind`.

    python -m benchmarks.views     # needs TensorRT (tensorrt_rtx), but no GPU

Without a CUDA graph, a step of a small image waits for the CPU: views compute nothing but still take CPU time.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from torch import fx

from mmdit_lib.config import Layout
from mmdit_lib.engine.dry_graph import dry_graph
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.kernel_passes import unbind
from mmdit_lib.engine.lowering import operator_of
from mmdit_lib.engine.passes import Pass, apply
from mmdit_lib.engine.pytorch_backend import GPU_PASSES

from .common import markdown
from .single_gpu import MODELS, PROFILE

VIEWS = ("SLICE", "SHUFFLE", "UNBIND", "ITEM")
WITHOUT = tuple(one for one in GPU_PASSES if one is not unbind)


def views_of_modulations(graph: Graph, passes: tuple[Pass, ...]) -> tuple[fx.GraphModule, torch.Tensor]:
    """The views alone, as a module, and the tensor that they are views of."""
    layers = apply(graph, passes)
    merged = max((x for x in layers if x.type == "LINEAR" and len(x.output.shape) == 2), key=lambda x: x.output.shape)
    target = fx.Graph()
    values = {None: None, merged.output.name: target.placeholder("modulations")}
    for layer in layers:
        if layer.type in VIEWS and layer.inputs[0] in values:
            inputs = tuple(values[name] for name in layer.inputs)
            values[layer.output.name] = target.call_function(operator_of(layer), inputs, layer.attributes)
    target.output(tuple(values.values())[2:])
    return fx.GraphModule(torch.nn.Module(), target), torch.zeros(2, merged.output.shape[-1], dtype=torch.bfloat16)


@torch.inference_mode()
def median_ms(module: fx.GraphModule, x: torch.Tensor, repeats: int = 300) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        module(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    rows = []
    for name in parser.parse_args().models:
        graph, row = dry_graph(MODELS[name], Layout().at(0), PROFILE, "bfloat16"), [f"SD{name}"]
        for passes in (WITHOUT, GPU_PASSES):
            module, x = views_of_modulations(graph, passes)
            calls = sum(node.op == "call_function" for node in module.graph.nodes)
            row += [str(calls), f"{median_ms(module, x):.2f}"]
        rows.append(row)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {time.strftime('%Y-%m-%d')}\n")
    print("\n".join(markdown(["", "slices and views", "ms", "unbound", "ms"], rows)))


if __name__ == "__main__":
    main()
