"""Predicted step times beside measured ones."""

from __future__ import annotations

from collections.abc import Mapping

from .figure import COLOURS, Figure, new_axes

PARTS = {
    "divided": ("divided work", COLOURS[0]),
    "replicated": ("replicated work", COLOURS[6]),
    "transfer": ("transfer", COLOURS[1]),
    "latency": ("latency", COLOURS[3]),
}


def predicted_and_measured(
    predictions: Mapping[str, Mapping[str, float]], measured: Mapping[str, float], *, title: str = ""
) -> Figure:
    """A stacked bar per layout, what it is made of, and a black mark at the measured time.

    Args:
        predictions: milliseconds of each of `PARTS`, by layout; 'hidden' is taken off the transfer.
        measured: milliseconds by layout; a layout may be missing.
    """
    figure, axes = new_axes(9, 1.5 + 0.5 * len(predictions))
    left = dict.fromkeys(predictions, 0.0)
    for part, (label, colour) in PARTS.items():
        for name, parts in predictions.items():
            width = parts[part] - (parts.get("hidden", 0.0) if part == "transfer" else 0.0)
            axes.barh(name, width, left=left[name], color=colour, height=0.6, label=label)
            left[name] += width
    for row, (name, total) in enumerate(left.items()):
        note, end = f"{total:.1f}", total
        if name in measured:
            axes.plot([measured[name]] * 2, [row - 0.4, row + 0.4], color="black", linewidth=2.2, label="measured")
            note, end = f"{total:.1f}, measured {measured[name]:.1f}", max(total, measured[name])
        axes.annotate(note, (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.25 * max(left.values()))
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    return figure
