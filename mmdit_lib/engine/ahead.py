"""What depends only on the timestep and the prompt, computed for several steps at once.

In SD3 these are the modulations of all blocks: one GEMM with a row per image, which takes as long as reading its
weights. With the rows of several steps it takes no longer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from .backend import Inputs
from .schedule import place_in
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


class Seen(NamedTuple):
    """A tensor as it was at some time, without keeping it alive.

    Attributes:
        tensor: the tensor.
        address: of its memory.
        version: PyTorch's count of writes to it; None in inference mode, where there is none.
    """

    tensor: weakref.ref[torch.Tensor]
    address: int
    version: int | None

    @classmethod
    def now(cls, x: torch.Tensor) -> Seen:
        return cls(weakref.ref(x), x.data_ptr(), None if x.is_inference() else x._version)

    def still(self, x: torch.Tensor) -> bool:
        """Whether `x` is the same tensor, and PyTorch has counted no write to it."""
        return x is self.tensor() and self.version is not None and self[1:] == (x.data_ptr(), x._version)


class Call(NamedTuple):
    """What a step was called with.

    Attributes:
        tensors: those of the prompt and, last, all timesteps.
        place: of its timestep among them, if `place_in` finds it.
        coming: the values of all timesteps.
    """

    tensors: tuple[Seen, ...]
    place: int | None
    coming: list[float]

    def precedes(self, place: int | None, *tensors: torch.Tensor) -> bool:
        """Whether this was an earlier step of the same image, whose prompt and timesteps have not changed.

        Not every write is counted: not those of a CUDA graph, a collective, or through `.data`. So values are compared
        in the first step of each image, after which nobody should write to them in such a way.
        """
        if self.place is None or place is None or place <= self.place:
            return False
        return all(seen.still(x) for seen, x in zip(self.tensors, tensors, strict=True))


@dataclass
class Known:
    """The rows of some timesteps.

    Attributes:
        prompt: copies of the inputs that stay the same for an image.
        timesteps: the timesteps.
        values: [images, timesteps, width].
        call: the last call with this prompt.
    """

    prompt: dict[str, torch.Tensor]
    timesteps: list[float]
    values: torch.Tensor
    call: Call

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
        tensors = *(inputs[name] for name in self.prompt), timesteps
        place = place_in(inputs[self.timestep], timesteps)
        found = next((known for known in self._known if known.call.precedes(place, *tensors)), None)
        if found:
            coming = found.call.coming
            timestep = coming[place]
        else:  # an image's first step waits for two transfers from a GPU; later steps use what they brought
            timestep, found = self._compared(inputs)
            coming = timesteps.tolist()
        if timestep is None:
            return None
        call = Call(tuple(map(Seen.now, tensors)), place, coming)
        if found is None or timestep not in found.timesteps:
            count = self._count(inputs)
            if timestep not in coming or count < 2:
                return None
            others = [known for known in self._known if known is not found]
            found = self._computed(inputs, timesteps, count, call, coming.index(timestep))
            self._known = [found, *others][:KEPT]
        found.call = call
        return found.at(timestep)

    def _compared(self, inputs: Inputs) -> tuple[float | None, Known | None]:
        """The timestep, None if there are several, and what is known of this prompt."""
        candidates = [known for known in self._known if known.fit(inputs)]
        answers = torch.cat([inputs[self.timestep], *(known.like(inputs)[None] for known in candidates)]).tolist()
        images = len(inputs[self.timestep])
        timestep, *others = set(answers[:images])
        found = next((known for known, like in zip(candidates, answers[images:], strict=True) if like), None)
        return (None if others else timestep), found

    def _count(self, inputs: Inputs) -> int:
        images = len(inputs[self.timestep])
        if self._ranks is None:  # with CFG parallelism, each rank computes only the rows of its images
            self._ranks = images // len(self.compute(inputs))
        return steps_at_once(images // self._ranks)

    def _computed(self, inputs: Inputs, timesteps: torch.Tensor, count: int, call: Call, start: int) -> Known:
        """The rows of `count` timesteps from `start` on, from their values on the device: the step does not wait."""
        images, some = inputs[self.timestep], timesteps[start : start + count]
        # Always the same number of rows, so that the GEMM adds up in the same order on every rank and in every call.
        padded = torch.cat([some, some[-1:].expand(count - len(some))]).to(images)
        rows = {name: inputs[name].repeat_interleave(count, 0) for name in self.prompt}
        rows[self.timestep] = padded.repeat(len(images))
        values = self.compute(rows).unflatten(0, (-1, count))
        prompt = {name: inputs[name].clone() for name in self.prompt}
        return Known(prompt, call.coming[start : start + count], values, call)
