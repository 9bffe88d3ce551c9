"""The `pytorch` backend: the network that TensorRT was given, run by PyTorch. Needs no TensorRT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from .cuda_graph import GraphedStep
from .graph import Graph
from .lowering import lower
from .outline import outline_blocks


class PyTorchBackend:
    """Runs one rank's graph on a CPU or a CUDA device.

    Args:
        graph: what TensorRT was given.
        weights: this rank's checkpoint tensors; on a CPU they stay mapped from disk.
        groups: names of process groups, by ranks, for a graph with collectives.
        compile: compile with `torch.compile`, once per kind of transformer block.
        cuda_graph: capture and replay a CUDA graph per set of input shapes.
    """

    name = "pytorch"

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        groups: Mapping[tuple[int, ...], str] | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
    ):
        self.graph = graph
        self.device = torch.device(device)
        self.module = lower(graph, weights, device=self.device, groups=groups)
        self.inputs = {value.name: value for value in graph.inputs}
        self._module = outline_blocks(self.module, torch.compile) if compile else self.module
        self._step = GraphedStep(self._run) if cuda_graph else self._run

    @torch.inference_mode()
    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._step(inputs)

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._module(*(inputs[name] for name in self.inputs))

    @torch.inference_mode()
    def intermediates(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every named tensor of the network, by its TensorRT name (what fusions skip is left out)."""
        recorder = Recorder(self.module)
        recorder.run(*(inputs[name] for name in self.inputs))
        return recorder.found


class Recorder(fx.Interpreter):
    """Runs a lowered graph and keeps each tensor that it calculates."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.found: dict[str, torch.Tensor] = {}

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if isinstance(value, torch.Tensor) and node.op == "call_function":
            self.found[node.meta["tensor"]] = value
        return value
