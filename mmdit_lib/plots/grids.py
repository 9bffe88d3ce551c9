"""The numbers that floating-point types have: how far they reach, and how dense they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .figure import Figure, colours

TYPES = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16")
SHOWN = 1.0, 4.0
"""Where the right half shows every number."""
DRAWN = 100
"""Lines for at most so many numbers; for more, a bar."""


def positive_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every finite positive number of an 8 or 16 bit type, in float64, ascending."""
    integer = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    found = torch.arange(1 << 8 * dtype.itemsize).to(integer).view(dtype).double()
    return found[found.isfinite() & (found > 0)].unique()


def number_grids(types: Sequence[str] = TYPES) -> Figure:
    """A row for each type: its range (pale where its numbers are subnormal), and its numbers from 1 to 4."""
    figure = Figure(figsize=(10, 0.9 + 0.6 * len(types)), layout="constrained")
    ranges, grid = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.25))
    for row, (name, colour) in enumerate(zip(types, colours(len(types)), strict=True)):
        numbers, smallest = positive_numbers(getattr(torch, name)), torch.finfo(getattr(torch, name)).smallest_normal
        least, largest = numbers[0].item(), numbers[-1].item()
        ranges.plot([smallest, largest], [row, row], color=colour, linewidth=9, solid_capstyle="butt")
        ranges.plot([least, smallest], [row, row], color=colour, linewidth=9, solid_capstyle="butt", alpha=0.3)
        ranges.annotate(f"{least:.2g} to {largest:.3g}", (1.0, row - 0.27), ha="center", va="bottom", fontsize=8)
        shown = numbers[(numbers >= SHOWN[0]) & (numbers <= SHOWN[1])]
        if len(shown) <= DRAWN:
            grid.vlines(shown.numpy(), row - 0.3, row + 0.3, color=colour, linewidth=1.6)
        else:
            grid.barh(row, SHOWN[1] - SHOWN[0], 0.6, SHOWN[0], color=colour, alpha=0.45, linewidth=0)
            grid.text(sum(SHOWN) / 2, row, "too close to draw", ha="center", va="center", fontsize=8)
        between = int(((numbers >= 1) & (numbers < 2)).sum())
        grid.annotate(f"{between} in each\ndoubling", (SHOWN[1] * 1.02, row), va="center", fontsize=8,
                      annotation_clip=False)  # fmt: skip
    ranges.set_xscale("log")
    ranges.set_yticks(range(len(types)), types)
    ranges.set_ylim(len(types) - 0.45, -0.75)
    ranges.set_title("from the smallest to the largest", loc="left", fontsize=10)
    grid.use_sticky_edges = False
    grid.set_title(f"every number from {SHOWN[0]:g} to {SHOWN[1]:g}", loc="left", fontsize=10)
    for axes in (ranges, grid):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure
