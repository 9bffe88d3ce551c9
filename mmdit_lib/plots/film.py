"""Steps of one denoising run as a film strip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .figure import GREY, Figure


def film_strip(rows: Mapping[str, Sequence], columns: Sequence[str], *, title: str = "") -> Figure:
    """One row of images per label, one column per step.

    Args:
        rows: label of a row -> its PIL images, or arrays [H, W, 3]; equally many in every row.
        columns: a label for each column.

    Raises:
        ValueError: if a row has not one image per column.
    """
    for label, images in rows.items():
        if len(images) != len(columns):
            raise ValueError(f"row '{label}' has {len(images)} images for {len(columns)} columns")
    figure = Figure(
        figsize=(1.15 * len(columns) + 0.4, 1.15 * len(rows) + (0.6 if title else 0.3)), layout="constrained"
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_row, (label, images) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(label, fontsize=9)
        for axes, image in zip(axes_row, images, strict=True):
            axes.imshow(np.asarray(image))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color(GREY)
    for axes, label in zip(grid[0], columns, strict=True):
        axes.set_title(label, fontsize=9)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure
