"""What every rank does when, during one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.patches import Patch

from .figure import COLOURS, Figure

KINDS = {"GEMM": COLOURS[0], "attention": COLOURS[2], "other": "#c8ced6", "collective": COLOURS[1]}
"""Colors by kind of operator."""
Span = tuple[str, str, float, float]
"""Kind, name, start and end in seconds."""


def timeline(
    steps: Mapping[str, Sequence[Sequence[Span]]], *, window: tuple[float, float] = (0.0, 1.0), title: str = ""
) -> Figure:
    """A panel per layout, a row per rank, a bar per operator; collectives are drawn taller.

    Args:
        steps: the spans of every rank, in rank order, by layout.
        window: the part of each step that is shown, as fractions of its duration.
    """
    figure = Figure(figsize=(10, 0.75 + 0.55 * sum(map(len, steps.values())) + 0.45 * len(steps)), layout="constrained")
    heights = [len(ranks) for ranks in steps.values()]
    panels = figure.subplots(len(steps), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (label, ranks) in zip(panels, steps.items(), strict=True):
        begin = min(span[2] for spans in ranks for span in spans)
        length = max(span[3] for spans in ranks for span in spans) - begin
        for row, spans in enumerate(ranks):
            for kind, colour in KINDS.items():
                bars = [((s[2] - begin) * 1e3, (s[3] - s[2]) * 1e3) for s in spans if s[0] == kind]
                tall = 0.84 if kind == "collective" else 0.6
                axes.broken_barh(bars, (row - tall / 2, tall), facecolors=colour, linewidth=0)
        axes.set_xlim(*(1e3 * length * x for x in window))
        axes.set_ylim(len(ranks) - 0.5, -0.5)
        axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
        axes.set_title(label, loc="left", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=9)
    panels[-1].set_xlabel("ms")
    figure.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in KINDS.items()],
        loc="outside upper right", ncols=len(KINDS), frameon=False, fontsize=9,
    )  # fmt: skip
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure
