"""Memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .figure import Figure, colours, new_axes


def memory_over_time(
    runs: Mapping[str, Sequence[tuple[float, float]]], expected: Mapping[str, float], *, title: str = ""
) -> Figure:
    """One curve per run, (seconds, MB), and a dotted line at the peak that was expected of it."""
    figure, axes = new_axes(9, 4.2)
    ends = [run[-1][0] for run in runs.values()]
    for colour, (label, run) in zip(colours(len(runs)), runs.items(), strict=True):
        peak = max(megabytes for _, megabytes in run)
        axes.plot(*zip(*run, strict=True), color=colour, label=f"{label}: peak {peak:.0f} MB", linewidth=1.6)
        if label in expected:
            axes.axhline(expected[label], color=colour, linestyle=":", linewidth=1.2)
            axes.annotate(f"predicted {expected[label]:.0f} MB", (max(ends), expected[label]), (0, 2), fontsize=8,
                          textcoords="offset points", color=colour, ha="right", va="bottom",
                          bbox=dict(facecolor="white", edgecolor="none", pad=0.8, alpha=0.85))  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MB more than before")
    axes.set_title(title, loc="left")
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    return figure
