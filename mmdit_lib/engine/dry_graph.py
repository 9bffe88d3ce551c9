"""The graph of any model in any layout, without weights, for counting traffic and planning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..architecture import Architecture, ModelConfig
from ..checkpoint.quantization import NONE, SCALES, Quantization, stored_tensors
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
    quantization: Quantization = NONE

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.model)

    def weights(self, tp_rank: int) -> dict[str, torch.Tensor]:
        stored = stored_tensors(self.architecture, self.model, self.layout, self.dtype, self.quantization)
        buffer = torch.empty(max(math.prod(x.shape) for x in stored.values()), dtype=TORCH_DTYPES[self.dtype])
        weights = {}
        for name, (dtype, shape) in stored.items():
            if name.endswith(SCALES):  # its value decides which layers share a rounded input
                weights[name] = torch.ones(shape)
            else:
                weights[name] = buffer.view(TORCH_DTYPES[dtype])[: math.prod(shape)].view(shape)
        return weights


def dry_graph(
    model: ModelConfig,
    mapping: RankMapping,
    config: BuildConfig,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = NONE,
) -> Graph:
    """The graph that `build` would write for `mapping.rank`. Raises `ValueError` as `build` does."""
    check_build(model, config, mapping.layout)
    check_collectives(mapping.layout)
    builder = trt.Builder(logger())
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network = define(definition, NoWeights(model, dtype, mapping.layout, quantization), mapping, config)
    return read_network(definition, network.module_outputs())
