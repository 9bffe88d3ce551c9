"""Timing the nodes of a lowered graph: on a GPU with torch's profiler, on a CPU with a clock."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import fx
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

WARM_UP_CALLS = 2


class Ranges(fx.Interpreter):
    """Runs a lowered graph one node at a time, each in `timed(name)` of the tensor that it computes."""

    def __init__(self, module: fx.GraphModule, timed: Callable[[str], AbstractContextManager]):
        super().__init__(module)
        self.timed = timed

    def run_node(self, node: fx.Node):
        if node.op != "call_function":
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        with self.timed(node.meta["tensor"]):
            return node.target(*args, **kwargs)


def layer_times(
    module: fx.GraphModule, arguments: Sequence[torch.Tensor], device: torch.device, repeats: int
) -> dict[str, float]:
    """Milliseconds per call of each node, by tensor name: of its kernels on a GPU, of the call itself on a CPU."""
    on_gpu = device.type == "cuda"
    total = _kernels(module, arguments, device, repeats) if on_gpu else _calls(module, arguments, repeats)
    return {name: ms / repeats for name, ms in total.items()}


def _calls(module: fx.GraphModule, arguments: Sequence[torch.Tensor], repeats: int) -> Counter[str]:
    """Milliseconds of all calls of each node. torch's profiler would take as long as the layers of a small model."""
    found: Counter[str] = Counter()

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        found[name] += 1000 * (time.perf_counter() - start)

    ranges = Ranges(module, timed)
    for _ in range(WARM_UP_CALLS):
        ranges.run(*arguments)
    found.clear()
    for _ in range(repeats):
        ranges.run(*arguments)
    return found


def _kernels(
    module: fx.GraphModule, arguments: Sequence[torch.Tensor], device: torch.device, repeats: int
) -> Counter[str]:
    """Milliseconds of the kernels of all calls of each node."""
    ranges = Ranges(module, record_function)
    for _ in range(WARM_UP_CALLS):
        ranges.run(*arguments)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            ranges.run(*arguments)
        torch.cuda.synchronize(device)
    names = {node.meta["tensor"] for node in module.graph.nodes if node.op == "call_function"}
    found: Counter[str] = Counter()
    for event in profiler.events():
        # A range appears a second time, as a device event that spans its kernels and the gaps between.
        if event.name in names and event.device_type == DeviceType.CPU:
            found[event.name] += event.device_time_total / 1000
    return found
