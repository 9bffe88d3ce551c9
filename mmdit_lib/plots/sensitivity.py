"""What rounding each layer costs, beside the work that it would save."""

from __future__ import annotations

import pandas as pd

from .figure import COLOURS, Figure, new_axes

NAMED = 4
"""How many layers are labeled: those whose error is largest."""


def error_and_work(table: pd.DataFrame) -> Figure:
    """A point for each layer: the error of the network's output if only this layer is rounded, over its share of the
    FLOP; both logarithmic.

    Args:
        table: by layer, `error`, `work` (a share), and whether it is `kept`, that is, not rounded in a checkpoint.
            Layers without error are left out.
    """
    figure, axes = new_axes(9, 4.2)
    shown = table[table.error > 0]
    for kept, colour, label in ((False, COLOURS[0], "rounded to FP8"), (True, COLOURS[1], "kept in full precision")):
        part = shown[shown.kept == kept]
        axes.scatter(part.work, part.error, s=22, color=colour, alpha=0.75, linewidths=0, label=label)
    for name, row in shown.nlargest(NAMED, "error").iterrows():
        short = name.removeprefix("transformer_blocks.")
        axes.annotate(short, (row.work, row.error), (6, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("share of the linear layers' FLOP")
    axes.set_ylabel("relative error of the output")
    axes.set_title("Each linear layer rounded alone", loc="left")
    axes.legend(frameon=False, loc="upper left", ncols=2, bbox_to_anchor=(0, -0.17), borderaxespad=0)
    return figure
