"""Tensor parallelism as data: which linear layer is sharded along which dimension.

Styles are named as in diffusers. `colwise` shards weight and bias along dim 0 (output features), `rowwise` shards
the weight along dim 1 (input features) and adds the full bias once, after the all-reduce;
`colwise_gather` is colwise with an all-gather of the output, as in TensorRT-LLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch

Style = Literal["colwise", "colwise_gather", "rowwise", "replicated"]


class Rule(NamedTuple):
    pattern: str
    style: Style
    reason: str


@dataclass(frozen=True)
class Sharding:
    """A model's tensor-parallel table.

    Attributes:
        name: 'megatron' or 'trtllm'.
        rules: the first rule whose pattern matches a module's path applies.
    """

    name: str
    rules: tuple[Rule, ...]

    def rule_for(self, module: str) -> Rule:
        """The rule for a module path, for instance 'transformer_blocks.0.ff.net.1'. Raises `ValueError` if none."""
        for rule in self.rules:
            if fnmatchcase(module, rule.pattern):
                return rule
        raise ValueError(f"no rule of the {self.name} sharding table covers '{module}'")

    def shard_dim(self, tensor: str) -> int | None:
        """The dimension along which a checkpoint tensor is sharded over the tp ranks; None if every rank holds it."""
        module, _, kind = tensor.rpartition(".")
        style = self.rule_for(module).style
        if style.startswith("colwise"):
            return 0 if kind in ("weight", "bias") else None  # a scale is the whole tensor's
        return 1 if style == "rowwise" and kind == "weight" else None

    def local_shape(self, tensor: str, shape: tuple[int, ...], tp_size: int) -> tuple[int, ...]:
        """The shape of one tp rank's part of a checkpoint tensor of full `shape`."""
        dim = self.shard_dim(tensor)
        return tuple(size // tp_size if i == dim else size for i, size in enumerate(shape))

    def local_shapes(self, shapes: dict[str, tuple[int, ...]], tp_size: int) -> dict[str, tuple[int, ...]]:
        """`local_shape` of every tensor."""
        return {name: self.local_shape(name, shape, tp_size) for name, shape in shapes.items()}

    def shard(self, name: str, tensor: torch.Tensor, tp_size: int, tp_rank: int) -> torch.Tensor:
        """One tp rank's part of the full tensor `name`, as a view."""
        dim = self.shard_dim(name)
        return tensor if dim is None else tensor.chunk(tp_size, dim)[tp_rank]


WHOLE = Sharding("replicated", (Rule("*", "replicated", "a single rank holds everything"),))
