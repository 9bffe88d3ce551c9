"""Every layout for two GPUs: parity with one GPU, and milliseconds per step. Full-size models, random weights.

    python -m benchmarks.parallel graphs --folder graphs     # needs TensorRT (tensorrt_rtx), but no GPU
    mpirun -n 2 python -m benchmarks.parallel run --folder graphs --output parallel.json     # two GPUs, NCCL
    python -m benchmarks.parallel table --results parallel.json                              # Markdown

`run` needs neither TensorRT nor a checkpoint: the graph files name the weights, which each GPU draws from
the same seed. It also works under `torchrun --nproc-per-node 2`. Every row, including those for one GPU, is
measured on all GPUs at once, and the time is that of the slowest rank.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mmdit_lib.config import Layout, Resolution
from mmdit_lib.engine.folder import graph_file
from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.precision import without_tf32
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.bench import Loop, step_times
from mmdit_lib.reports.parity import relative_error
from mmdit_lib.sd3 import KNOWN_MODELS, SD3

from . import common
from .common import draw_weights, kernel_times
from .fp8_speed import SCHEMES, in_fp8

WAYS = ("eager", "CUDA graph", "compiled")

MODELS = {
    "medium": KNOWN_MODELS["stable-diffusion-3.5-medium"],
    "large": KNOWN_MODELS["stable-diffusion-3.5-large"],
    "rehearsal": KNOWN_MODELS["stable-diffusion-3.5-medium"].model_copy(
        update=dict(num_layers=3, num_attention_heads=2, caption_projection_dim=128, joint_attention_dim=64,
                    pooled_projection_dim=48, pos_embed_max_size=96, dual_attention_layers=(0,))
    ),
}  # fmt: skip
LAYOUTS = {
    "1 GPU": Layout(),
    "cfg 2": Layout(cfg_size=2),
    "cp 2 allgather": Layout(cp_size=2),
    "cp 2 ulysses": Layout(cp_size=2, cp_method="ulysses"),
    "tp 2": Layout(tp_size=2),
}
REFERENCE = "1 GPU, float32"
ATTENTION = "fp8, attention too"
TITLES = {"bf16": "", "fp8": " in FP8", ATTENTION: " in FP8, attention too"}
IN = {"bf16": "linear layers in bf16", "fp8": "linear layers in fp8", ATTENTION: "linear layers and attention in fp8"}
IMAGES = 3


def file_of(root: Path, model: str, layout: str, rank: int) -> Path:
    return root / model / layout.replace(" ", "_").replace(",", "") / graph_file(rank)


def kind_of(options: Namespace) -> str:
    return ATTENTION if options.fp8_attention else "fp8" if options.fp8 else "bf16"


def layouts_of(options: Namespace) -> dict[str, Layout]:
    """Attention in FP8 cannot be combined with context parallelism."""
    return {name: x for name, x in LAYOUTS.items() if x.cp_size == 1 or not options.fp8_attention}


def write_graphs(options: Namespace) -> None:
    resolution = Resolution.read(options.resolution)
    for model in options.models:
        for name, layout in (layouts_of(options) | {REFERENCE: LAYOUTS["1 GPU"]}).items():
            dtype, kind = ("float32", "bf16") if name == REFERENCE else ("bfloat16", kind_of(options))
            scheme, attention = SCHEMES["bf16" if kind == "bf16" else "fp8"], kind == ATTENTION
            for mapping in layout.ranks():
                path = file_of(options.folder, model, name, mapping.rank)
                common.write_graph(path, MODELS[model], mapping, resolution, dtype, scheme, fp8_attention=attention)
    (options.folder / "resolution").write_text(str(resolution))


@dataclass(frozen=True)
class SameFolder:
    """Replaces an engine folder, which all ranks would have to compare."""

    layout: Layout
    path: Path = Path("-")

    def fingerprint(self) -> dict[str, str]:
        return {"parallel layout": str(self.layout)}


class Ranks:
    """This process as one of the ranks, from `mmdit_lib.parallel` under mpirun or from torchrun's environment."""

    def __init__(self, device_type: str):
        self.device_type = device_type
        self.by_mpi = "RANK" not in os.environ
        if not self.by_mpi:
            self.device = torch.device(device_type, int(os.environ["LOCAL_RANK"]) if device_type == "cuda" else None)
            if device_type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")

    def join(self, layout: Layout) -> dict[tuple[int, ...], str]:
        from mmdit_lib.parallel import team

        if not self.by_mpi:
            return team.make_groups(layout.at(dist.get_rank()))
        joined = team.join(SameFolder(layout), self.device_type, seconds=60)
        self.device = joined.device
        return joined.groups

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def slowest(self, value: float) -> float:
        everyone = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(everyone, dist.ReduceOp.MAX)
        return everyone.item()

    def all_well(self, well: bool) -> bool:
        """Whether all ranks succeeded; if one fails, all of them skip the step."""
        return self.slowest(0.0 if well else 1.0) == 0.0


class Bench:
    def __init__(self, ranks: Ranks, options: Namespace):
        self.ranks, self.root, self.output, self.repeats = ranks, options.folder, options.output, options.repeats
        self.deadline = time.monotonic() + options.budget
        self.resolution = Resolution.read((self.root / "resolution").read_text())
        self.device = ranks.device
        cuda = self.device.type == "cuda"
        device = f"{dist.get_world_size()} x {torch.cuda.get_device_name(self.device)}" if cuda else platform.machine()
        self.kind, self.layouts = kind_of(options), layouts_of(options)
        self.result = {
            "hardware": device,
            "weights": self.kind,
            "attention": common.attention_kernel() if cuda else None,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
            "driver": _driver() if cuda else None,
            **common.conditions(self.resolution),
            "repeats": self.repeats,
            "started_by": "mpirun" if ranks.by_mpi else "torchrun",
            "nccl_communicator_for_tensorrt": self.communicator() if cuda else None,
            "rows": [],
        }

    def communicator(self) -> str:
        """Whether this torch exposes the NCCL communicator that TensorRT's collectives need."""
        from mmdit_lib.parallel.team import Team

        try:
            return type(Team(self.ranks.rank, Layout().at(0), self.device).nccl_communicator()).__name__
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def late(self) -> bool:
        return not self.ranks.all_well(time.monotonic() < self.deadline)

    def save(self, row: dict) -> None:
        self.result["rows"].append(row)
        if self.ranks.rank == 0:
            common.save(self.result, self.output)
            print(json.dumps({k: v for k, v in row.items() if k != "times"}), flush=True)

    def model(self, name: str) -> None:
        model, device = MODELS[name], self.device
        weights = draw_weights(model, device)
        self.check_weights(weights)
        inputs = common.inputs_on(device, model, self.resolution)
        wide = PyTorchBackend(Graph.load(file_of(self.root, name, REFERENCE, 0)), Float32(weights), device=device)
        exact = wide({name: value.float() for name, value in inputs.items()}).cpu()
        del wide
        common.free()
        weights = in_fp8(weights, model) if self.kind != "bf16" else weights
        alone = None
        for layout in self.layouts:
            if self.late():
                return
            output = self.layout(name, layout, weights, inputs, exact, alone)
            alone = output if alone is None else alone
            common.free()
        if not self.late() and self.kind == "bf16":
            self.diffusers(name, weights, inputs, exact)
            common.free()

    def check_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Check that all ranks drew the same weights, by comparing a sum."""
        total = sum(float(w.double().sum()) for w in list(weights.values())[::50])
        assert self.ranks.slowest(total) == -self.ranks.slowest(-total), "the ranks drew different weights"

    def layout(self, name, layout, weights, inputs, exact, alone) -> torch.Tensor:
        begin = time.monotonic()
        opened = backend(self.ranks, self.root, name, layout, weights)
        eager = common.loop(opened, inputs)
        output = eager.first().cpu()
        row = {"model": name, "layout": layout, "error_to_float32": relative_error(output, exact)}
        if alone is not None:
            row["error_to_1_gpu"] = relative_error(output, alone)
        self.time(row, "eager", eager)
        if self.device.type == "cuda":
            row["GB"] = round(self.ranks.slowest(common.peak_of_image(eager)) / 1e9, 3)
            self.graphed(row, common.loop(common.with_cuda_graphs(opened), inputs), output)
        row["seconds"] = time.monotonic() - begin
        self.save(row)
        return output

    def graphed(self, row, steps: Loop, output) -> None:
        """The same step as a CUDA graph, and where its time goes."""
        way, fault = "CUDA graph", None
        try:
            found = steps.first().cpu()
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:300]}"
        if not self.ranks.all_well(fault is None):
            row[f"fault {way}"] = fault or "on another rank"
            return
        row[f"error_to_eager {way}"] = relative_error(found, output)
        self.time(row, way, steps)
        row["profile"] = kernel_times(steps)

    def time(self, row, way, step) -> None:
        repeats, warm_up = (IMAGES, 1) if isinstance(step, Loop) else (self.repeats, 5)
        times = step_times(step, self.device, repeats, warm_up)
        row[f"ms {way}"] = self.ranks.slowest(statistics.median(times))
        row.setdefault("times", {})[way] = times

    def diffusers(self, name, weights, inputs, exact) -> None:
        try:
            reference = common.diffusers_transformer(MODELS[name], weights)
        except ImportError as error:
            self.result["no_diffusers"] = str(error)
            return
        step = torch.inference_mode()(lambda: reference(**inputs, return_dict=False)[0])
        eager = step().cpu()
        row = {"model": name, "layout": "diffusers, 1 GPU", "error_to_float32": relative_error(eager, exact)}
        self.time(row, "eager", step)
        if self.device.type == "cuda":
            torch._dynamo.reset()
            common.compile_blocks(reference)
            row["error_to_eager compiled"] = relative_error(step().cpu(), eager)
            self.time(row, "compiled", step)
        self.save(row)


def backend(ranks: Ranks, root: Path, name: str, layout: str, weights: dict[str, torch.Tensor]) -> PyTorchBackend:
    """This rank's part of a model in a layout; scales in `weights` are the same on all ranks. All ranks call it."""
    spread = LAYOUTS[layout]
    several = spread.world_size > 1
    rank = ranks.rank if several else 0
    groups = ranks.join(spread) if several else None
    if spread.tp_size > 1:
        shard, tp_rank = SD3.shardings[spread.tp_layout].shard, spread.at(rank).tp_rank
        weights = weights | {
            n: shard(n, weights[n], spread.tp_size, tp_rank).contiguous() for n in SD3.parameters(MODELS[name])
        }
    graph = Graph.load(file_of(root, name, layout, rank))
    return common.backend_of(graph, weights, ranks.device, groups=groups)


class Float32(dict):
    """Weights widened one at a time."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).float()


def _driver() -> str:
    import subprocess

    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.split("\n")[0]


def run(options: Namespace) -> None:
    faulthandler.dump_traceback_later(options.budget + 60, exit=True)  # shows where it hangs
    ranks = Ranks(options.device)
    ranks.join(Layout(cfg_size=2))
    bench = Bench(ranks, options)
    with without_tf32():
        for name in options.models:
            if not bench.late():
                bench.model(name)
    dist.destroy_process_group()


def table(result: dict) -> list[str]:
    """One result as Markdown."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["model"] == model]
        alone = rows[0]
        lines += [
            f"## SD3.5-{model}{TITLES[result['weights']]}",
            "",
            f"{result['hardware']}, torch {result['torch']}, NCCL {result['nccl']}, driver {result['driver']}, "
            f"{result['date']}. One step of the `pytorch` backend, {result['conditions']}, "
            f"{IN[result['weights']]}, attention by {result.get('attention', 'PyTorch')}; mean of an image's "
            f"{Loop.steps} steps, median of {IMAGES} images, on the slowest rank."
            + f" Of diffusers, the median of {result['repeats']} steps."
            * any("diffusers" in row["layout"] for row in rows),
            "",
        ]
        head = ["", *(column for way in WAYS for column in (f"ms, {way}", "speed-up"))]
        head += ["GB", "error to 1 GPU", "error to float32"]
        written = []
        for row in rows:
            cells = [row["layout"]]
            for way in WAYS:
                ms, base = row.get(f"ms {way}"), alone.get(f"ms {way}")
                cells += [f"{ms:.1f}" if ms else "-", f"{base / ms:.2f}" if ms and base else "-"]
            cells.append(f"{row['GB']:.2f}" if "GB" in row else "-")
            cells += [f"{row[key]:.2e}" if key in row else "-" for key in ("error_to_1_gpu", "error_to_float32")]
            written.append(cells)
        profiles = {row["layout"]: row["profile"] for row in rows if row.get("profile")}
        lines += [*common.markdown(head, written), ""]
        lines += [*common.kinds_table("ms of one rank, by kind of kernel", profiles, total=True), ""]
    return lines


def main() -> None:
    parser = common.parser(__doc__, MODELS, ["medium", "large"], "parallel.json", repeats=20)
    parser.add_argument("--resolution", default="1024x1024")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no further layout is started")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--fp8", action="store_true", help="with graphs and run: linear layers in FP8")
    parser.add_argument("--fp8_attention", action="store_true", help="with graphs and run: attention in FP8 too")
    common.main(parser.parse_args(), write_graphs, run, "Two GPUs", table)


if __name__ == "__main__":
    main()
