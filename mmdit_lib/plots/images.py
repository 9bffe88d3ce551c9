"""Images beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .figure import GREY, Figure


def images_side_by_side(images: Sequence, titles: Sequence[str], *, difference: bool = True) -> Figure:
    """Images in a row and, with `difference`, that of the first two, amplified so that it can be seen.

    Args:
        images: PIL images or arrays [H, W, 3] of 0 to 255.
    """
    arrays = [np.asarray(image) for image in images]
    titles = list(titles)
    if difference:
        gap = np.abs(arrays[0].astype(int) - arrays[1].astype(int))
        most = int(gap.max())
        gain = 255 // most if most else 1
        arrays.append((gap * gain).astype(np.uint8))
        says = f"at most {most} grey level{'s' * (most != 1)} of 255" if most else "none: equal in every pixel"
        titles.append(f"difference{f', {gain} times' if gain > 1 else ''}\n{says}")
    figure = Figure(figsize=(3.6 * len(arrays), 4.2), layout="constrained")
    for axes, array, title in zip(figure.subplots(1, len(arrays), squeeze=False)[0], arrays, titles, strict=True):
        axes.imshow(array, interpolation="nearest" if array.shape[0] < 256 else "antialiased")
        axes.set_title(title, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(GREY)
    return figure
