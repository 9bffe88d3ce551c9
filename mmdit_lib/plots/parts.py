"""Where the parameters of a model are."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

from ..architecture import ModelConfig
from ..models import architecture_of
from .figure import Figure, colours, new_axes

PARTS = {
    r".*\.attn2?\.": "attention",
    r".*\.ff(_context)?\.": "MLP",
    r".*\.norm1(_context)?\.|norm_out\.": "modulation",
    r"pos_embed\.pos_embed": "position table",
    r"": "embedders, output",
}
"""A tensor belongs to the first part whose pattern its name matches."""


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: 'attention' for 'transformer_blocks.0.attn.to_q.weight'."""
    return next(part for pattern, part in PARTS.items() if re.match(pattern, name))


def parameters_by_part(models: Mapping[str, ModelConfig]) -> Figure:
    """One bar per model: the share of each part in its parameters, known from its config alone."""
    figure, axes = new_axes(9, 1.6 + 0.55 * len(models))
    for label, model in models.items():
        shapes = architecture_of(model).parameters(model)
        counts = Counter()
        for name, shape in shapes.items():
            counts[part_of(name)] += math.prod(shape)
        _bar(axes, f"{label}\n{_count(counts.total())} parameters", counts)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the parameters")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named, loc="outside upper left", ncols=len(PARTS), frameon=False)
    return figure


def _bar(axes, label: str, counts: Counter) -> None:
    left, total = 0.0, counts.total()
    for part, colour in zip(PARTS.values(), colours(len(PARTS)), strict=True):
        share = 100 * counts[part] / total
        axes.barh([label], [share], left=left, color=colour, height=0.62, label=part)
        if share >= 4:
            axes.text(left + share / 2, label, f"{share:.0f}", ha="center", va="center", color="white", fontsize=10)
        left += share


def _count(number: int) -> str:
    """'2.47 billion', '8.46 million'."""
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"
