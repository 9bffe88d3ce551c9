"""Replaying a full step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .backend import Inputs


class GraphedStep:
    """Captures `step` once per set of input shapes and replays it from then on.

    Args:
        step: named inputs on one CUDA device -> output; it must do the same work in every call.
    """

    WARM_UP_CALLS = 3

    def __init__(self, step: Callable[[Inputs], torch.Tensor]):
        self.step = step
        self._captured: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], torch.Tensor]] = {}

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        if shapes not in self._captured:
            self._captured[shapes] = self._capture(inputs)
        graph, buffers, output = self._captured[shapes]
        for name, buffer in buffers.items():
            buffer.copy_(inputs[name])
        graph.replay()
        return output.clone()

    def _capture(self, inputs: Inputs):
        buffers = {name: value.contiguous().clone() for name, value in inputs.items()}
        device = next(iter(buffers.values())).device
        # Warm up and capture on one stream: NCCL hangs if the two differ.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP_CALLS):
                self.step(buffers)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = self.step(buffers)
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph, buffers, output
