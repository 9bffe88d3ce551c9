"""The graph of any model in any layout, without weights, for counting traffic and planning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..architecture import Architecture, ModelConfig
from ..config import TORCH_DTYPES, BuildConfig, Dtype, Layout, RankMapping
from ..models import architecture_of
from ..network.trt import trt
from .build import check_collectives, define
from .graph import Graph
from .inputs import check_build
from .logger import logger
from .read_network import read_network


@dataclass(frozen=True)
class NoWeights:
    """Replaces a checkpoint. All tensors share one buffer that is never written, so it takes no physical memory."""

    model: ModelConfig
    dtype: Dtype
    layout: Layout

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.model)

    def weights(self, tp_rank: int) -> dict[str, torch.Tensor]:
        shapes = self.architecture.local_parameters(self.model, self.layout)
        buffer = torch.empty(max(map(math.prod, shapes.values())), dtype=TORCH_DTYPES[self.dtype])
        return {name: buffer[: math.prod(shape)].view(shape) for name, shape in shapes.items()}


def dry_graph(model: ModelConfig, mapping: RankMapping, config: BuildConfig, dtype: Dtype = "bfloat16") -> Graph:
    """The graph that `build` would write for `mapping.rank`. Raises `ValueError` as `build` does."""
    check_build(model, config, mapping.layout)
    check_collectives(mapping.layout)
    builder = trt.Builder(logger())
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network = define(definition, NoWeights(model, dtype, mapping.layout), mapping, config)
    return read_network(definition, network.module_outputs())
