"""One GPU: ms per step beside diffusers, the graph passes one by one, compile times, peak memory. Random weights.

    python -m benchmarks.single_gpu graphs --folder graphs     # needs TensorRT (tensorrt_rtx), but no GPU
    python -m benchmarks.single_gpu run --folder graphs --output single_gpu.json     # needs a GPU, but no TensorRT
    python -m benchmarks.single_gpu table --results single_gpu.json     # as Markdown

Candidates that are compared run alternately in one process, three rounds; the median of all steps counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mmdit_lib.config import BuildConfig, Layout, Resolution, Sizes
from mmdit_lib.engine.cuda_graph import GraphedStep
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.inputs import draw_inputs
from mmdit_lib.engine.passes import NUMERICS, SPEED
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.bench import step_times
from mmdit_lib.sd3 import KNOWN_MODELS, SD3

from .parallel import draw_weights, relative_error

MODELS = {name.removeprefix("stable-diffusion-"): config for name, config in KNOWN_MODELS.items()}
BATCH, TEXT_TOKENS, SIDE = 2, 333, 1024
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
WAYS = ("eager", "compiled", "compiled + CUDA graph")

Step = Callable[..., torch.Tensor]


def write_graphs(root: Path, models: list[str]) -> None:
    from mmdit_lib.engine.dry_graph import dry_graph

    root.mkdir(parents=True, exist_ok=True)
    config = BuildConfig.one_size(Resolution.read(SIDE), BATCH, TEXT_TOKENS)
    for name in models:
        dry_graph(MODELS[name], Layout().at(0), config, "bfloat16").save(root / f"{name}.graph.json")


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

    def inputs(self, batch: int = BATCH, side: int = SIDE) -> dict[str, torch.Tensor]:
        sizes = Sizes(batch, side, side, TEXT_TOKENS)
        return {n: x.to(self.device) for n, x in draw_inputs(SD3, self.config, sizes, "bfloat16", seed=1).items()}

    def backend(self, passes=None, *, compiled: bool = False) -> PyTorchBackend:
        blocks = SD3.blocks if compiled else None
        return PyTorchBackend(self.graph, self.weights, device=self.device, passes=passes, compile_blocks=blocks)

    def diffusers(self, *, compiled: bool = False) -> torch.nn.Module:
        from diffusers import SD3Transformer2DModel

        with torch.device("meta"):
            model = SD3Transformer2DModel(**self.config.to_diffusers()).eval()
        state = {SD3.keys.to_diffusers(name): weight for name, weight in self.weights.items()}
        model.load_state_dict(state, strict=False, assign=True)
        if compiled:
            for block in model.transformer_blocks:
                block.compile(fullgraph=True)
        return model

    def run(self) -> dict:
        inputs = self.inputs()
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
            self.free()
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
        for label, inputs in (("512x512", self.inputs(side=512)), ("batch 1", self.inputs(batch=1))):
            for name, step in steps.items():
                begin = time.perf_counter()
                step(inputs)
                torch.cuda.synchronize()
                self.result[f"{name} compiled: first step at {label}, s"] = round(time.perf_counter() - begin, 1)

    def ladder(self) -> None:
        """Each pass on top of those before it."""
        inputs, rungs = self.inputs(), []
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
            self.free()
        self.result["ladder"] = rungs

    def milliseconds(self, step: Step, inputs) -> float:
        return round(statistics.median(step_times(partial(step, inputs), self.device, self.repeats)), 2)

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def run(root: Path, output: Path, models: list[str], repeats: int, ladder: bool) -> None:
    import diffusers

    torch._dynamo.config.recompile_limit = 64  # diffusers' blocks share one function
    found = {
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "conditions": f"{SIDE}x{SIDE}, batch {BATCH}, {TEXT_TOKENS} text tokens, bf16, random weights",
        "models": [],
    }
    for name in models:
        bench = Bench(name, root, repeats)
        result = bench.run()
        if ladder:
            bench.ladder()
        found["models"].append(result)
        print(json.dumps(result), flush=True)
        output.write_text(json.dumps(found, indent=1) + "\n")
        del bench
        gc.collect()
        torch.cuda.empty_cache()


def table(paths: list[Path]) -> str:
    """Results as Markdown."""
    lines = ["# One GPU", ""]
    for path in paths:
        found = json.loads(path.read_text())
        lines += [
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
    return "\n".join([*lines, ""])


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("graphs", "run", "table"))
    parser.add_argument("--folder", type=Path, default=Path("graphs"))
    parser.add_argument("--output", type=Path, default=Path("single_gpu.json"))
    parser.add_argument("--results", type=Path, nargs="+", default=[Path("single_gpu.json")])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["3.5-medium", "3.5-large"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--ladder", action="store_true", help="also time each graph pass on top of those before it")
    options = parser.parse_args()
    if options.what == "graphs":
        write_graphs(options.folder, options.models)
    elif options.what == "run":
        run(options.folder, options.output, options.models, options.repeats, options.ladder)
    else:
        print(table(options.results))


if __name__ == "__main__":
    main()
