"""CUDA graphs: the right result for every set of shapes, and a bounded number of graphs."""

import weakref
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from mmdit_lib.engine.cuda_graph import Captured, GraphedStep
from mmdit_lib.engine.tensorrt_backend import TensorRTBackend


class FakeGraph:
    """Repeats its step on the buffers that it was captured with, as a CUDA graph does."""

    alive: ClassVar = weakref.WeakSet()

    def __init__(self, step, buffers, output):
        self.replay = lambda: output.copy_(step(buffers))
        self.alive.add(self)


@pytest.fixture
def captured(monkeypatch) -> list[tuple]:
    """The shapes that were captured, in order. Captures need no GPU."""
    shapes = []

    def capture(self, inputs):
        buffers = {name: value.clone() for name, value in inputs.items()}
        output = torch.empty_like(self.step(buffers))
        shapes.append(tuple(buffers["x"].shape))
        return Captured(FakeGraph(self.step, buffers, output), buffers, output)

    monkeypatch.setattr(GraphedStep, "_capture", capture)
    FakeGraph.alive.clear()
    return shapes


def double(inputs):
    return 2 * inputs["x"]


def test_graphs_are_bounded_and_results_are_right(captured):
    dropped = []
    step = GraphedStep(double, 3, lambda buffers: dropped.append(tuple(buffers["x"].shape)))
    for size in (1, 2, 3, 1, 4, 1, 2, 5, 6, 7):
        x = torch.rand(size)
        assert torch.equal(step({"x": x}), 2 * x)
        assert len(FakeGraph.alive) <= 3
    # 4 takes the place of 2, which was used least recently; 1 stays until 5, 6 and 7 have come.
    assert captured == [(1,), (2,), (3,), (4,), (2,), (5,), (6,), (7,)]
    assert dropped == [(2,), (3,), (4,), (1,), (2,)]


def test_an_output_survives_the_next_replay(captured):
    step = GraphedStep(double)
    first = step({"x": torch.ones(2)})
    step({"x": torch.zeros(2)})
    assert torch.equal(first, torch.full((2,), 2.0))


class FakeContext:
    alive: ClassVar = weakref.WeakSet()

    def __init__(self):
        self.alive.add(self)

    def set_input_shape(self, name, shape) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        pass

    def execute_async_v3(self, stream) -> bool:
        return True


@pytest.mark.parametrize("graphed", [True, False])
def test_a_plans_contexts_and_buffers_are_bounded(captured, monkeypatch, graphed):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    FakeContext.alive.clear()
    backend = TensorRTBackend.__new__(TensorRTBackend)
    backend.__dict__ |= {
        "device": torch.device("cpu"), "inputs": ["x"], "output": "y", "_communicator": None, "_graphed": graphed,
        "dtypes": {"x": torch.float32, "y": torch.float32}, "_contexts": {}, "_buffers": {},
        "engine": SimpleNamespace(create_execution_context=FakeContext),
    }  # fmt: skip
    step = GraphedStep(backend._run, 3, backend._forget) if graphed else backend._run
    for size in range(1, 10):
        assert step({"x": torch.rand(size)}).shape == (size,)
        limit = 3 if graphed else 1
        assert len(FakeContext.alive) <= limit and len(backend._buffers) <= limit


@pytest.mark.gpu
def test_many_shapes_on_a_gpu():
    weight = torch.rand(256, 256, device="cuda")

    def step(inputs):
        return torch.relu(inputs["x"] @ weight) @ weight

    graphed, reserved = GraphedStep(step), []
    with torch.inference_mode():
        for _ in range(3):
            for size in range(256, 256 * 21, 256):  # 20 shapes
                x = torch.rand(size, 256, device="cuda")
                torch.testing.assert_close(graphed({"x": x}), step({"x": x}))
            reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] <= reserved[1]
