"""One GPU: ms per step and peak memory, compared with diffusers, and the graph passes one by one. Random weights.

    python -m benchmarks.single_gpu graphs --folder graphs     # needs TensorRT (tensorrt_rtx), but no GPU
    python -m benchmarks.single_gpu run --folder graphs --output single_gpu.json     # needs a GPU, but no TensorRT
    python -m benchmarks.single_gpu table --results single_gpu.json     # as Markdown

Everything that is compared runs alternately in one process, three rounds: of ours the mean of an
image's steps counts, of diffusers the median of all steps.
"""

from __future__ import annotations

import gc
import json
import time
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from mmdit_lib.config import BuildConfig, Layout, Resolution
from mmdit_lib.engine.attention import has_flash_attention_3
from mmdit_lib.engine.cuda_graph import GraphedStep
from mmdit_lib.engine.dry_graph import dry_graph
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.kernel_passes import KERNELS, SUMS
from mmdit_lib.engine.passes import NUMERICS, SPEED
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.bench import Loop, alternately, conditions, peak_bytes
from mmdit_lib.reports.parity import relative_error
from mmdit_lib.sd3 import KNOWN_MODELS

from . import common
from .common import TEXT_TOKENS, draw_weights

MODELS = {name.removeprefix("stable-diffusion-"): config for name, config in KNOWN_MODELS.items()}
PROFILE = BuildConfig(
    max_batch_size=8, min_resolution=Resolution.read(512), opt_resolution=Resolution.read(1024),
    max_resolution=Resolution.read(1024), min_text_tokens=TEXT_TOKENS, max_text_tokens=TEXT_TOKENS,
)  # fmt: skip
CASES = ("1024:2", "512:2", "512:8", "1024:8")
"""Side of the image in pixels, and rows."""
WAYS = ("diffusers", "diffusers compiled", "diffusers compiled + CUDA graph", "ours", "ours + CUDA graph")
PREDICTED = {
    "linear_gelu": "the GELU kernels: 1.6 ms",
    "rms_norm": "eight kernels become one: about 3 ms",
    "modulate": "two kernels become one: about 2 ms",
    "gated_sum": "two kernels become one: about 2 ms",
    "shared_silu": "nothing by itself; needed by the next pass",
    "merged_linears": "Q, K and V in one GEMM, all modulations in one: 1 ms",
    "hoisted": "nothing; keeps blocks equal for `torch.compile`",
    "norm_modulate": "norm and modulation read and write their tensors once: 2 ms",
    "gated_norm": "the sum is not read again: 0.5 ms",
    "qkv_attention": "no transposes and no concatenation, so 9 to 12 fewer copies of 27 MB per block: 7 ms",
    "projected_attention": "values are not copied: 54 MB in each of 24 blocks, 0.4 ms",
    "unbind": "views of the modulations: 1.2 ms of the CPU's time, nothing with a CUDA graph",
    "two_gates": "one sum less to write and to read in 13 blocks: 0.2 ms",
    "computed ahead": "the modulations' weights, 1.5 GB, are read once for 8 steps instead of in each: 0.4 ms",
    "steps recognized": "no step waits for the GPU to tell which one it is: 0.3 ms",
    "FlashAttention-3": "517 instead of 415 TFLOP/s for one attention alone: 4 ms",
}
"""What each pass should gain for SD3.5-medium, from the bytes that it saves at 3 TB/s."""
POWER = """
Under load the GPU is at its power limit, so its clock falls: a kernel that saves time makes the others slower. The times by kind of kernel are means over an image's steps, profiled right after the timings. "heads" are the RMS norms of queries and keys, which SD3-medium does not have.
"""  # noqa: E501
REJECTED = """
## Ideas tried and rejected

SD3.5-medium and SD3.5-large at 1024x1024, batch 2, unless stated otherwise. The first four ideas were tried on 2026-11-25, before FlashAttention-3, the last two on 2026-11-26, with it. The code was not kept, so no command repeats these numbers; they come from single runs on an H100.

| idea | expected | measured |
|---|---|---|
| the text's GEMMs and the later blocks' modulations on a second CUDA stream | up to 2 and 6 ms less | 48.20 instead of 48.24 ms, 124.0 instead of 123.9 ms: the GPU draws 640 to 670 W of its 700 W either way |
| another memory layout of queries, keys and values | one that cuDNN runs faster | 569 to 575 us per attention in all nine orders tried |
| `torch.compile(dynamic=True)`, so that other sizes need no compilation | no loss | 52.2 ms instead of 50.0 (static), and still 15 s for the first step without guidance |
| blocks compiled ahead of time (AOTInductor) | as `dynamic=True` | correct at every size (1.7e-7 on a CPU), 92 s for the tiny model's three kinds of block; not needed with the kernels above, which compile in about a second |
| the text's GEMMs and norms on a second CUDA stream, for one row (as each rank has with cfg 2), SD3.5-medium | 0.5 ms less: GEMMs of one row leave part of the GPU idle | 23.7 instead of 23.4 ms (medians of five rounds), bit-identical; kept in another form, with the text's attention, see [parallel_h100x2.md](parallel_h100x2.md#what-was-tried) |
| the fastest of cuBLASLt's 8 algorithms for every GEMM, instead of torch's choice | 0.5 ms less | sums of the four GEMMs of a block, SD3.5-medium, for all 24 blocks: image 16.0 instead of 15.8 ms (two rows), 8.4 instead of 8.2 (one row); text 1.7 instead of 1.9 ms (two rows), 1.2 instead of 1.2 (one row) |
"""  # noqa: E501


def write_graphs(options: Namespace) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        dry_graph(MODELS[name], Layout().at(0), PROFILE, "bfloat16").save(options.folder / f"{name}.graph.json")


class Bench:
    """One model."""

    def __init__(self, name: str, root: Path, repeats: int):
        self.name, self.repeats, self.config = name, repeats, MODELS[name]
        self.device = torch.device("cuda")
        self.graph = Graph.load(root / f"{name}.graph.json")
        self.weights = draw_weights(self.config, self.device)

    def backend(self, passes=None) -> PyTorchBackend:
        return common.backend_of(self.graph, self.weights, self.device, passes=passes)

    def inputs(self, case: str) -> dict[str, torch.Tensor]:
        side, batch = case.split(":")
        return common.inputs_on(self.device, self.config, Resolution.read(side), int(batch))

    @torch.inference_mode()
    def run(self, case: str) -> dict:
        torch._dynamo.reset()
        inputs, (side, batch) = self.inputs(case), case.split(":")
        ours = self.backend()
        eager, compiled = (common.diffusers_transformer(self.config, self.weights) for _ in range(2))
        common.compile_blocks(compiled)
        theirs, fast = (lambda given, step=step: step(**given, return_dict=False)[0] for step in (eager, compiled))
        loops = [common.loop(one, inputs) for one in (ours, common.with_cuda_graphs(ours))]
        found = [partial(one, inputs) for one in (theirs, fast, GraphedStep(fast))] + loops
        steps = dict(zip(WAYS, found, strict=True))
        result = {"model": self.name, "side": int(side), "batch": int(batch), "first step, s": {}, "GB": {}}
        for way, step in steps.items():
            of_step = partial(peak_bytes, device=self.device)
            first, peak = (step.first, common.peak_of_image) if step in loops else (step, of_step)
            begin = time.perf_counter()
            capturing = of_step(first)
            result["first step, s"][way] = round(time.perf_counter() - begin, 2)
            held = capturing if way.endswith(" + CUDA graph") else peak(step)  # a graph keeps its memory
            result["GB"][way] = round(held / 1e9, 2)
        result["difference"] = relative_error(loops[0].first(), steps["diffusers"]())
        result["ms"] = {way: round(ms, 2) for way, ms in alternately(steps, self.device, self.repeats).items()}
        result["conditions"] = conditions(self.device)  # before the profile, during which the GPU is idle
        result["kernels"] = common.kernel_times(steps["ours + CUDA graph"])
        return result

    @torch.inference_mode()
    def errors(self) -> dict[str, float]:
        """Distance of both from diffusers in float32, at 512x512."""
        inputs = self.inputs("512:2")
        eager = common.diffusers_transformer(self.config, self.weights)
        found = {
            "ours": common.loop(self.backend(), inputs).first(),
            "diffusers": eager(**inputs, return_dict=False)[0],
        }
        wide = {name: x.float() for name, x in inputs.items()}
        exact = eager.float()(**wide, return_dict=False)[0]
        return {name: relative_error(x, exact) for name, x in found.items()}

    @torch.inference_mode()
    def ladder(self) -> list[dict]:
        """Each pass on top of those before it."""
        inputs, rungs = self.inputs(CASES[0]), []
        passes = SPEED + KERNELS + SUMS
        names = ["without passes", *(one.__name__ for one in passes)]
        with common.pytorch_attention():
            for count, name in enumerate(names):
                rungs.append({"pass": name} | self.rung(NUMERICS + passes[:count], inputs))
        if has_flash_attention_3(self.device):
            rungs.append({"pass": "FlashAttention-3"} | self.rung(NUMERICS + passes, inputs))
            backend = self.backend()
            loops = {"ms": backend, "ms, CUDA graph": common.with_cuda_graphs(backend)}
            loops = {way: common.loop(one, inputs) for way, one in loops.items()}
            for name, context in (("computed ahead", common.comparing_steps()), ("steps recognized", nullcontext())):
                with context:
                    times = alternately(loops, self.device, self.repeats)
                rungs.append({"pass": name} | {way: round(ms, 2) for way, ms in times.items()})
        return rungs

    def rung(self, passes, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
        step = self.backend(passes)._run
        ways = {"ms": partial(step, inputs), "ms, CUDA graph": partial(GraphedStep(step), inputs)}
        times = alternately(ways, self.device, self.repeats)
        del step, ways
        common.free()
        return {way: round(ms, 2) for way, ms in times.items()}


def run(options: Namespace) -> None:
    import diffusers

    torch._dynamo.config.recompile_limit = 64  # diffusers' blocks share one function
    found = {
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "attention": common.attention_kernel(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [], "errors": {}, "ladder": {}, "conditions": [],
    }  # fmt: skip
    for name in options.models:
        bench = Bench(name, options.folder, options.repeats)
        if options.errors:
            found["errors"][name] = bench.errors()
            del bench
            common.free()
            bench = Bench(name, options.folder, options.repeats)
        for case in options.cases:
            found["rows"].append(bench.run(case))
            found["conditions"].append(found["rows"][-1].pop("conditions"))
            print(json.dumps(found["rows"][-1]), flush=True)
            common.save(found, options.output)
            common.free()
        if options.ladder:
            found["ladder"][name] = bench.ladder()
            common.save(found, options.output)
        del bench
        gc.collect()
        common.free()


def table(found: dict) -> list[str]:
    """One result as Markdown."""
    lines = [
        f"{found['hardware']}, torch {found['torch']}, diffusers {found['diffusers']}, {found['date']}. Milliseconds "
        "per denoising step of the `pytorch` backend and of diffusers' transformer: bf16, random weights, "
        f"{TEXT_TOKENS} text tokens, run alternately in one process. Ours: means of an image's {Loop.steps} "
        "steps, whose timesteps are known as in a pipeline, median of three images; diffusers': medians of all steps. "
        "Our attention: "
        f"{found.get('attention', 'cuDNN')}; diffusers': its default, cuDNN's kernel. The GPU right after the "
        f"first case: {found['conditions'][0].rpartition('; ')[2]}.",
        "",
        "The commands are at the top of `benchmarks/single_gpu.py`. The batch counts rows: two are one image with "
        "guidance. First steps were timed in the order of the columns, so those with a CUDA graph find everything "
        "compiled.",
        "",
    ]
    cells = []
    for row in found["rows"]:
        ms = row["ms"]
        ratios = ms["diffusers"] / ms["ours"], ms["diffusers compiled"] / ms["ours + CUDA graph"]
        cells.append([label(row), *(f"{ms[way]:.1f}" for way in WAYS), *(f"{ratio:.2f}x" for ratio in ratios)])
    lines += common.markdown(["", *WAYS, "diffusers / ours", "diffusers compiled / ours + CUDA graph"], cells)
    for key, title in (("first step, s", "Seconds for the first step"), ("GB", "Peak memory beyond the weights, GB")):
        cells = [[label(row), *(row[key][way] for way in WAYS)] for row in found["rows"]]
        lines += ["", *common.markdown([title, *WAYS], cells)]
    spent = {label(row): row["kernels"] for row in found["rows"]}
    lines += ["", *common.kinds_table("ms of our kernels, by kind", spent)]
    if found["errors"]:
        cells = [[f"SD{name}", f"{e['diffusers']:.4f}", f"{e['ours']:.4f}"] for name, e in found["errors"].items()]
        lines += ["", *common.markdown(["relative error of bf16 to float32, 512x512", "diffusers", "ours"], cells)]
    for name, rungs in found["ladder"].items():
        head = [f"SD{name}, passes up to and including", "expected gain", "ms", "ms, CUDA graph"]
        cells = [[x["pass"], PREDICTED.get(x["pass"], ""), x["ms"], x["ms, CUDA graph"]] for x in rungs]
        lines += ["", *common.markdown(head, cells, left=(0, 1))]
    return [*lines, *found.get("notes", []), POWER, REJECTED]


def label(row: dict) -> str:
    return f"SD{row['model']}, {row['side']}x{row['side']}, batch {row['batch']}"


def main() -> None:
    parser = common.parser(__doc__, MODELS, ["3.5-medium", "3.5-large"], "single_gpu.json", 10)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="side in pixels : rows")
    parser.add_argument("--ladder", action="store_true", help="also time each graph pass on top of those before it")
    parser.add_argument("--errors", action="store_true", help="also compare both with float32")
    common.main(parser.parse_args(), write_graphs, run, "One GPU", table)


if __name__ == "__main__":
    main()
