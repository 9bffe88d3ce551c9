"""Times and traffic as bars, labeled with their ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .figure import COLOURS, Figure, new_axes


def time_bars(times: Mapping[str, float], *, unit: str = "ms", title: str = "Time per denoising step") -> Figure:
    """One bar per label, annotated with its speedup over the slowest."""
    slowest = max(times.values())
    notes = [
        f"{value:.3g} {unit}" + (f", {slowest / value:.2f} times faster" if slowest / value > 1.005 else "")
        for value in times.values()
    ]
    return _bars(times, notes, unit, title)


def traffic_bars(nbytes: Mapping[str, float], *, title: str = "Sent by each rank per denoising step") -> Figure:
    """One bar per label: bytes sent between ranks, and their ratio to the smallest non-zero value."""
    least = min((n for n in nbytes.values() if n), default=1)
    megabytes = {label: n / 1e6 for label, n in nbytes.items()}
    notes = [
        f"{_megabytes(n)} MB" + (f", {n / least:.3g} times the smallest" if n > least else "") for n in nbytes.values()
    ]
    return _bars(megabytes, notes, "MB", title)


def _megabytes(nbytes: float) -> str:
    """Three significant digits, without an exponent: 0.524, 98.1, 1,630."""
    return f"{float(f'{nbytes / 1e6:.3g}'):,g}"


def _bars(values: Mapping[str, float], notes: Sequence[str], unit: str, title: str) -> Figure:
    figure, axes = new_axes(8.5, 1.1 + 0.55 * len(values))
    bars = axes.barh(list(values), list(values.values()), color=COLOURS[0], height=0.62)
    most = max(values.values()) or 1
    for bar, note in zip(bars, notes, strict=True):
        inside = bar.get_width() > 0.6 * most
        x, y = bar.get_width() + most * (-0.012 if inside else 0.012), bar.get_y() + bar.get_height() / 2
        axes.text(x, y, note, va="center",
                  ha="right" if inside else "left", color="white" if inside else "black", fontsize=10)  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=10)
    return figure
