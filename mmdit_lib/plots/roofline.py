"""The roofline of a step: what bounds the speed of its parts, compute or memory."""

from __future__ import annotations

from collections.abc import Mapping

from .figure import COLOURS, GREY, Figure, new_axes

Part = tuple[float, float, float | None]


def roofline(parts: Mapping[str, Part], *, flops: float, bandwidth: float, title: str = "Roofline of a step") -> Figure:
    """FLOP/s against FLOP per byte, both logarithmic, below the two limits of a device.

    Args:
        parts: FLOP, bytes and measured milliseconds of each part, by label. Without milliseconds, a hollow marker on
            the roof shows the limit.
        flops: the device's FLOP/s.
        bandwidth: its bytes/s.
    """
    figure, axes = new_axes(9, 5)
    ridge = flops / bandwidth
    intensities = [flop / nbytes for flop, nbytes, _ in parts.values()]
    left, right = min(*intensities, ridge) / 2.5, max(*intensities, ridge) * 4
    axes.loglog([left, ridge, right], [left * bandwidth, flops, flops], color="black", linewidth=1.5)
    axes.axvline(ridge, color=GREY, linestyle=":", linewidth=1)
    for x, text, side in ((ridge / 1.15, "limited by memory", "right"), (ridge * 1.15, "by compute", "left")):
        axes.text(x, left * bandwidth * 0.45, text, ha=side, fontsize=10, color=GREY)
    axes.text(right, flops * 1.08, f"{flops / 1e12:.0f} TFLOP/s", ha="right", fontsize=9)
    middle = ridge / 12
    axes.text(middle / 1.1, middle * bandwidth, f"{bandwidth / 1e12:.2f} TB/s", ha="right", va="bottom", fontsize=9)
    for colour, (label, part) in zip(COLOURS * len(parts), parts.items(), strict=False):
        _point(axes, label, part, min(part[0] / part[1] * bandwidth, flops), colour)
    axes.set_ylim(left * bandwidth * 0.35, flops * 2)
    axes.set_xlim(left, right)
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("FLOP per second")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=9, labelspacing=1)
    return figure


def _point(axes, label: str, part: Part, limit: float, colour: str) -> None:
    flop, nbytes, ms = part
    if ms is None:
        speed, face, note = limit, "white", "limit only"
    else:
        speed = flop / ms * 1000
        face, note = colour, f"{ms:.1f} ms, {speed / limit:.0%} of its limit"
    style = dict(marker="o", linestyle="", markersize=9, markerfacecolor=face, markeredgecolor=colour, zorder=3)
    axes.plot([flop / nbytes], [speed], label=f"{label}\n{note}", **style)
    axes.plot([flop / nbytes] * 2, [speed, limit], color=colour, linewidth=1)
