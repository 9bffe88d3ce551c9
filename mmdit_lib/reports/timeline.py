"""When a rank computes and when it is in a collective: time stamps around every operator of one step."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
def record_step(runner: MMDiTRunner, inputs: Mapping[str, torch.Tensor], warm_up: int = 2) -> list[Span]:
    """One step of this rank, after `warm_up` others; the ranks start it together.

    A collective's span includes the time in which it waits for the other ranks. Raises `ValueError` unless the
    `pytorch` backend runs on a CPU: calls return before a GPU has finished.
    """
    if runner.backend.name != "pytorch" or runner.device.type != "cpu":
        raise ValueError(f"record_step: needs the pytorch backend on a CPU, not {runner.backend.name}, {runner.device}")
    prepared, _ = runner.prepare(inputs)
    arguments = [prepared[name] for name in runner.backend.inputs]
    stamps = Stamps(runner.backend.module)
    with without_tf32():
        for _ in range(warm_up + 1):
            stamps.spans.clear()
            if dist.is_initialized():
                dist.barrier()
            stamps.run(*arguments)
    return stamps.spans
