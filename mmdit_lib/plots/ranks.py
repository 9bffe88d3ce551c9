"""Which rank does what in a layout."""

from __future__ import annotations

import numpy as np
from matplotlib.patches import Rectangle

from ..config import Layout
from .figure import COLOURS, Figure


def rank_grid(layout: Layout) -> Figure:
    """A square per rank: weights (tp) to the right, tokens (cp) downwards, a panel per pass of guidance (cfg).

    Ranks of one color are a tensor-parallel group.
    """
    numbers = np.arange(layout.world_size).reshape(layout.cfg_size, layout.cp_size, layout.tp_size)
    height = 1.1 + 0.75 * layout.cp_size
    figure = Figure(figsize=(1.2 + (0.6 + 1.3 * layout.tp_size) * layout.cfg_size, height), layout="constrained")
    labels = ("rows 1 to B/2 (unconditional)", "rows B/2 + 1 to B (conditional)") if layout.cfg_size > 1 else ("",)
    for axes, ranks, label in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers, labels, strict=True):
        for (cp, tp), rank in np.ndenumerate(ranks):
            colour = COLOURS[rank // layout.tp_size % len(COLOURS)]
            axes.add_patch(Rectangle((tp, cp), 1, 1, facecolor=colour, alpha=0.4, edgecolor="white", linewidth=3))
            axes.text(tp + 0.5, cp + 0.5, f"rank {rank}", ha="center", va="center")
        axes.set(xlim=(0, layout.tp_size), ylim=(layout.cp_size, 0))
        axes.set_xticks(np.arange(layout.tp_size) + 0.5, [f"tp {i}" for i in range(layout.tp_size)])
        axes.set_yticks(np.arange(layout.cp_size) + 0.5, [f"cp {i}" for i in range(layout.cp_size)])
        axes.set_title(label, fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure
