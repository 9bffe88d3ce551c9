"""When a rank computes and when it is in a collective: time stamps around every operator of one step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import fx

from ..engine import torch_ops
from ..engine.collectives import dist_collective
from ..engine.precision import without_tf32
from ..runner import MMDiTRunner

COLLECTIVE, ATTENTION, GEMM, OTHER = "collective", "attention", "GEMM", "other"
KINDS = {
    dist_collective: COLLECTIVE, torch_ops.attention: ATTENTION, torch_ops.matrix_multiply: GEMM,
    torch_ops.linear: GEMM, torch_ops.linear_gelu: GEMM,
}  # fmt: skip
WARM_UP = 2


class Span(NamedTuple):
    """An operator: its kind, its tensor's name, and its start and end in seconds of this machine's monotonic clock."""

    kind: str
    name: str
    start: float
    end: float


class Stamps(fx.Interpreter):
    """Runs a lowered graph on a CPU one node at a time and notes when."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.spans: list[Span] = []

    def run_node(self, node: fx.Node):
        if node.op != "call_function":
            return super().run_node(node)
        start = time.monotonic()
        value = super().run_node(node)
        self.spans.append(Span(KINDS.get(node.target, OTHER), node.meta["tensor"], start, time.monotonic()))
        return value


@torch.inference_mode()
def record_steps(runner: MMDiTRunner, inputs: Mapping[str, torch.Tensor], steps: int = 5) -> list[list[Span]]:
    """`steps` steps of this rank, after two others; the ranks start each of them together.

    A collective's span includes the time in which it waits for the other ranks. Raises `ValueError` unless the
    `pytorch` backend runs on a CPU: on a GPU, calls return before the work is done.
    """
    if runner.backend.name != "pytorch" or runner.device.type != "cpu":
        raise ValueError(f"record_steps: {runner.backend.name} on {runner.device}; use the pytorch backend on a CPU")
    prepared, _ = runner.prepare(inputs)
    arguments = [prepared[name] for name in runner.backend.inputs]
    recorded = []
    with without_tf32():
        for _ in range(WARM_UP + steps):
            stamps = Stamps(runner.backend.module)
            if dist.is_initialized():
                dist.barrier()
            stamps.run(*arguments)
            recorded.append(stamps.spans)
    return recorded[WARM_UP:]


def quickest(ranks: Sequence[Sequence[Sequence[Span]]]) -> list[list[Span]]:
    """Every rank's spans of the step that took least time, over all ranks."""

    def seconds(step) -> float:
        return max(spans[-1].end for spans in step) - min(spans[0].start for spans in step)

    return list(min(zip(*ranks, strict=True), key=seconds))
