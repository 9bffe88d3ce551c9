"""What FP8 adds to the errors of all modules."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .errors import mark_blocks
from .figure import Figure, colours, new_axes


def error_of_fp8(table: pd.DataFrame) -> Figure:
    """Relative error of every value of a quantized engine against diffusers in float32, and of diffusers in the
    network's dtype, by place in the order of execution, on a logarithmic axis.

    Args:
        table: the result of `compare_layers` for a quantized engine.
    """
    figure, axes = new_axes(9, 4.5)
    labels = {"fp8_error": f"FP8 and {table.attrs['dtype']}", "dtype_error": f"{table.attrs['dtype']} alone"}
    for colour, (column, label) in zip(colours(2), labels.items(), strict=True):
        known = table[table[column].gt(0) & np.isfinite(table[column])]
        if known.empty:  # a float32 network adds nothing
            continue
        axes.scatter(known.depth, known[column], s=12, color=colour, alpha=0.35, linewidths=0)
        middle = known.groupby("depth")[column].median().rolling(9, min_periods=1).median()
        axes.plot(middle.index, middle, color=colour, linewidth=1.8, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    axes.set_title("Error of each module against diffusers in float32", loc="left")
    mark_blocks(axes, table)
    axes.legend(frameon=False, loc="upper left", ncols=2, bbox_to_anchor=(0, -0.16), borderaxespad=0)
    return figure
