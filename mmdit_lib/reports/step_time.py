"""A model of the time of one step: compute + bytes / bandwidth + collectives x latency, for every layout.

Measured inputs: a step on one GPU with the times of its kernels, and the bandwidth and latency of a link. Counted from
the graph: bytes, collectives and memory. `notebooks/07-combining.ipynb` compares predictions with measured steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ..architecture import ModelConfig
from ..config import TORCH_DTYPES, BuildConfig, Dtype, Layout, Resolution, Sizes
from ..engine.dry_graph import dry_graph
from ..engine.graph import Graph
from ..engine.inputs import check_build
from ..models import architecture_of
from .memory import Memory, memory_of
from .traffic import Collective, collectives_of

ATTENTION, NORM, HEADS, GEMM = "attention", "norm, modulation, gate", "heads", "GEMM"
"""Kinds of kernels in `benchmarks/results`. Every tp rank runs NORM on all of its tokens."""


@dataclass(frozen=True)
class Link:
    """What connects the GPUs of a group.

    Attributes:
        bandwidth: GB/s that a rank sends while it receives as much.
        latency: microseconds that a collective takes beyond that.
        direct: whether GPUs access each other's memory over it. A kernel then does its own work during the transfer.
    """

    name: str
    bandwidth: float
    latency: float
    direct: bool = False


@dataclass(frozen=True)
class OneGPU:
    """A step as measured on one GPU.

    Attributes:
        ms: of the step.
        kernels: its time by kind of kernel, in any unit: only the proportions count.
        memory_bandwidth: GB/s with which the GPU reads weights that multiply a few rows only; n times that if it reads
            them once for n steps (`engine/ahead.py`).
        loss: by how much half of the work takes longer than half of the time, as a fraction: fitted for each model.
    """

    ms: float
    kernels: Mapping[str, float]
    sizes: Sizes
    memory_bandwidth: float
    loss: float = 0.0

    def of(self, kind: str) -> float:
        """Milliseconds of one kind."""
        return self.ms * self.kernels.get(kind, 0.0) / sum(self.kernels.values())

    def scaled(self, ms: float, share: float) -> float:
        """Time of `share` of the work that takes `ms`. Each halving costs `loss`; more work is proportional."""
        return ms * share * (1 + self.loss) ** max(0.0, -math.log2(share))


@dataclass(frozen=True)
class StepTime:
    """One rank's step, in milliseconds. `ms` is the sum, less what is hidden."""

    divided: float
    """Work that the ranks share."""
    replicated: float
    """Work that every rank does in full."""
    transfer: float
    """Bytes / bandwidth."""
    hidden: float
    """Work done during the transfer, by the kernel that transfers."""
    latency: float
    collectives: int
    megabytes: float
    """Sent, as by `Collective.sent`."""
    case: tuple[ModelConfig, Layout, Sizes, Dtype]

    @property
    def memory(self) -> Memory:
        return rank_memory(*self.case)

    @property
    def ms(self) -> float:
        return self.divided + self.replicated + self.transfer - self.hidden + self.latency

    @property
    def sequential(self) -> float:
        """Milliseconds if no work were done during the transfer."""
        return self.ms + self.hidden

    @property
    def gigabytes(self) -> float:
        return self.memory.total / 1e9


def _build(model: ModelConfig, layout: Layout, sizes: Sizes) -> BuildConfig:
    if sizes.batch % layout.cfg_size:
        raise ValueError(f"batch {sizes.batch} is not divisible by cfg_size={layout.cfg_size}: guidance uses two rows")
    build = BuildConfig.one_size(Resolution(height=sizes.height, width=sizes.width), sizes.batch, sizes.text_tokens)
    check_build(model, build, layout)
    return build


@lru_cache(maxsize=32)
def _graph(model: ModelConfig, layout: Layout, build: BuildConfig, dtype: Dtype) -> Graph:
    return dry_graph(model, layout.at(0), build, dtype)


@lru_cache(maxsize=512)
def rank_collectives(model: ModelConfig, layout: Layout, sizes: Sizes, dtype: Dtype) -> Counter[Collective]:
    """How often each collective of rank 0 runs in a step. Raises `ValueError` if the layout is not legal."""
    build = _build(model, layout, sizes)
    if layout.world_size == 1:
        return Counter()
    return collectives_of(_graph(model, layout, build, dtype), model, layout, dtype, sizes, build)


@lru_cache(maxsize=512)
def rank_memory(model: ModelConfig, layout: Layout, sizes: Sizes, dtype: Dtype) -> Memory:
    """Memory of rank 0. Raises `ValueError` if the layout is not legal."""
    build = _build(model, layout, sizes)
    graph = _graph(model, layout, build, dtype)
    return memory_of(graph, architecture_of(model), model, layout, dtype, sizes, build)


def predict(
    model: ModelConfig,
    layout: Layout,
    one: OneGPU,
    link: Link,
    *,
    sizes: Sizes | None = None,
    dtype: Dtype = "bfloat16",
    network: Link | None = None,
    ranks_per_machine: int | None = None,
) -> StepTime:
    """Predict one step.

    Args:
        one: the same model's step on one GPU.
        sizes: by default those of `one`; otherwise its kernels' times are scaled by tokens and pairs of tokens.
        link: between GPUs of one machine.
        network: between machines of `ranks_per_machine` ranks each; a group that spans two uses it for everything.

    Raises:
        ValueError: if the model does not support the layout or the sizes, in the words of `build`.
    """
    sizes = sizes or one.sizes
    found = rank_collectives(model, layout, sizes, dtype)

    def via(group: tuple[int, ...]) -> Link:
        return network if network and len({rank // ranks_per_machine for rank in group}) > 1 else link

    transfers = Counter()
    for collective, times in found.items():
        transfers[collective.group] += times * collective.sent / 1e6 / via(collective.group).bandwidth
    work = work_of(model, layout, one, sizes)
    conditioning = conditioning_bytes(model, dtype) / 1e6 / one.memory_bandwidth
    norm = work.pop(NORM)
    divided = sum(work.values()) + (0 if layout.tp_size > 1 else norm)
    here = layout.at(0)
    carriers = {here.tp_group: norm if layout.tp_size == 2 else 0.0} if layout.tp_size > 1 else {}
    carriers |= {here.cp_group: work[HEADS]} if layout.cp_size > 1 else {}
    return StepTime(
        divided=divided,
        replicated=conditioning + (norm if layout.tp_size > 1 else 0),
        transfer=sum(transfers.values()),
        hidden=sum(min(ms, transfers[group]) for group, ms in carriers.items() if via(group).direct),
        latency=sum(times * via(collective.group).latency / 1e3 for collective, times in found.items()),
        collectives=found.total(),
        megabytes=sum(times * collective.sent for collective, times in found.items()) / 1e6,
        case=(model, layout, sizes, dtype),
    )


def work_of(model: ModelConfig, layout: Layout, one: OneGPU, sizes: Sizes) -> dict[str, float]:
    """Milliseconds of a rank's kernels by kind, without the conditioning's GEMMs."""
    tokens = sizes.batch * sum(tokens_of(model, sizes)) / (one.sizes.batch * sum(tokens_of(model, one.sizes)))
    pairs = sizes.batch * pairs_of(model, sizes) / (one.sizes.batch * pairs_of(model, one.sizes))
    work = {}
    for kind in one.kernels:
        ms = one.of(kind)
        if kind == GEMM:
            ms -= conditioning_bytes(model, "bfloat16") / 1e6 / one.memory_bandwidth
        ranks = layout.world_size // (layout.tp_size if kind == NORM else 1)
        work[kind] = one.scaled(ms, (pairs if kind == ATTENTION else tokens) / ranks)
    return work


def tokens_of(model: ModelConfig, sizes: Sizes) -> tuple[int, int]:
    """Image tokens and text tokens of one row of the batch."""
    step = model.pixel_step(architecture_of(model).vae_scale_factor)
    return sizes.height // step * (sizes.width // step), sizes.text_tokens


def pairs_of(model: ModelConfig, sizes: Sizes) -> int:
    """Pairs of tokens in all attentions of one row: joint attention, and the image's second attention."""
    image, text = tokens_of(model, sizes)
    return model.num_layers * (image + text) ** 2 + len(model.dual_attention_layers) * image**2


def conditioning_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """Weights of the blocks' matrices that no tp rank shards: they multiply the conditioning vector, one row per image.

    Every rank reads all of them in every layout, since splitting tokens or the batch does not shorten that: in each
    step or, where a pipeline knows its timesteps, once for several.
    """
    architecture = architecture_of(model)
    whole = [
        math.prod(shape)
        for name, shape in architecture.parameters(model).items()
        if name.startswith(architecture.blocks) and len(shape) == 2
        and architecture.shardings["megatron"].rule_for(name.removesuffix(".weight")).style == "replicated"
    ]  # fmt: skip
    return sum(whole) * TORCH_DTYPES[dtype].itemsize
