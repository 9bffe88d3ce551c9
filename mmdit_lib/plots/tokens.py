"""What each context-parallel rank holds around an attention, and how padded streams are put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.patches import Patch, Rectangle

from ..config import CpMethod
from ..network.context_parallel import Stream
from .figure import COLLECTIVE, GREY, Figure, colours

PADDING = dict(facecolor="#eeeeee", edgecolor="#aaaaaa", hatch="////", linewidth=0.6)
ABSENT = dict(facecolor="white", edgecolor="#e2e2e2", linewidth=0.6)
EMPTY, PADDED = -1, -2


class Stage(NamedTuple):
    """One step of an attention: its tensors, and who computed each of their squares on a given rank."""

    title: str
    tensors: dict[str, Callable[[int], np.ndarray]]
    """From a rank to [heads, rows]: the rank that computed each square, `EMPTY` or `PADDED`."""
    collective: str = ""
    """The one that follows."""
    received: int = 0
    """Squares that each rank receives in it."""


def attention_grids(method: CpMethod, *, lengths: Sequence[int] = (6, 3), heads: int = 4, ranks: int = 2) -> Figure:
    """Tokens x heads that each rank holds before, during and after an attention; colored by the rank it comes from.

    Args:
        lengths: tokens of the image and of the text.
    """
    own, owner = _owners(lengths, ranks)
    received = (ranks - 1) * len(own) // ranks * heads  # of one tensor, if every rank needs all of it
    whole = np.ones((heads, 1), int)
    share = np.arange(heads)[:, None] * ranks // heads  # the rank that attends for each head, in Ulysses

    def local(rank: int) -> np.ndarray:
        return np.where(own == rank, owner, EMPTY) * whole

    def everyone(rank: int) -> np.ndarray:
        return np.where(owner >= 0, own, EMPTY) * whole

    def own_heads(rank: int) -> np.ndarray:
        return np.where((owner >= 0) & (share == rank), own, EMPTY)

    def attended(rank: int) -> np.ndarray:
        return np.where(own_heads(rank) >= 0, rank, EMPTY)

    def returned(rank: int) -> np.ndarray:
        return np.where(own == rank, np.where(owner >= 0, share, PADDED), EMPTY)

    if method == "allgather":
        stages = [
            Stage("projected\nown tokens, all heads", dict.fromkeys("qkv", local), "all-gather", 2 * received),
            Stage("attends\nown queries, all keys", {"q": local, "k": everyone, "v": everyone}),
            Stage("result\nown tokens, all heads", {"o": local}),
        ]
    else:
        part = received // ranks
        stages = [
            Stage("projected\nown tokens, all heads", dict.fromkeys("qkv", local), "all-to-all", 3 * part),
            Stage("attends\nall tokens, own heads", dict.fromkeys("qkv", own_heads)),
            Stage("result\nall tokens, own heads", {"o": attended}, "all-to-all", part),
            Stage("sent back\nown tokens, all heads", {"o": returned}),
        ]
    return _draw(f"{method}: {heads} heads (rows) on {ranks} ranks", stages, lengths, heads, ranks)


def _owners(lengths: Sequence[int], ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """The rank of every padded row, and the same with `PADDED` for padding."""
    own, owner = [], []
    for length in lengths:
        local = Stream.split_over(length, ranks).local
        rank = np.arange(local * ranks) // local
        own.append(rank)
        owner.append(np.where(np.arange(local * ranks) < length, rank, PADDED))
    return np.concatenate(own), np.concatenate(owner)


def _draw(title: str, stages: list[Stage], lengths: Sequence[int], heads: int, ranks: int) -> Figure:
    image, text = (Stream.split_over(length, ranks).local * ranks for length in lengths)
    step, tall = image + text + 5.0, heads + 1.1
    block = 3 * tall + 0.8
    bottom = ranks * block - 1.9
    figure = Figure(figsize=(0.17 * step * len(stages) + 0.4, 0.17 * bottom + 2.0), layout="constrained")
    axes = figure.subplots()
    for i, stage in enumerate(stages):
        left = i * step
        axes.text(left + (image + text) / 2, -2.1, stage.title, ha="center", va="bottom", fontsize=10, linespacing=1.3)
        for x, name in ((image / 2, "image"), (image + 0.5 + text / 2, "text")):
            axes.text(left + x, -0.35, name, ha="center", va="bottom", fontsize=8.5, color=GREY)
        for rank in range(ranks):
            first = rank * block + (3 - len(stage.tensors)) / 2 * tall
            for j, (name, held) in enumerate(stage.tensors.items()):
                _grid(axes, (left, first + j * tall), name, held(rank), image, ranks)
        if stage.collective:
            _collective(
                axes, left + step - 2.7, bottom, f"{stage.collective}: each rank\nreceives {stage.received} squares"
            )
    for rank in range(ranks):
        axes.text(-2.0, rank * block + 1.5 * tall - 0.5, f"rank {rank}", ha="right", va="center", fontsize=11)
    axes.set_xlim(-5.0, step * len(stages) - 4.2)
    axes.set_ylim(bottom + 2.6, -4.6)
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.suptitle(f"{title}, {lengths[0]} image and {lengths[1]} text tokens (columns)", x=0.01, ha="left")
    legend = [Patch(color=colour, label=f"from rank {rank}") for rank, colour in enumerate(colours(ranks))]
    legend += [Patch(**PADDING, label="padding"), Patch(**ABSENT, label="not held")]
    figure.legend(handles=legend, loc="outside lower left", ncols=ranks + 2, frameon=False)
    return figure


def _collective(axes, x: float, bottom: float, text: str) -> None:
    axes.plot([x] * 2, [-0.3, bottom], color=COLLECTIVE, linestyle="--", linewidth=1.2, zorder=0)
    arrow = dict(arrowstyle="-|>", color=COLLECTIVE, linewidth=1.6)
    axes.annotate("", (x + 1.2, bottom / 2), (x - 1.2, bottom / 2), arrowprops=arrow)
    axes.text(x, bottom + 0.2, text, color=COLLECTIVE, ha="center", va="top", fontsize=9)


def _grid(axes, corner, name: str, cells: np.ndarray, image: int, ranks: int) -> None:
    """One tensor of one rank; a gap separates image and text tokens."""
    (left, top), palette = corner, colours(ranks)
    axes.text(left - 0.4, top + len(cells) / 2, name, ha="right", va="center", fontsize=10, family="monospace")
    for (head, token), rank in np.ndenumerate(cells):
        style = ABSENT if rank == EMPTY else PADDING if rank == PADDED else None
        style = style or dict(facecolor=palette[rank], edgecolor="white", linewidth=0.6)
        # `add_patch` would also extend the limits, which are set: half of the time of the whole figure.
        axes.add_artist(Rectangle((left + token + 0.5 * (token >= image), top + head), 1, 1, **style))


def gathered_rows(lengths: Sequence[int], ranks: int) -> Figure:
    """The rows of two streams in the order in which an all-gather delivers them, and as attention must see them."""
    streams = [Stream.split_over(length, ranks) for length in lengths]
    rows = [
        (kind, rank * s.local + i, rank)
        for rank in range(ranks)
        for kind, s in zip("it", streams, strict=True)
        for i in range(s.local)
    ]
    limit = dict(zip("it", lengths, strict=True))
    lines = {
        "gathered": rows,
        "attended to": sorted(row for row in rows if row[1] < limit[row[0]]),
    }
    figure = Figure(figsize=(0.5 * len(rows) + 1.6, 1.9), layout="constrained")
    axes, palette = figure.subplots(), colours(ranks)
    for y, (label, cells) in enumerate(lines.items()):
        axes.text(-0.3, 1.5 * y + 0.5, label, ha="right", va="center", fontsize=10)
        for x, (kind, i, rank) in enumerate(cells):
            real = i < limit[kind]
            style = dict(facecolor=palette[rank], edgecolor="white") if real else PADDING
            axes.add_patch(Rectangle((x, 1.5 * y), 1, 1, **style))
            axes.text(x + 0.5, 1.5 * y + 0.5, f"{kind}{i}" if real else "pad", ha="center", va="center", fontsize=8.5,
                      color="white" if real else GREY)  # fmt: skip
    axes.set_xlim(-2.6, len(rows) + 0.1)
    axes.set_ylim(2.6, -0.1)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(f"{lengths[0]} image and {lengths[1]} text tokens on {ranks} ranks", loc="left")
    return figure
