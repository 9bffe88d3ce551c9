"""One GPU: ms per step beside diffusers, the graph passes one by one, compile times, peak memory. Random weights.

    python -m benchmarks.single_gpu graphs --folder graphs     # needs TensorRT (tensorrt_rtx), but no GPU
    python -m benchmarks.single_gpu run --folder graphs --output single_gpu.json     # needs a GPU, but no TensorRT
    python -m benchmarks.single_gpu table --results single_gpu.json     # as Markdown

Candidates that are compared run alternately in one process, three rounds; the median of all steps counts.
"""

from __future__ import annotations

import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mmdit_lib.config import Layout, Resolution
from mmdit_lib.engine.cuda_graph import GraphedStep
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.passes import NUMERICS, SPEED
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.bench import step_times
from mmdit_lib.sd3 import KNOWN_MODELS, SD3

from . import common
from .common import WAYS, draw_weights, relative_error

MODELS = {name.removeprefix("stable-diffusion-"): config for name, config in KNOWN_MODELS.items()}
SIDE = Resolution.read(1024)
PREDICTED = {
    "linear_gelu": "the GELU kernels: 1.6 / 4.2 ms",
    "rms_norm": "eager: eight kernels become one; compiled: nothing, the compiler fuses them too",
    "modulate": "eager: two kernels become one; compiled: nothing",
    "gated_sum": "eager: two kernels become one; compiled: nothing",
    "shared_silu": "nothing by itself; needed by the next pass",
    "merged_linears": "modulation GEMMs become one that reads its weights once: 0.3 / 0.5 ms; fewer launches",
    "hoisted": "nothing by itself; keeps blocks equal, so compile time stays",
}
"""What each pass should gain: SD3.5-medium / SD3.5-large."""
Step = Callable[..., torch.Tensor]


def write_graphs(options: Namespace) -> None:
    for name in options.models:
        path = options.folder / f"{name}.graph.json"
        common.write_graph(path, MODELS[name], Layout().at(0), SIDE, "bfloat16")


def alternately(steps: dict[str, Step], repeats: int, rounds: int = 3) -> dict[str, float]:
    """Median milliseconds of each step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name] += step_times(step, torch.device("cuda"), repeats)
    return {name: statistics.median(found) for name, found in times.items()}


class Bench:
    def __init__(self, name: str, root: Path, repeats: int):
        self.name, self.repeats, self.config = name, repeats, MODELS[name]
        self.device = torch.device("cuda")
        self.graph = Graph.load(root / f"{name}.graph.json")
        self.weights = draw_weights(self.config, self.device)
        self.result: dict = {"model": name}

    def backend(self, passes=None, *, compiled: bool = False) -> PyTorchBackend:
        blocks = SD3.blocks if compiled else None
        return PyTorchBackend(self.graph, self.weights, device=self.device, passes=passes, compile_blocks=blocks)

    def diffusers(self, *, compiled: bool = False) -> torch.nn.Module:
        model = common.diffusers_transformer(self.config, self.weights)
        if compiled:
            common.compile_blocks(model)
        return model

    def run(self) -> dict:
        inputs = common.inputs_on(self.device, self.config, SIDE)
        for way in WAYS:
            torch._dynamo.reset()
            ours, theirs = self.backend(compiled=way != "eager"), self.diffusers(compiled=way != "eager")

            def of_diffusers(given, theirs=theirs) -> torch.Tensor:
                return theirs(**given, return_dict=False)[0]

            steps = {"ours": torch.inference_mode()(ours._run), "diffusers": torch.inference_mode()(of_diffusers)}
            first = {}
            for name, step in steps.items():
                begin = time.perf_counter()
                first[name] = step(inputs)
                torch.cuda.synchronize()
                self.result[f"{name} {way}: first step, s"] = round(time.perf_counter() - begin, 1)
            if way == "eager":
                self.result["difference of the two, bf16"] = relative_error(first["ours"], first["diffusers"])
                self.memory(steps, inputs)
            if way.endswith("graph"):
                steps = {name: torch.inference_mode()(GraphedStep(step)) for name, step in steps.items()}
            calls = {name: partial(step, inputs) for name, step in steps.items()}
            for name, ms in alternately(calls, self.repeats).items():
                self.result[f"{name} {way}, ms"] = round(ms, 2)
            if way == "compiled":
                self.other_sizes(steps)
            del ours, theirs, steps, calls, first
            common.free()
        return self.result

    def memory(self, steps, inputs) -> None:
        """Peak GPU memory of a step beyond the inputs and the weights as diffusers holds them."""
        held = sum(w.nbytes for w in self.weights.values())
        for name, step in steps.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(inputs)
            self.result[f"{name}: weights, GB"] = round(held / 1e9, 2)
            self.result[f"{name}: activations, GB"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)

    def other_sizes(self, steps) -> None:
        """Seconds of the first step at a second resolution, and with guidance off."""
        for label, size, batch in (("512x512", Resolution.read(512), 2), ("batch 1", SIDE, 1)):
            inputs = common.inputs_on(self.device, self.config, size, batch)
            for name, step in steps.items():
                begin = time.perf_counter()
                step(inputs)
                torch.cuda.synchronize()
                self.result[f"{name} compiled: first step at {label}, s"] = round(time.perf_counter() - begin, 1)

    def ladder(self) -> None:
        """Each pass on top of those before it."""
        inputs, rungs = common.inputs_on(self.device, self.config, SIDE), []
        for count in range(len(SPEED) + 1):
            name = SPEED[count - 1].__name__ if count else "without passes"
            if name in ("shared_silu", "merged_linears"):
                continue  # blocks are equal to one another again only after the next one
            passes, row = NUMERICS + SPEED[:count], {"pass": name}
            row["eager, ms"] = self.milliseconds(self.backend(passes), inputs)
            torch._dynamo.reset()
            step = torch.inference_mode()(GraphedStep(self.backend(passes, compiled=True)._run))
            row["compiled + CUDA graph, ms"] = self.milliseconds(step, inputs)
            rungs.append(row)
            del step
            common.free()
        self.result["ladder"] = rungs

    def milliseconds(self, step: Step, inputs) -> float:
        return round(statistics.median(step_times(partial(step, inputs), self.device, self.repeats)), 2)


def run(options: Namespace) -> None:
    import diffusers

    torch._dynamo.config.recompile_limit = 64  # diffusers' blocks share one function
    found = {
        "hardware": torch.cuda.get_device_name(),
        "diffusers": diffusers.__version__,
        **common.conditions(SIDE),
        "models": [],
    }
    for name in options.models:
        bench = Bench(name, options.folder, options.repeats)
        result = bench.run()
        if options.ladder:
            bench.ladder()
        found["models"].append(result)
        print(json.dumps(result), flush=True)
        common.save(found, options.output)
        del bench
        common.free()


def table(found: dict) -> list[str]:
    """One result as Markdown."""
    lines = [
        f"{found['hardware']}, torch {found['torch']}, diffusers {found['diffusers']}, {found['date']}. One step "
        f"of the `pytorch` backend beside diffusers' transformer: {found['conditions']}; run alternately, medians.",
        "",
        "Reproduce with `python -m benchmarks.single_gpu` (its first lines have the commands).",
        "",
        "| | diffusers, ms | ours, ms | ratio |",
        "|---|---:|---:|---:|",
    ]
    for result in found["models"]:
        for way in WAYS:
            theirs, ours = result[f"diffusers {way}, ms"], result[f"ours {way}, ms"]
            lines.append(f"| SD{result['model']}, {way} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.2f} |")
    lines += ["", "| | diffusers | ours |", "|---|---:|---:|"]
    keys = [key.removeprefix("ours") for key in found["models"][0] if key.startswith("ours") and "ms" not in key]
    for result in found["models"]:
        lines += [f"| SD{result['model']}{k} | {result[f'diffusers{k}']} | {result[f'ours{k}']} |" for k in keys]
    for result in found["models"]:
        if "ladder" in result:
            lines += _ladder(result)
    return [*lines, ""]


def _ladder(result: dict) -> list[str]:
    lines = [
        "",
        f"## SD{result['model']}, pass by pass",
        "",
        "| with the passes up to | expected | eager, ms | compiled + CUDA graph, ms |",
        "|---|---|---:|---:|",
    ]
    for row in result["ladder"]:
        expected = PREDICTED.get(row["pass"], "")
        lines.append(f"| {row['pass']} | {expected} | {row['eager, ms']} | {row['compiled + CUDA graph, ms']} |")
    return lines


def main() -> None:
    parser = common.parser(__doc__, MODELS, ["3.5-medium", "3.5-large"], "single_gpu.json", repeats=15)
    parser.add_argument("--ladder", action="store_true", help="also time each graph pass on top of those before it")
    common.main(parser.parse_args(), write_graphs, run, "One GPU", table)


if __name__ == "__main__":
    main()
