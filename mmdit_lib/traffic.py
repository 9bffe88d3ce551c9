"""The bytes that collectives move per step, counted from the network's graph. No weights and no GPU are needed.

The graph runs on `meta` tensors, which have shapes and no data; each collective is noted as it is met.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

from .config import KNOWN_MODELS, CpMethod, Dtype, Mapping, ModelConfig, Resolution, TpLayout
from .engine.build import inputs_of, profile_shapes
from .engine.dry_graph import NoWeights, dry_graph, one_size
from .engine.graph import Graph
from .engine.lowering import lower
from .engine.torch_ops import DTYPES, dist_collective


@dataclass(frozen=True)
class Collective:
    """One collective of one rank.

    Attributes:
        group: its ranks.
        nbytes: of the tensor that a rank gives.
    """

    operation: str
    group: tuple[int, ...]
    nbytes: int

    @property
    def sent(self) -> int:
        """The bytes that leave a rank, at least: what a ring sends, and as much comes in."""
        n = len(self.group)
        share = {"ALL_REDUCE": 2 * (n - 1) / n, "ALL_GATHER": n - 1, "ALL_TO_ALL": (n - 1) / n}
        return round(self.nbytes * share[self.operation])


@dataclass(frozen=True)
class Layout:
    """A way to run a model on several ranks."""

    mapping: Mapping
    cp_method: CpMethod = "allgather"
    tp_layout: TpLayout = "megatron"

    def possible(self, model: ModelConfig) -> bool:
        try:
            self.mapping.check(model, tp_layout=self.tp_layout, cp_method=self.cp_method)
        except ValueError:
            return False
        return True


TWO_RANKS = {
    "cfg 2": Layout(Mapping(cfg_size=2)),
    "cp 2 allgather": Layout(Mapping(cp_size=2)),
    "cp 2 ulysses": Layout(Mapping(cp_size=2), cp_method="ulysses"),
    "tp 2 megatron": Layout(Mapping(tp_size=2)),
    "tp 2 trtllm": Layout(Mapping(tp_size=2), tp_layout="trtllm"),
}
"""What two GPUs can do; the last is how TensorRT-LLM cuts the weights."""


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
        ValueError: where the layout cannot hold the model.
    """
    config = one_size(resolution, batch, text_tokens, cp_method=layout.cp_method)
    graph = dry_graph(model, layout.mapping, config, dtype, layout.tp_layout)
    shapes = {name: low for name, (low, _, high) in profile_shapes(model, config, layout.mapping.cfg_size).items()}
    shapes = {name: (batch, *shape[1:]) for name, shape in shapes.items()}
    weights = NoWeights(model, dtype, layout.tp_layout, layout.mapping.tp_size).weights(0)
    weights = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in weights.items()}
    inputs = [
        torch.empty(shapes[name], dtype=DTYPES[kind], device="meta")
        for name, (kind, _) in inputs_of(model, dtype).items()
    ]
    counter = Recorder(lower(graph, weights, device="meta", groups=group_names(graph)))
    counter.run(*inputs)
    return counter.found


def group_names(graph: Graph) -> dict[tuple[int, ...], str]:
    groups = {tuple(x.attributes["group"]) for x in graph.layers if x.type == "DIST_COLLECTIVE"}
    return {group: json.dumps(group) for group in groups}


class Recorder(fx.Interpreter):
    """Runs a lowered graph by its shapes alone."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.found: Counter[Collective] = Counter()

    def call_function(self, target, args, kwargs):
        if target is not dist_collective:
            return super().call_function(target, args, kwargs)
        (x,), operation = args, kwargs["operation"]
        self.found[Collective(operation, tuple(json.loads(kwargs["group"])), x.nbytes)] += 1
        rows = x.shape[0] * (kwargs["size"] if operation == "ALL_GATHER" else 1)
        return x.new_empty(rows, *x.shape[1:])


def traffic_table(name: str, *, resolution: Resolution, text_tokens: int, batch: int, dtype: Dtype) -> Table:
    """One row for each kind of collective of each layout of a published model."""
    title = f"{name}: collectives of one step and one rank"
    table = Table("layout", "collective", "times", "MB given", "MB sent", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    model = KNOWN_MODELS[name]
    for label, layout in TWO_RANKS.items():
        if not layout.possible(model):
            continue
        found = count_traffic(model, layout, resolution=resolution, text_tokens=text_tokens, batch=batch, dtype=dtype)
        for operation, times, given, sent in summary(found):
            table.add_row(label, operation, str(times), given, f"{sent / 1e6:.1f}")
            label = ""
        total = sum(c.sent * times for c, times in found.items())
        table.add_row("", "all", str(found.total()), "", f"{total / 1e6:.1f}", style="bold", end_section=True)
    return table


def summary(found: Counter[Collective]) -> list[tuple[str, int, str, int]]:
    """Per operation: its name, how often, the sizes that a rank gives in MB, the bytes that it sends in all."""
    rows = []
    for operation in sorted({c.operation for c in found}):
        these = {c: times for c, times in found.items() if c.operation == operation}
        sizes = sorted(c.nbytes / 1e6 for c in these)
        given = f"{sizes[0]:.3g}" if len(sizes) == 1 else f"{sizes[0]:.3g} to {sizes[-1]:.3g}"
        sent = sum(c.sent * times for c, times in these.items())
        rows.append((operation.lower().replace("_", "-"), sum(these.values()), given, sent))
    return rows


def print_traffic(
    *, resolution: Resolution | None = None, text_tokens: int = 333, batch: int = 2, dtype: Dtype = "bfloat16"
) -> None:
    """Print a `traffic_table` per published model, each as soon as it is counted; 1024x1024 if not told otherwise.

    Raises:
        ValueError: before anything is printed, where a size fits no model or the batch cannot be halved.
    """
    console, size = Console(), resolution or Resolution(height=1024, width=1024)
    if batch < 2 or batch % 2:
        raise ValueError(f"--batch {batch} must be 2, 4 or another even number: the layout cfg 2 halves the batch")
    if text_tokens < 1:
        raise ValueError(f"--text_tokens {text_tokens} must be 1 or more")
    for model in KNOWN_MODELS.values():
        one_size(size, batch, text_tokens).check(model, Mapping())
    console.print(f"{size}, batch {batch}, {text_tokens} text tokens, {dtype}; counting takes some seconds a layout")
    for name in KNOWN_MODELS:
        console.print(traffic_table(name, resolution=size, text_tokens=text_tokens, batch=batch, dtype=dtype))
    console.print(
        "MB given: each rank's tensor, smallest to largest. MB sent: what leaves each rank in a step, by a ring.\n"
        "TensorRT-LLM (<= 1.2.1), cut as tp 2 trtllm: 49 to 77 all-reduces and 120 to 190 all-gathers a step."
    )
