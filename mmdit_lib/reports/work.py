"""FLOP and bytes of one denoising step, counted from the network's graph, without weights or a GPU.

The graph, fused as for a GPU, runs on `meta` tensors, which have shapes but no data. Bytes are the least that each
operator must move: every input read once and every output written once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..architecture import ModelConfig
from ..config import BuildConfig, Dtype, Layout, Resolution, Sizes
from ..engine import kernels, torch_ops
from ..engine.dry_graph import dry_graph
from ..engine.graph import Graph
from ..engine.pytorch_backend import GPU_PASSES
from ..engine.rehearsal import meta_weights
from ..engine.torch_ops import item
from ..models import architecture_of
from .on_shapes import OnShapes, inputs_on_meta, tensors, viewed

GEMMS = (torch_ops.linear, torch_ops.linear_gelu)
NORMS = (kernels.norm_modulate, kernels.gated_norm, kernels.gated_sum)

ELEMENTWISE_FLOP = 10
"""Per element of an operator that is no matrix product: a rough count. The time of these depends on the bytes."""


@dataclass(frozen=True)
class Work:
    flop: float = 0
    nbytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.nbytes + other.nbytes)

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flop / self.nbytes

    def least_ms(self, flops: float, bandwidth: float) -> float:
        """The roofline's lower bound for a device with this many FLOP/s and bytes/s."""
        return 1000 * max(self.flop / flops, self.nbytes / bandwidth)


def count_work(
    model: ModelConfig, *, resolution: Resolution, text_tokens: int, batch: int, dtype: Dtype = "bfloat16"
) -> dict[str, Work]:
    """The work of one step on one GPU by part, a finer division than the kinds of `benchmarks/single_gpu.py`.

    `attention`; the linear layers `GEMM, image`, `GEMM, text` and `GEMM, conditioning` (modulation and embeddings of
    the time and the pooled text); `norm, modulation, gate`; `heads` (the norms of queries and keys); `other`. A
    multiplication and an addition are two FLOP; for operators that are no matrix products, `ELEMENTWISE_FLOP` per
    element.
    """
    config, mapping = BuildConfig.one_size(resolution, batch, text_tokens), Layout().at(0)
    graph = dry_graph(model, mapping, config, dtype)
    counter = Counter(graph, meta_weights(architecture_of(model), model, mapping.layout, dtype), text_tokens)
    counter.run(*inputs_on_meta(model, dtype, Sizes(batch, resolution.height, resolution.width, text_tokens), config))
    return dict(counter.found)


class Counter(OnShapes):
    """Adds up the work of a graph that runs on shapes alone, by part."""

    def __init__(self, graph: Graph, weights: Mapping[str, torch.Tensor], text_tokens: int):
        super().__init__(graph, weights, passes=GPU_PASSES)
        self.text_tokens = text_tokens
        self.found: defaultdict[str, Work] = defaultdict(Work)

    def call_function(self, target, args, kwargs) -> Any:
        if target is kernels.projected_attention:
            return self._attention(args, **kwargs)
        result = super().call_function(target, args, kwargs)
        made = tensors(result)
        if not made or target is item or viewed(made[0], args) is not None:
            return result
        moved = sum(x.nbytes for x in (*args, *made) if isinstance(x, torch.Tensor))
        if target in GEMMS:
            stream = (
                "conditioning" if args[0].dim() == 2 else "text" if args[0].shape[1] == self.text_tokens else "image"
            )
            self.found[f"GEMM, {stream}"] += Work(2 * result.numel() * args[0].shape[-1], moved)
        else:
            kind = "norm, modulation, gate" if target in NORMS else "other"
            self.found[kind] += Work(ELEMENTWISE_FLOP * sum(x.numel() for x in made), moved)
        return result

    def _attention(self, args, *, inputs: int, heads: int, eps: float, scale: float) -> torch.Tensor:
        """The linear layers of each stream, norms of queries and keys in place, then attention itself."""
        streams = [args[i : i + inputs + 2] for i in range(0, len(args), inputs + 2)]
        merged = [self.call_function(torch_ops.linear, layer, {}) for *layer, _, _ in streams]
        if streams[0][-1] is not None:
            two_thirds = 2 * sum(x.numel() for x in merged) // 3
            self.found["heads"] += Work(ELEMENTWISE_FLOP * two_thirds, 2 * two_thirds * merged[0].itemsize)
        batch, tokens, width = len(merged[0]), sum(x.shape[1] for x in merged), merged[0].shape[-1] // 3
        result = merged[0].new_empty(tokens, batch, heads, width // heads).permute(1, 2, 0, 3)  # as on a GPU
        self.found["attention"] += Work(4 * result.numel() * tokens, 4 * result.nbytes)
        return result
