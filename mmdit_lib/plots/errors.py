"""Errors of all modules by depth in the network."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from .figure import GREY, Figure, colours, new_axes


def error_by_depth(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Relative error of every value against the module's place in the order of execution, on a logarithmic axis.

    Args:
        tables: results of `compare_layers`, by label (for instance a dtype). An error of exactly 0 is drawn at
            the bottom of the axis. A cross marks a value that is not ok.
    """
    figure, axes = new_axes(9, 4.5)
    floor = _floor(tables)
    for colour, (label, table) in zip(colours(len(tables)), tables.items(), strict=True):
        known = table[table.relative_error.notna() & np.isfinite(table.relative_error)]
        errors = known.relative_error.clip(lower=floor)
        fine = known.status == "ok"
        axes.scatter(known.depth[fine], errors[fine], s=12, color=colour, alpha=0.35, linewidths=0)
        axes.scatter(known.depth[~fine], errors[~fine], s=40, color=colour, marker="x")
        worst = errors.groupby(known.depth).max().rolling(9, min_periods=1).max()
        axes.plot(worst.index, worst, color=colour, linewidth=1.8, label=label)
        axes.axhline(known.tolerance.max(), color=colour, linestyle=":", linewidth=1.2)
        _label_line(axes, "tolerance", known.tolerance.max(), colour)
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor / 2)
    if any((table.relative_error == 0).any() for table in tables.values()):
        _label_line(axes, "exactly 0", floor, GREY)
    axes.set_ylabel("relative error")
    axes.set_title("Error of each module against diffusers", loc="left")
    mark_blocks(axes, next(iter(tables.values())))
    axes.legend(frameon=False, loc="upper left", ncols=len(tables), bbox_to_anchor=(0, -0.16), borderaxespad=0)
    return figure


def _label_line(axes, text: str, height: float, colour: str) -> None:
    """A short label outside the right end, where it hides no data."""
    axes.annotate(text, (1.005, height), xycoords=("axes fraction", "data"), annotation_clip=False,
                  ha="left", va="center", fontsize=8, color=colour)  # fmt: skip


def _floor(tables: Mapping[str, pd.DataFrame]) -> float:
    errors = pd.concat([table.relative_error for table in tables.values()])
    above = errors[(errors > 0) & np.isfinite(errors)]
    return above.min() / 3 if len(above) else 1e-9


def mark_blocks(axes, table: pd.DataFrame) -> None:
    """A line at the end of each transformer block, and its number (for deep models, only every few)."""
    blocks = table[table.module.str.fullmatch(r"\w+\.\d+")]
    ends = blocks.groupby("module", sort=False).depth.first()
    inside = table[table.module.str.match(r"\w+\.\d+\b")]
    begin = inside.depth.min() - 0.5
    edges = np.array([begin, *(ends + 0.5)])
    for edge in edges:
        axes.axvline(edge, color="#dddddd", linewidth=0.8, zorder=0)
    every = -(-len(ends) // 14)
    centres = (edges[:-1] + edges[1:]) / 2
    axes.set_xticks(centres[::every], [name.rpartition(".")[2] for name in ends.index[::every]])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("transformer block, its modules in order of execution")
    axes.set_xlim(-1, table.depth.max() + 1)
