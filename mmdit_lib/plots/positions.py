"""A position table, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.patches import Rectangle

from .figure import COLOURS, Figure

FRAMES = ("black", *COLOURS[2:])


def position_maps(table: torch.Tensor, channels: Sequence[int], crops: Mapping[str, int]) -> Figure:
    """Some channels of a position table as images, one pixel per image token.

    Args:
        table: [1, side * side, D], as in a checkpoint.
        channels: which channels to show.
        crops: sides, in tokens, of center crops to mark, by label.
    """
    side = math.isqrt(table.shape[1])
    maps = table.reshape(side, side, -1).float().numpy()
    figure = Figure(figsize=(2.35 * len(channels), 3.2), layout="constrained")
    for axes, channel in zip(figure.subplots(1, len(channels), squeeze=False)[0], channels, strict=True):
        shown = axes.imshow(maps[..., channel], cmap="coolwarm", vmin=-1, vmax=1)
        frames = []
        for (label, crop), colour in zip(crops.items(), FRAMES, strict=False):
            corner = (side - crop) // 2 - 0.5
            frames.append(Rectangle((corner, corner), crop, crop, fill=False, edgecolor=colour, linewidth=2))
            frames[-1].set_label(label)
            axes.add_patch(frames[-1])
        axes.set_title(f"channel {channel}", fontsize=10)
        axes.set_xticks([0, side - 1])
        axes.set_yticks([0, side - 1])
        axes.tick_params(labelsize=8)
        axes.set_xlabel("column")
    figure.axes[0].set_ylabel("row")
    figure.colorbar(shown, ax=figure.axes, shrink=0.7)
    figure.legend(handles=frames, loc="outside lower left", ncols=len(frames), frameon=False)
    return figure
