"""What depends only on the timestep and the prompt, computed for several steps at once.

In SD3 these are the modulations of all blocks: one GEMM with a row per image, which takes as long as reading its
weights. With the rows of several steps it takes no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import fx

from .backend import Inputs
from .torch_ops import item, shuffle, slice_, unbind

ROWS = 16
"""Rows computed at once: as many as take no longer than one row and little memory (35 MB for SD3.5-large)."""
KEPT = 2
"""Prompts whose rows are kept: with skip-layer guidance, steps alternate between two."""
VALUE = "computed_ahead"
"""The input that takes their place in the rest of the network."""


def split_ahead(module: fx.GraphModule, names: Sequence[str]) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """Split a lowered graph after what depends only on the inputs `names`.

    Returns:
        A module with these inputs, whose result is a tensor of shape [rows, width]; and the rest, with the other
        inputs and `VALUE`. None unless exactly one computed tensor connects them.
    """
    last = last_early(module.graph, names)
    return last and (_first(module, names, last), _rest(module, names, last))


def last_early(graph: fx.Graph, names: Sequence[str]) -> fx.Node | None:
    """The only node through which the inputs `names` reach the rest, or None; views of it belong to the rest."""
    early: set[fx.Node] = set()
    for node in graph.nodes:
        sources = [x for x in node.all_input_nodes if x.op != "get_attr"]
        if node.op == "placeholder":
            early |= {node} if node.target in names else set()
        elif node.op == "call_function" and sources and early.issuperset(sources):
            early.add(node)
    for node in reversed(graph.nodes):
        if node.target in (item, shuffle, slice_, unbind) and early.isdisjoint(node.users):
            early.discard(node)
    last = [x for x in graph.nodes if x in early and not early.issuperset(x.users)]
    return last[0] if len(last) == 1 and last[0].op != "placeholder" else None


def _first(module: fx.GraphModule, names: Sequence[str], last: fx.Node) -> fx.GraphModule:
    graph, copies = fx.Graph(), {}
    for node in module.graph.nodes:
        given = node.op != "placeholder" or node.target in names
        if given and node.op != "output" and copies.keys() >= set(node.all_input_nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[last])
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _rest(module: fx.GraphModule, names: Sequence[str], last: fx.Node) -> fx.GraphModule:
    graph, copies = fx.Graph(), {}
    for node in module.graph.nodes:
        copies[node] = graph.placeholder(VALUE) if node is last else graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="placeholder"):
        if node.target in names:
            graph.erase_node(node)
    return fx.GraphModule(module, graph)


def steps_at_once(rows: int) -> int:
    """How many timesteps to compute at once, with so many rows each."""
    return max(1, ROWS // rows)


class Known(NamedTuple):
    """The rows of some timesteps.

    Attributes:
        prompt: copies of the inputs that stay the same for an image.
        values: [images, timesteps, width].
    """

    prompt: dict[str, torch.Tensor]
    timesteps: list[float]
    values: torch.Tensor

    def like(self, inputs: Inputs) -> torch.Tensor:
        """Whether the prompt is equal, as 0.0 or 1.0."""
        return torch.stack([(x == inputs[name]).all() for name, x in self.prompt.items()]).all().float()

    def fit(self, inputs: Inputs) -> bool:
        """Whether the prompt's shapes are equal."""
        return all(x.shape == inputs[name].shape for name, x in self.prompt.items())

    def at(self, timestep: float) -> torch.Tensor:
        """[images, width]."""
        return self.values[:, self.timesteps.index(timestep)]


class Ahead:
    """Computes rows for the coming timesteps, `ROWS` at once, and keeps them.

    Args:
        compute: inputs by name -> [rows, width].
        timestep: the name of the input with the timestep of each image.
        prompt: names of the other inputs, which stay the same for an image.
    """

    def __init__(self, compute: Callable[[Inputs], torch.Tensor], timestep: str, *prompt: str):
        self.compute, self.timestep, self.prompt = compute, timestep, prompt
        self._known: list[Known] = []
        self._ranks: int | None = None

    def forget(self) -> None:
        """Drop all rows, after a change of weights."""
        self._known.clear()

    def rows(self, inputs: Inputs, timesteps: torch.Tensor) -> torch.Tensor | None:
        """`compute` of these inputs; None for too many rows, different timesteps, or one not in `timesteps`."""
        candidates = [known for known in self._known if known.fit(inputs)]
        # One transfer from the GPU, for which the step waits.
        answers = torch.cat([inputs[self.timestep], *(known.like(inputs)[None] for known in candidates)]).tolist()
        images = len(inputs[self.timestep])
        timestep, *others = set(answers[:images])
        if others:
            return None
        found = next((known for known, like in zip(candidates, answers[images:], strict=True) if like), None)
        if found is None or timestep not in found.timesteps:
            coming, count = timesteps.tolist(), self._count(inputs)
            if timestep not in coming or count < 2:
                return None
            others = [known for known in self._known if known is not found]
            found = self._computed(inputs, coming[coming.index(timestep) :][:count], count)
            self._known = [found, *others][:KEPT]
        return found.at(timestep)

    def _count(self, inputs: Inputs) -> int:
        images = len(inputs[self.timestep])
        if self._ranks is None:  # with CFG parallelism, each rank computes only the rows of its images
            self._ranks = images // len(self.compute(inputs))
        return steps_at_once(images // self._ranks)

    def _computed(self, inputs: Inputs, coming: list[float], count: int) -> Known:
        images = inputs[self.timestep]
        # Always the same number of rows, so that the GEMM adds up in the same order on every rank and in every call.
        padded = coming + coming[-1:] * (count - len(coming))
        rows = {name: inputs[name].repeat_interleave(count, 0) for name in self.prompt}
        rows[self.timestep] = images.new_tensor(padded).repeat(len(images))
        values = self.compute(rows).unflatten(0, (-1, count))
        return Known({name: inputs[name].clone() for name in self.prompt}, padded, values)
