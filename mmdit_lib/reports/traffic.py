"""The bytes that collectives move per step, counted from the network's graph, without weights or a GPU.

The graph runs on `meta` tensors, which have shapes but no data; each collective is recorded as it is called.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table

from ..architecture import ModelConfig
from ..config import BuildConfig, Dtype, Layout, Resolution, Sizes
from ..engine.collectives import dist_collective, without_ranks
from ..engine.dry_graph import dry_graph
from ..engine.graph import Graph
from ..engine.inputs import check_build
from ..engine.rehearsal import meta_weights
from ..models import KNOWN_MODELS, architecture_of
from .on_shapes import OnShapes, inputs_on_meta


@dataclass(frozen=True)
class Collective:
    """One collective of one rank.

    Attributes:
        group: its ranks.
        nbytes: of each rank's input tensor.
    """

    operation: str
    group: tuple[int, ...]
    nbytes: int

    @property
    def sent(self) -> int:
        """The bytes that each rank sends, and receives, in a ring algorithm, which is the minimum."""
        n = len(self.group)
        share = {"ALL_REDUCE": 2 * (n - 1) / n, "ALL_GATHER": n - 1, "ALL_TO_ALL": (n - 1) / n}
        return round(self.nbytes * share[self.operation])


TWO_RANKS = {
    "cfg 2": Layout(cfg_size=2),
    "cp 2 allgather": Layout(cp_size=2),
    "cp 2 ulysses": Layout(cp_size=2, cp_method="ulysses"),
    "tp 2 megatron": Layout(tp_size=2),
    "tp 2 trtllm": Layout(tp_size=2, tp_layout="trtllm"),
}
"""Layouts for two GPUs; the last shards the weights as TensorRT-LLM does."""


def count_traffic(
    model: ModelConfig,
    layout: Layout,
    *,
    resolution: Resolution,
    text_tokens: int,
    batch: int,
    dtype: Dtype = "bfloat16",
) -> Counter[Collective]:
    """How often each collective runs in one step, on rank 0.

    Raises:
        ValueError: if the model does not support the layout or the sizes.
    """
    config = BuildConfig.one_size(resolution, batch, text_tokens)
    graph = dry_graph(model, layout.at(0), config, dtype)
    sizes = Sizes(batch, resolution.height, resolution.width, text_tokens)
    return collectives_of(graph, model, layout, dtype, sizes, config)


def collectives_of(
    graph: Graph, model: ModelConfig, layout: Layout, dtype: Dtype, sizes: Sizes, build: BuildConfig
) -> Counter[Collective]:
    """How often each collective of rank 0's graph runs in one step."""
    weights = meta_weights(architecture_of(model), model, layout, dtype)
    counter = Recorder(graph, weights, groups=group_names(graph))
    counter.run(*inputs_on_meta(model, dtype, sizes, build))
    return counter.found


def group_names(graph: Graph) -> dict[tuple[int, ...], str]:
    """A name for each group of the graph's collectives, from which `Recorder` reads its ranks."""
    groups = {tuple(x.attributes["group"]) for x in graph.layers if x.type == "DIST_COLLECTIVE"}
    return {group: json.dumps(group) for group in groups}


class Recorder(OnShapes):
    """Records the collectives of a graph that runs on shapes alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found: Counter[Collective] = Counter()

    def call_function(self, target, args, kwargs):
        if target is not dist_collective:
            return super().call_function(target, args, kwargs)
        self.found[Collective(kwargs["operation"], tuple(json.loads(kwargs["group"])), args[0].nbytes)] += 1
        return without_ranks(args[0], kwargs["operation"], kwargs["size"])


def bytes_sent(found: Counter[Collective]) -> int:
    """What each rank sends in all of them together."""
    return sum(collective.sent * times for collective, times in found.items())


def traffic_table(
    name: str, model: ModelConfig, *, resolution: Resolution, text_tokens: int, batch: int, dtype: Dtype
) -> Table:
    """One row for each kind of collective of each layout of a model, under its name."""
    title = f"{name}: collectives of one step and one rank"
    numbers = (Column(name, justify="right") for name in ("calls", "MB per rank", "MB sent"))
    table = Table("layout", "collective", *numbers, title=title)
    for label, layout in TWO_RANKS.items():
        if not possible(model, layout):
            continue
        found = count_traffic(model, layout, resolution=resolution, text_tokens=text_tokens, batch=batch, dtype=dtype)
        rows = summary(found)
        for operation, times, given, sent in rows:
            table.add_row(label, operation, str(times), given, f"{sent / 1e6:.1f}")
            label = ""
        total = sum(sent for *_, sent in rows)
        table.add_row("", "all", str(found.total()), "", f"{total / 1e6:.1f}", style="bold", end_section=True)
    return table


def possible(model: ModelConfig, layout: Layout) -> bool:
    try:
        model.check_layout(layout)
    except ValueError:
        return False
    return True


def summary(found: Counter[Collective]) -> list[tuple[str, int, str, int]]:
    """Per operation: name, number of calls, sizes of a rank's input in MB, total bytes that a rank sends."""
    rows = []
    for operation in sorted({c.operation for c in found}):
        these = Counter({c: times for c, times in found.items() if c.operation == operation})
        sizes = sorted(c.nbytes / 1e6 for c in these)
        given = f"{sizes[0]:.3g}" if len(sizes) == 1 else f"{sizes[0]:.3g} to {sizes[-1]:.3g}"
        rows.append((operation.lower().replace("_", "-"), these.total(), given, bytes_sent(these)))
    return rows


def print_traffic(
    *, resolution: Resolution | None = None, text_tokens: int = 333, batch: int = 2, dtype: Dtype = "bfloat16"
) -> None:
    """Print a `traffic_table` per published model, each as soon as it is counted.

    Args:
        resolution: by default 1024x1024.

    Raises:
        ValueError: before anything is printed, if a model does not support a size or the batch is odd.
    """
    console, size = Console(), resolution or Resolution(height=1024, width=1024)
    if batch < 2 or batch % 2:
        raise ValueError(f"--batch {batch} must be a positive even number: the layout with cfg 2 halves the batch")
    if text_tokens < 1:
        raise ValueError(f"--text_tokens {text_tokens} must be 1 or more")
    for model in KNOWN_MODELS.values():
        check_build(model, BuildConfig.one_size(size, batch, text_tokens), Layout())
    console.print(f"{size}, batch {batch}, {text_tokens} text tokens, {dtype}; counting takes a few seconds per layout")
    names = defaultdict(list)  # models that differ only in their weights have the same traffic
    for name, model in KNOWN_MODELS.items():
        names[model].append(name)
    for model, of_model in names.items():
        title = " and ".join(of_model)
        console.print(traffic_table(title, model, resolution=size, text_tokens=text_tokens, batch=batch, dtype=dtype))
    console.print(
        "MB per rank: size of a rank's input, smallest to largest. MB sent: what each rank sends in a step (ring).\n"
        "TensorRT-LLM (<= 1.2.1), sharded as tp 2 trtllm: 49 to 77 all-reduces and 120 to 190 all-gathers a step."
    )
