"""Images side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .figure import GREY, Figure

FEW = 0.01
"""Fraction of differing pixels below which they are enlarged; single pixels would not be visible."""


def images_side_by_side(images: Sequence, titles: Sequence[str], *, difference: bool = True) -> Figure:
    """Images in a row and, with `difference`, the amplified difference of the first two.

    If only a few pixels differ, each is enlarged to a square, and the title says so.

    Args:
        images: PIL images, or arrays [H, W, 3] with values 0 to 255.
    """
    arrays = [np.asarray(image) for image in images]
    titles = list(titles)
    if difference:
        array, title = _difference(arrays[0].astype(int), arrays[1].astype(int))
        arrays.append(array)
        titles.append(title)
    lines = 1 + max(title.count("\n") for title in titles)
    figure = Figure(figsize=(3.6 * len(arrays), 3.65 + 0.19 * lines), layout="constrained")
    for axes, array, title in zip(figure.subplots(1, len(arrays), squeeze=False)[0], arrays, titles, strict=True):
        axes.imshow(array, interpolation="nearest" if array.shape[0] < 256 else "antialiased")
        axes.set_title(title, fontsize=11)
        axes.set_anchor("S")  # room for titles above, no gap below
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(GREY)
    return figure


def image_grid(images: Mapping[tuple, object], *, rows: str, columns: str) -> Figure:
    """A grid of images by two options.

    Args:
        images: PIL images or arrays, by the values (row, column) of the two options; every pair is there.
        rows: name of the option that differs between rows.
        columns: name of the option that differs between columns.
    """
    down, across = (list(dict.fromkeys(key[i] for key in images)) for i in (0, 1))
    figure = Figure(figsize=(1.25 * len(across) + 0.3, 1.25 * len(down) + 0.3), layout="constrained")
    grid = figure.subplots(len(down), len(across), squeeze=False)
    for (row, column), image in images.items():
        axes = grid[down.index(row)][across.index(column)]
        axes.imshow(np.asarray(image), interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        if row == down[0]:
            axes.set_title(f"{columns} {column}", fontsize=9)
        if column == across[0]:
            axes.set_ylabel(f"{rows} {row}", fontsize=9)
    return figure


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, str]:
    gap = np.abs(a - b)
    most, pixels = int(gap.max()), int(gap.any(-1).sum())
    if not most:
        return gap.astype(np.uint8), "difference\nnone: equal in every pixel"
    gain = 255 // most
    says = f"difference{f', {gain} times' if gain > 1 else ''}\n"
    says += f"at most {most} gray level{'s' * (most != 1)} of 255, in {pixels:,} pixel{'s' * (pixels != 1)}"
    gap = gap * gain
    if pixels < FEW * gap.shape[0] * gap.shape[1]:
        side = 2 * (min(gap.shape[:2]) // 50) + 3
        gap = _enlarged(gap, side)
        says += f",\neach drawn as a square of {side} x {side}"
    return gap.astype(np.uint8), says


def _enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """Replace each pixel by the per-channel maximum of the `side` x `side` pixels around it."""
    padded = np.pad(image, ((side // 2, side // 2), (side // 2, side // 2), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(0, 1)).max((-2, -1))
