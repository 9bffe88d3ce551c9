"""Replaying a full step as one CUDA graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch

from . import warm_up
from .backend import Inputs

KEPT_GRAPHS = 8
"""Sets of input shapes whose graphs are kept: enough for guidance on and off at four image sizes."""


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    buffers: dict[str, torch.Tensor]
    """The inputs that a replay reads."""
    output: torch.Tensor


class GraphedStep:
    """Captures `step` once per set of input shapes and replays it from then on.

    All graphs share one memory pool, so together they take about the memory of the largest. That is safe
    because replays follow each other on one stream and each output is copied before the next replay.

    Args:
        step: named inputs on one CUDA device -> output; it must do the same work in every call.
        limit: how many graphs are kept; the least recently used is dropped.
        forget: called with the input buffers of a graph that is dropped.
    """

    WARM_UP_CALLS = 3

    def __init__(
        self,
        step: Callable[[Inputs], torch.Tensor],
        limit: int = KEPT_GRAPHS,
        forget: Callable[[Inputs], None] = lambda buffers: None,
    ):
        self.step, self.limit, self.forget = step, limit, forget
        self._captured: OrderedDict[tuple, Captured] = OrderedDict()

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        if shapes not in self._captured:
            self._captured[shapes] = self._capture(inputs)
            if len(self._captured) > self.limit:  # capturing waited for the device, so no dropped graph is running
                _, dropped = self._captured.popitem(last=False)
                self.forget(dropped.buffers)
        self._captured.move_to_end(shapes)
        graph, buffers, output = self._captured[shapes]
        for name, buffer in buffers.items():
            buffer.copy_(inputs[name])
        graph.replay()
        return output.clone()

    @cached_property
    def _pool(self):
        return torch.cuda.graph_pool_handle()

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """One for all captures: memory that was used on one stream is not reused on another."""
        return torch.cuda.Stream()

    def _capture(self, inputs: Inputs) -> Captured:
        warm_up.wait()
        buffers = {name: value.contiguous().clone() for name, value in inputs.items()}
        device = next(iter(buffers.values())).device
        with torch.cuda.device(device):
            # Warm up and capture on one stream: NCCL hangs if the two differ.
            stream, current = self._stream, torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(self.WARM_UP_CALLS):
                    self.step(buffers)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                output = self.step(buffers)
            current.wait_stream(stream)
        return Captured(graph, buffers, output)
