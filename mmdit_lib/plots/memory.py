"""Memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .figure import Figure, colours, new_axes


def memory_over_time(
    runs: Mapping[str, Sequence[tuple[float, float]]], expected: Mapping[str, float], *, title: str = ""
) -> Figure:
    """One curve per run, (seconds, MB), and a dotted line at the peak that was expected of it."""
    figure, axes = new_axes(9, 3.6)
    for colour, (label, run) in zip(colours(len(runs)), runs.items(), strict=True):
        peak = max(megabytes for _, megabytes in run)
        axes.plot(*zip(*run, strict=True), color=colour, label=f"{label}: peak {peak:.0f} MB", linewidth=1.6)
        if label in expected:
            axes.axhline(expected[label], color=colour, linestyle=":", linewidth=1.2)
            axes.text(1.0, expected[label], f"predicted {expected[label]:.0f} MB", fontsize=8, color=colour,
                      ha="right", va="bottom", transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MB more than before")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=len(runs), borderaxespad=0)
    return figure
