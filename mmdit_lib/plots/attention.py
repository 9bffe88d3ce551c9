"""Joint attention as pictures: the full matrix with its four quadrants, and where single words act."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import ListedColormap, LogNorm

from .figure import GREY, Figure

FAINTEST = 1e-4
"""Attention weights below this are drawn alike."""
OUTSIDE = "#222222"
ONE_COLOR = ListedColormap(["#cc1166"])


def attention_quadrants(weights, image_tokens: int, text_parts: Mapping[str, int], *, title: str = "") -> Figure:
    """The matrix of a joint attention on a logarithmic color scale, cut into image and text.

    Each quadrant's label has its share: the mean over its queries of the weight that they give to its keys.

    Args:
        weights: [tokens, tokens], one row per query (its sum is 1), image tokens first.
        image_tokens: number of image tokens.
        text_parts: label of a run of text tokens -> its length, in order; together all text tokens.

    Raises:
        ValueError: if the lengths do not add up to the size of the matrix.
    """
    weights = np.asarray(weights)
    if image_tokens + sum(text_parts.values()) != len(weights):
        raise ValueError(f"{image_tokens} image tokens and text parts {dict(text_parts)} are not {len(weights)} tokens")
    figure = Figure(figsize=(6.8, 5.7), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(
        weights.clip(FAINTEST), cmap="magma", norm=LogNorm(FAINTEST, 1), interpolation="nearest", aspect="equal"
    )
    edges = np.cumsum([0, image_tokens, *text_parts.values()])
    for edge in edges[1:-1]:
        width = 1.6 if edge == image_tokens else 0.6
        axes.axhline(edge - 0.5, color="white", linewidth=width)
        axes.axvline(edge - 0.5, color="white", linewidth=width)
    labels = [f"{name} ({count})" for name, count in {"image": image_tokens, **text_parts}.items()]
    centers = (edges[:-1] + edges[1:] - 1) / 2
    axes.set_xticks(centers, labels, fontsize=9, rotation=25, ha="right", rotation_mode="anchor")
    axes.set_yticks(centers, labels, fontsize=9)
    axes.tick_params(length=0)
    axes.set_xlabel("keys: what is read")
    axes.set_ylabel("queries: what reads")
    streams = {"image": slice(0, image_tokens), "text": slice(image_tokens, None)}
    for query, rows in streams.items():
        for key, columns in streams.items():
            share = weights[rows, columns].sum(-1).mean()
            axes.text(
                columns.start + 2, rows.start + 5, f"{query} → {key} {share:.0%}", color="white", fontsize=7.5,
                va="center", bbox=dict(facecolor=OUTSIDE, edgecolor="none", alpha=0.75, pad=2),
            )  # fmt: skip
    figure.colorbar(shown, ax=axes, label="attention weight", shrink=0.8, extend="min")
    if title:
        axes.set_title(title, loc="left")
    return figure


def word_maps(image, maps: Mapping[str, object], *, title: str = "") -> Figure:
    """An image, then for each word its attention over the image's tokens, drawn over the image in gray.

    The stronger the color, the larger the weight, from 0 to the map's largest weight, which stands above it.

    Args:
        image: a PIL image, or an array [H, W, 3].
        maps: word -> weights [rows, columns], one per image token.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    gray = pixels.mean(-1)
    figure = Figure(figsize=(1.35 * (1 + len(maps)), 1.75 + (0.3 if title else 0)), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(maps))
    first.imshow(pixels)
    first.set_title("image", fontsize=9)
    for axes, (word, weights) in zip(others, maps.items(), strict=True):
        weights = np.asarray(weights)
        axes.imshow(gray, cmap="gray", vmin=-255, vmax=255)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        alpha = weights / max(weights.max(), np.finfo(float).tiny)
        axes.imshow(weights, cmap=ONE_COLOR, alpha=alpha, extent=extent, interpolation="nearest")
        axes.set_title(f"{word}\nat most {weights.max():.1%}", fontsize=9)
    for axes in (first, *others):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(GREY)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure
