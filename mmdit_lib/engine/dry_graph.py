"""The graph of any layout of any model, without its weights: to count, to plan, to carry elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..config import BuildConfig, Dtype, Mapping, ModelConfig, Resolution, TpLayout
from ..network.mmdit import MMDiT
from ..network.plan import local_shape
from ..network.trt import TORCH_DTYPES, trt
from .build import define
from .graph import Graph
from .logger import logger
from .read_network import read_network


@dataclass(frozen=True)
class NoWeights:
    """Stands for a checkpoint. All its tensors lie in one buffer that is never written, so never resident."""

    model: ModelConfig
    dtype: Dtype
    tp_layout: TpLayout
    tp_size: int

    def weights(self, tp_rank: int) -> dict[str, torch.Tensor]:
        parameters = MMDiT(self.model).named_parameters()
        shapes = {n: local_shape(n, shape, self.tp_layout, self.tp_size) for n, shape in parameters.items()}
        buffer = torch.empty(max(map(math.prod, shapes.values())), dtype=TORCH_DTYPES[self.dtype])
        return {name: buffer[: math.prod(shape)].view(shape) for name, shape in shapes.items()}


def dry_graph(
    model: ModelConfig,
    mapping: Mapping,
    config: BuildConfig,
    dtype: Dtype = "bfloat16",
    tp_layout: TpLayout = "megatron",
) -> Graph:
    """What `build` would write as the graph file of `mapping.rank`. Raises `ValueError` where it would."""
    config.check(model, mapping)
    mapping.check(model, tp_layout=tp_layout, cp_method=config.cp_method)
    builder = trt.Builder(logger())
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network = define(definition, NoWeights(model, dtype, tp_layout, mapping.tp_size), mapping, config)
    return read_network(definition, network.module_outputs())


def one_size(resolution: Resolution, batch: int, text_tokens: int, **options) -> BuildConfig:
    """A profile of a single size. Raises `ValueError` where there is none of this size."""
    ends = ("min", "opt", "max")
    sizes = {f"{end}_resolution": resolution for end in ends} | {f"{end}_text_tokens": text_tokens for end in ends}
    return BuildConfig.parse({"max_batch_size": batch} | sizes | options, "sizes")
