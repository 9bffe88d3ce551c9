"""Timing the nodes of a lowered graph with torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

WARM_UP_CALLS = 2


class Ranges(fx.Interpreter):
    """Runs a lowered graph one node at a time, each in a profiler range named after the tensor that it computes."""

    def run_node(self, node: fx.Node):
        if node.op != "call_function":
            return super().run_node(node)
        with record_function(node.meta["tensor"]):
            return super().run_node(node)


def layer_times(
    module: fx.GraphModule, arguments: Sequence[torch.Tensor], device: torch.device, repeats: int
) -> dict[str, float]:
    """Milliseconds per call of each node, by tensor name: of its kernels on a GPU, of the call itself on a CPU."""
    ranges = Ranges(module)
    for _ in range(WARM_UP_CALLS):
        ranges.run(*arguments)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(repeats):
            ranges.run(*arguments)
        if cuda:
            torch.cuda.synchronize(device)
    names = {node.meta["tensor"] for node in module.graph.nodes if node.op == "call_function"}
    microseconds: Counter[str] = Counter()
    for event in profiler.events():
        # On a GPU, a range appears a second time, as a device event that spans its kernels and the gaps between.
        if event.name in names and event.device_type == DeviceType.CPU:
            microseconds[event.name] += event.device_time_total if cuda else event.cpu_time_total
    return {name: total / 1000 / repeats for name, total in microseconds.items()}
