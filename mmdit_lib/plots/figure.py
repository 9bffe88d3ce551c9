"""Shared by all figures: colors, and a figure class that notebooks can display."""

from __future__ import annotations

import io

import matplotlib.figure

COLOURS = ("#3366aa", "#dd7733", "#339977", "#aa4466", "#8866bb", "#bb9922", "#55aacc", "#777777")
"""Distinguishable with any color vision, and in print."""
GREY = "#888888"
COLLECTIVE = "#bb3333"
"""Where ranks communicate."""


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook displays without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def new_axes(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
