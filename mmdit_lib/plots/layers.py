"""Times of a network's modules, block by block."""

from __future__ import annotations

import pandas as pd

from .figure import GREY, Figure, colours, new_axes


def time_by_block(groups: pd.DataFrame, *, title: str = "Time of each block per denoising step") -> Figure:
    """A stacked bar per transformer block, a color per module inside it, and one bar for everything else.

    Args:
        groups: result of `by_module`: columns block (-1 outside the blocks), part and ms.
    """
    inside, outside = groups[groups.block >= 0], groups[groups.block < 0]
    table = inside.pivot_table(index="block", columns="part", values="ms", aggfunc="sum", fill_value=0.0)
    table = table[table.sum().sort_values(ascending=False).index]
    shown = table.columns[:7]
    figure, axes = new_axes(9, 1.8 + 0.24 * (len(table) + 1))
    left = pd.Series(0.0, index=table.index)
    for part, colour in zip(shown, colours(len(shown)), strict=True):
        axes.barh([str(i) for i in table.index], table[part], left=left, color=colour, label=part, height=0.72)
        left += table[part]
    rest = table.drop(columns=shown).sum(axis=1)
    if len(table.columns) > len(shown):
        axes.barh([str(i) for i in table.index], rest, left=left, color="#cccccc", label="other modules", height=0.72)
    axes.barh(["outside"], [outside.ms.sum()], color=GREY, height=0.72)
    axes.invert_yaxis()
    axes.set_ylabel("block")
    axes.set_xlabel("ms")
    axes.set_title(f"{title}: {groups.ms.sum():.3g} ms in all", loc="left")
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0, fontsize=9)
    return figure
