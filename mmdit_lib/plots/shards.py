"""Which rank holds which part of which weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.patches import Patch, Rectangle

from ..architecture import ModelConfig
from ..config import Layout, TpLayout
from ..models import architecture_of
from .figure import Figure
from .figure import colours as rank_colours


def shard_map(model: ModelConfig, tp_size: int, *, tp_layout: TpLayout = "megatron", block: int = 0) -> Figure:
    """Which rank holds which part of each weight matrix of one block. A matrix that every rank holds is striped.

    Outputs (rows of the matrix) run downwards, inputs to the right; each side is drawn as the square root of its
    length.
    """
    model.check_layout(Layout(tp_size=tp_size, tp_layout=tp_layout))
    sharding = architecture_of(model).shardings[tp_layout]
    rows = _matrices(model, block)
    colours = rank_colours(tp_size)
    figure = Figure(figsize=(12.5, 7.6), layout="constrained")
    axes = figure.subplots()
    top = widest = 0.0
    for matrices in rows:
        left = 0.0
        for label, (name, shape) in matrices.items():
            height, width = (np.sqrt(n / model.hidden_size) for n in shape)
            style = sharding.rule_for(name.removesuffix(".weight")).style
            text = f"{label}\n{style}\n{shape[0]} x {shape[1]}"
            axes.text(left, top + 0.42, text, fontsize=8.5, va="bottom", linespacing=1.25)
            _matrix(axes, (left, top + 0.5), (width, height), sharding.shard_dim(name), colours)
            left += max(width, 1.0) + 0.62
        widest = max(widest, left)
        top += 0.75 + max(np.sqrt(shape[0] / model.hidden_size) for _, shape in matrices.values())
    axes.set_xlim(-0.02, widest - 0.3)
    axes.set_ylim(top, -0.1)
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.legend(
        handles=[Patch(color=colour, label=f"rank {rank}") for rank, colour in enumerate(colours)],
        loc="outside lower left", ncols=min(tp_size, 8), frameon=False,
    )  # fmt: skip
    figure.suptitle(
        f"Weights of block {block} over {tp_size} tensor-parallel ranks, layout {tp_layout}", x=0.01, ha="left"
    )
    return figure


def _matrices(model: ModelConfig, block: int) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """{label: (checkpoint name, full shape)} of one block: projections in, projections out, MLPs, modulation."""
    architecture = architecture_of(model)
    start = f"{architecture.blocks}.{block}."
    rows: list[dict] = [{}, {}, {}]
    for name, shape in architecture.parameters(model).items():
        if name.startswith(start) and name.endswith(".weight") and len(shape) == 2:
            label = name.removeprefix(start).removesuffix(".weight")
            row = 2 if label.startswith(("ff", "norm")) else 1 if label.startswith("attn2") or "_out" in label else 0
            rows[row][label] = (name, shape)
    return rows


def _matrix(axes, corner, size, dim: int | None, colours: Sequence[str]) -> None:
    (x, y), (width, height), ranks = corner, size, len(colours)
    stripes = 1 if dim is not None else max(1, 8 // ranks)
    parts = ranks * stripes
    for i in range(parts):
        if dim == 0:
            box = (x, y + height * i / parts), width, height / parts
        else:
            box = (x + width * i / parts, y), width / parts, height
        solid = dict(facecolor=colours[i % ranks], edgecolor="white", linewidth=1.0)
        whole = dict(facecolor=colours[i % ranks], alpha=0.35, linewidth=0)
        axes.add_patch(Rectangle(*box, **(whole if dim is None else solid)))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="#444444", linewidth=0.9))
