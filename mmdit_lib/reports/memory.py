"""GPU memory that one rank of an engine needs in the `pytorch` backend, from its graph, without weights or a GPU.

The graph runs on `meta` tensors, which have shapes but no data; activations take as much memory as the
largest set of tensors that are alive at the same time.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ..architecture import Architecture, ModelConfig
from ..config import BuildConfig, Dtype, Layout, Sizes
from ..engine import kernels
from ..engine.ahead import last_early, steps_at_once
from ..engine.collectives import dist_collective, without_ranks
from ..engine.fp8_passes import FP8_ATTENTION, mean_added_activations
from ..engine.graph import Graph
from ..engine.pytorch_backend import GPU_PASSES
from ..engine.rank_kernels import gathered_attention, slot_bytes, ulysses_attention
from ..engine.rehearsal import meta_weights
from .on_shapes import OnShapes, address, inputs_on_meta, tensors
from .traffic import group_names


@dataclass(frozen=True)
class Memory:
    """In bytes."""

    weights: int
    activations: int
    """The peak beyond the weights, not counting what CUDA, cuBLAS and cuDNN reserve."""
    exchange: int
    """Symmetric memory: two slots through which the ranks of one machine exchange data."""
    ahead: int
    """What is computed for the coming steps, if a pipeline knows their timesteps (`engine/ahead.py`)."""

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.exchange + self.ahead


def memory_of(
    graph: Graph,
    architecture: Architecture,
    model: ModelConfig,
    layout: Layout,
    dtype: Dtype,
    sizes: Sizes,
    build: BuildConfig,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Memory:
    """Memory of rank 0 for one step at these sizes.

    The graph must be sound: it is lowered without the checks of `engine/rehearsal.py`. `weights` are without
    data; those of an unquantized checkpoint if not given. Activations are counted without the passes for FP8, which
    need slightly less; without a second stream for the text, for which queries, keys, values and results of an
    attention are kept longer; and as if attention in FP8 always had its kernel.
    """
    weights = weights or meta_weights(architecture, model, layout, dtype)
    peak = Peak(
        graph, weights, groups=group_names(graph), passes=FP8_ATTENTION + GPU_PASSES + (mean_added_activations,)
    )
    peak.last = last_early(peak.graph, architecture.conditioning)
    peak.run(*inputs_on_meta(model, dtype, sizes, build))
    return Memory(sum(weight.nbytes for weight in weights.values()), peak.nbytes, 2 * peak.slot, peak.ahead)


class Peak(OnShapes):
    """`nbytes` is the peak of the tensors that are alive while a graph runs on shapes alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.nbytes = self.slot = self.ahead = 0
        self.last: fx.Node | None = None
        self.constants = {address(buffer) for buffer in self.module.buffers()}
        self.held: dict[fx.Node, dict[int, int]] = {}
        """The sizes of the storages of a node's result, by their addresses."""

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if node is self.last and (steps := steps_at_once(len(value))) > 1:
            self.ahead = steps * value.nbytes
        made = ((address(x), x.untyped_storage().nbytes()) for x in tensors(value))
        self.held[node] = {place: nbytes for place, nbytes in made if place not in self.constants}
        storages = dict(ChainMap(*(self.held[x] for x in (*self.env, node))))
        result = value[0] if isinstance(value, tuple) else value
        # Attention copies queries, keys and values; with a single stream, the values stay where they are.
        copied = (3 if len(node.args) > 3 else 2) * result.nbytes if node.target is kernels.qkv_attention else 0
        # Projected inside the operator, they are there once.
        copied += 3 * result.nbytes if node.target is kernels.projected_attention else 0
        # Across ranks, keys and values are in the slot; of some heads, it holds everything until the copy.
        copied += value.nbytes if node.target in (gathered_attention, ulysses_attention) else 0
        self.nbytes = max(self.nbytes, sum(storages.values()) + copied)
        return value

    def call_function(self, target, args, kwargs):
        self.slot = max(self.slot, slot_bytes(target, args, kwargs))
        if target is dist_collective:
            return without_ranks(args[0], kwargs["operation"], kwargs["size"])
        return super().call_function(target, args, kwargs)
