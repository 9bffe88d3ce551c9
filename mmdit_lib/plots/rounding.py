"""What rounding to a shorter data type costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .figure import COLOURS, GREY, Figure, new_axes

SAMPLES = 1 << 13
EXACT = 1e-5
"""Where an error of exactly 0 is drawn."""


def rounding_error(values: torch.Tensor, dtype: torch.dtype) -> float:
    """The norm of `rounded - values` over the norm of `values`."""
    exact = values.double()
    return ((values.to(dtype).double() - exact).norm() / exact.norm()).item()


def rounding_costs(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, *, label: str = "") -> Figure:
    """Relative rounding error against size: a point per tensor rounded to `dtype`, and curves for normal numbers.

    The curves show float16 and bfloat16 over all sizes: where one of them runs out of range, its curve rises.
    """
    figure, axes = new_axes(9, 4.2)
    sizes = 10 ** torch.arange(-9.0, 6.0, 0.2)
    normal = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0))
    for name, colour in (("float16", COLOURS[1]), ("bfloat16", COLOURS[0])):
        errors = [rounding_error(normal * size, getattr(torch, name)) for size in sizes]
        axes.plot(sizes, errors, color=colour, label=f"normal numbers in {name}")
    rms = [tensor.float().pow(2).mean().sqrt().item() for tensor in tensors.values()]
    errors = [max(rounding_error(tensor, dtype), EXACT) for tensor in tensors.values()]
    short = str(dtype).removeprefix("torch.")
    axes.scatter(rms, errors, s=14, color=COLOURS[3], alpha=0.6, linewidths=0, zorder=3,
                 label=label or f"{len(tensors)} tensors in {short}")  # fmt: skip
    axes.axhline(EXACT, color=GREY, linestyle=":", linewidth=1)
    axes.text(sizes[0], EXACT * 1.1, "exactly 0", fontsize=8, color=GREY, va="bottom")
    axes.axvline(torch.finfo(torch.float16).max, color=COLOURS[1], linestyle=":", linewidth=1)
    axes.annotate("float16 ends\nat 65504", (torch.finfo(torch.float16).max, 0.25), (-6, 0), fontsize=8, ha="right",
                  textcoords="offset points", color=COLOURS[1], va="center")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(EXACT / 2, 2)
    axes.set_xlabel("size of the values (root of the mean square)")
    axes.set_ylabel("relative rounding error")
    axes.legend(frameon=False, loc="upper center")
    return figure
