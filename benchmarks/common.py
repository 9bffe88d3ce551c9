"""Shared by the GPU benchmarks: full-size models with random weights, and the command line."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch

from mmdit_lib.checkpoint.quantization import NONE, Quantization
from mmdit_lib.checkpoint.random_weights import draw_weight
from mmdit_lib.config import BuildConfig, RankMapping, Resolution, Sizes
from mmdit_lib.engine import attention
from mmdit_lib.engine.ahead import Ahead, Call
from mmdit_lib.engine.attention import has_flash_attention_3
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.inputs import draw_inputs
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.files import complete_file
from mmdit_lib.reports.bench import Loop, peak_bytes, steps_in
from mmdit_lib.sd3 import SD3, SD3Config

BATCH, TEXT_TOKENS = 2, 333
KINDS = {
    "attention": ("sdpa", "flash", "fmha"), "GEMM": ("nvjet", "gemm", "cutlass"), "norm, modulation, gate": ("_row",),
    "heads": ("_heads", "_column_sums"), "rounding to FP8": ("_quantize",), "collectives": ("nccl", "_barrier", "symm"),
}  # fmt: skip
"""Parts of the names of CUDA kernels, by kind."""


def write_graph(
    path: Path,
    model: SD3Config,
    mapping: RankMapping,
    resolution: Resolution,
    dtype: str,
    scheme: Quantization = NONE,
    **options,
) -> None:
    """Write one rank's graph file. Needs TensorRT, but no GPU."""
    from mmdit_lib.engine.dry_graph import dry_graph

    path.parent.mkdir(parents=True, exist_ok=True)
    dry_graph(model, mapping, BuildConfig.one_size(resolution, BATCH, TEXT_TOKENS, **options), dtype, scheme).save(path)


def draw_weights(
    model: SD3Config, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Random weights, the same on all GPUs of the same type."""
    generator = torch.Generator(device).manual_seed(0)
    return {name: draw_weight(name, shape, generator, dtype, device) for name, shape in SD3.parameters(model).items()}


def inputs_on(
    device: torch.device, model: SD3Config, resolution: Resolution, batch: int = BATCH
) -> dict[str, torch.Tensor]:
    """Random inputs at the first timestep of a `Loop`."""
    sizes = Sizes(batch, resolution.height, resolution.width, TEXT_TOKENS)
    inputs = {name: x.to(device) for name, x in draw_inputs(SD3, model, sizes, "bfloat16", seed=1).items()}
    return inputs | {"timestep": torch.full_like(inputs["timestep"], 1000.0)}


def backend_of(graph: Graph, weights: Mapping[str, torch.Tensor], device: torch.device, **options) -> PyTorchBackend:
    """As a runner opens it on a GPU."""
    return PyTorchBackend(graph, weights, device=device, conditioning=SD3.conditioning, **options)


def with_cuda_graphs(backend: PyTorchBackend) -> PyTorchBackend:
    """The same backend, sharing its weights, with every step replayed as a CUDA graph."""
    made = copy(backend)
    made._step, made._later_step = (backend._graphed(module) for module in (backend._module, backend._rest))
    made._ahead = Ahead(backend._ahead.compute, *SD3.conditioning)
    return made


def loop(backend: PyTorchBackend, inputs: Mapping[str, torch.Tensor]) -> Loop:
    """The steps of an image."""
    return Loop(backend, inputs, SD3.conditioning[0])


def peak_of_image(steps: Loop) -> int:
    """Peak GPU memory of an image's steps beyond the weights, with what is computed ahead of them."""
    steps.backend._ahead.forget()
    return peak_bytes(steps, steps.timesteps.device)


def diffusers_transformer(model: SD3Config, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """diffusers' transformer with these weights; no copies."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        reference = SD3Transformer2DModel(**model.to_diffusers()).eval()
    state = {SD3.keys.to_diffusers(name): weight for name, weight in weights.items()}
    reference.load_state_dict(state, strict=False, assign=True)
    return reference


def attention_kernel() -> str:
    """The attention kernel that our steps use on this machine."""
    return f"fa3-fwd {version('fa3-fwd')}" if has_flash_attention_3(torch.device("cuda")) else "PyTorch's"


def pytorch_attention():
    """A context in which our attention is PyTorch's, even if FlashAttention-3 is installed."""
    return patch.object(attention, "has_flash_attention_3", lambda device: False)


def comparing_steps():
    """A context in which no step is recognized by its tensors, so each waits for the GPU to tell which one it is."""
    return patch.object(Call, "precedes", lambda *arguments: False)


def compile_blocks(reference: torch.nn.Module) -> None:
    for block in reference.transformer_blocks:
        block.compile(fullgraph=True)


def kernel_times(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a step's CUDA kernels on this GPU, by kind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    spent: Counter = Counter()
    for event in profile.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "other")
        spent[kind] += event.device_time_total / 1000 / steps_in(step)
    return {kind: round(ms, 2) for kind, ms in spent.items() if ms}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def conditions(resolution: Resolution) -> dict[str, str]:
    """What every result records."""
    sizes = f"{resolution}, batch {BATCH}, {TEXT_TOKENS} text tokens, bf16, random weights"
    return {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "conditions": sizes}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """The lines of a table; columns but those in `left` are aligned to the right."""
    line = "|" + "|".join("---" if i in left else "---:" for i in range(len(head))) + "|"
    cells = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return [cells[0], line, *cells[1:]]


def kinds_table(title: str, times: Mapping[str, Mapping[str, float]], total: bool = False) -> list[str]:
    """The lines of a table of `kernel_times`, by label; with `total`, also their sum."""
    kinds = [kind for kind in [*KINDS, "other"] if any(kind in spent for spent in times.values())]
    rows = [
        [label, *(f"{spent.get(kind, 0):.2f}" for kind in kinds), *([f"{sum(spent.values()):.2f}"] if total else [])]
        for label, spent in times.items()
    ]
    return markdown([title, *kinds, *(["sum"] if total else [])], rows)


def save(result: dict, path: Path) -> None:
    """Replace the file atomically: earlier rows survive if this process is killed."""
    with complete_file(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")


def parser(
    about: str, models: Iterable[str], chosen: list[str], results: str, repeats: int | None = None
) -> argparse.ArgumentParser:
    """The options that the GPU benchmarks have in common."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=("graphs", "run", "table"))
    made.add_argument("--folder", type=Path, default=Path("graphs"), help="folder of the graph files")
    made.add_argument("--output", type=Path, default=Path(results))
    made.add_argument("--results", type=Path, nargs="+", default=[Path(results)])
    made.add_argument("--models", nargs="+", choices=models, default=chosen)
    if repeats is not None:
        made.add_argument("--repeats", type=int, default=repeats)
    return made


def main(
    options: argparse.Namespace, graphs: Callable, run: Callable, title: str, table: Callable[[dict], list[str]]
) -> None:
    """Run the chosen command; `table` returns the Markdown lines of one result."""
    if options.what == "table":
        found = (json.loads(path.read_text()) for path in options.results)
        print("\n".join([f"# {title}", "", *(line for result in found for line in table(result))]))
    else:
        (graphs if options.what == "graphs" else run)(options)
