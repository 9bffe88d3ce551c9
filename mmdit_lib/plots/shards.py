"""Which rank holds which part of which weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.patches import Patch, Rectangle

from ..architecture import ModelConfig, Shapes
from ..config import Layout, TpLayout
from ..models import architecture_of
from .figure import GREY, Figure
from .figure import colours as rank_colours

WHOLE = dict(facecolor="#e4e4e4", edgecolor="#bbbbbb", hatch="//", linewidth=0)
"""What every rank holds in full."""
GAP = 0.3
"""Between two matrices, in hidden sizes."""


def shard_map(model: ModelConfig, tp_size: int, *, tp_layout: TpLayout = "megatron", block: int = 0) -> Figure:
    """Which rank holds which part of each weight matrix of one block, all to one scale.

    A matrix is drawn as in y = x W^T: its inputs run downwards, its outputs to the right, so that `colwise` cuts
    columns. Gray and hatched: every rank holds all of it.
    """
    model.check_layout(Layout(tp_size=tp_size, tp_layout=tp_layout))
    sharding, colours = architecture_of(model).shardings[tp_layout], rank_colours(tp_size)
    start = f"{architecture_of(model).blocks}.{block}."
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    top = widest = 0.0
    for matrices in _rows(_matrices(model, start)):
        left = 0.0
        for name, shape in matrices.items():
            width, height = (n / model.hidden_size for n in shape)
            _matrix(axes, (left, top), (width, height), sharding.shard_dim(name), colours)
            label, style = name.removeprefix(start).removesuffix(".weight"), sharding.rule_for(name[:-7]).style
            text = f"{label.replace('.', '.' if width > 1 else f'.{chr(10)}', 1)}\n{style}\n{shape[1]} to {shape[0]}"
            axes.text(left, top - 0.06, text, fontsize=8, va="bottom", linespacing=1.2)
            left += width + GAP
        widest = max(widest, left - GAP)
        top += max(shape[1] for shape in matrices.values()) / model.hidden_size + 1.15
    _name_axes(axes)
    axes.set_xlim(-0.75, widest + 0.05)
    axes.set_ylim(top - 1.1, -0.95)
    figure.set_size_inches(0.82 * (widest + 0.8), 0.82 * top + 0.75)
    axes.set_aspect("equal")
    axes.set_axis_off()
    legend = [Patch(color=colour, label=f"rank {rank}") for rank, colour in enumerate(colours)]
    figure.legend(
        handles=[*legend, Patch(**WHOLE, label="every rank")], loc="outside lower left", ncols=min(tp_size, 8) + 1,
        frameon=False,
    )  # fmt: skip
    shapes = _matrices(model, start)
    total, mine = (sum(map(math.prod, s.values())) / 1e6 for s in (shapes, sharding.local_shapes(shapes, tp_size)))
    figure.suptitle(
        f"Block {block}, layout {tp_layout}: {total:.1f} million weights in matrices, "
        f"{mine:.1f} million on each of {tp_size} ranks",
        x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _matrices(model: ModelConfig, start: str) -> Shapes:
    """{checkpoint name: full shape} of one block's matrices."""
    parameters = architecture_of(model).parameters(model)
    return {name: s for name, s in parameters.items() if name.startswith(start) and name.endswith("weight") and s[1:]}


def _rows(matrices: Shapes) -> list[Shapes]:
    """Attention, MLPs, modulation: the rows of the figure."""
    rows: list[dict] = [{}, {}, {}]
    for name, shape in matrices.items():
        rows[1 if ".ff" in name else 2 if ".norm" in name else 0][name] = shape
    return rows


def _matrix(axes, corner, size, dim: int | None, colours: Sequence[str]) -> None:
    (x, y), (width, height), ranks = corner, size, len(colours)
    if dim is None:
        axes.add_patch(Rectangle((x, y), width, height, **WHOLE))
    for i, colour in enumerate(colours if dim is not None else ()):
        columns = (x + width * i / ranks, y), width / ranks, height
        rows = (x, y + height * i / ranks), width, height / ranks
        axes.add_patch(Rectangle(*(columns if dim == 0 else rows), facecolor=colour, edgecolor="white"))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="#444444", linewidth=0.9))


def _name_axes(axes) -> None:
    """Beside the first matrix."""
    arrow = dict(arrowstyle="-|>", color=GREY)
    axes.annotate("", (-0.12, 1), (-0.12, 0), arrowprops=arrow)
    axes.text(-0.22, 0.5, "inputs", rotation=90, ha="right", va="center", fontsize=8.5, color=GREY)
    axes.annotate("", (1, 1.12), (0, 1.12), arrowprops=arrow)
    axes.text(0.5, 1.2, "outputs", ha="center", va="top", fontsize=8.5, color=GREY)
