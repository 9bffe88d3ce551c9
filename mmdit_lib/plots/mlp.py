"""A tensor-parallel MLP: what each rank holds, from its input to its output."""

from __future__ import annotations

from matplotlib.patches import Rectangle

from .figure import COLLECTIVE, GREY, Figure, colours
from .shards import WHOLE

GAP = 0.62


def sharded_mlp(hidden_size: int, tokens: int, tp_size: int = 2) -> Figure:
    """gelu(x W1^T) W2^T over `tp_size` ranks: W1 by columns, W2 by rows, one all-reduce. Every matrix to scale."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots()
    row, ranks = _Row(axes, colours(tp_size)), range(tp_size)
    n, d = tokens / hidden_size, 1.0
    row.matrix("x", (n, d), f"{tokens} x {hidden_size}\nevery rank")
    row.sign("×")
    row.matrix("W1ᵀ", (d, 4 * d), f"{hidden_size} x {4 * hidden_size}\ncolwise", cut=1)
    row.sign("→\nGELU")
    row.matrix("h", (n, 4 * d), f"{tokens} x {4 * hidden_size}\nsharded", cut=1)
    row.sign("×")
    row.matrix("W2ᵀ", (4 * d, d), f"{4 * hidden_size} x {hidden_size}\nrowwise", cut=0)
    row.sign("→")
    for rank in ranks:
        row.matrix(f"y{rank}", (n, d), f"{tokens} x {hidden_size}\npartial sum", only=rank)
        row.sign("+" if rank < tp_size - 1 else "→")
    collective = row.x - GAP / 2
    row.matrix("y", (n, d), f"{tokens} x {hidden_size}\nevery rank")
    axes.plot([collective] * 2, [-2.6, 2.75], color=COLLECTIVE, linestyle="--", linewidth=1.4)
    axes.text(collective, -2.66, "all-reduce", color=COLLECTIVE, ha="center", va="bottom", fontsize=10.5)
    axes.annotate("", (0, -2.75), (collective - 0.75, -2.75), arrowprops=dict(arrowstyle="<|-|>", color=GREY))
    text = "no rank needs anything from another"
    axes.text(collective / 2, -2.83, text, ha="center", va="bottom", fontsize=10.5)
    axes.set_xlim(-0.1, row.x - GAP + 0.1)
    axes.set_ylim(2.85, -3.25)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(
        f"An MLP over {tp_size} tensor-parallel ranks, {tokens} tokens of {hidden_size} channels", loc="left"
    )
    return figure


class _Row:
    """Matrices from left to right, centered on one line; `x` is the left edge of the next."""

    def __init__(self, axes, colours: list[str]):
        self.axes, self.colours, self.x = axes, colours, 0.0

    def matrix(self, name: str, size, text: str, *, cut: int | None = None, only: int | None = None) -> None:
        """A matrix (rows, columns): shared out along dimension `cut`, on rank `only`, or on every rank."""
        (height, width), ranks = size, len(self.colours)
        top = -height / 2
        if cut is None:
            style = WHOLE if only is None else dict(facecolor=self.colours[only])
            self.axes.add_patch(Rectangle((self.x, top), width, height, **style))
            if only is not None:
                self._label(self.x + width / 2, 0, only)
        for rank, colour in enumerate(self.colours if cut is not None else ()):
            at = (self.x + width * rank / ranks, top) if cut else (self.x, top + height * rank / ranks)
            part = (width / ranks, height) if cut else (width, height / ranks)
            self.axes.add_patch(Rectangle(at, *part, facecolor=colour, edgecolor="white"))
            self._label(at[0] + part[0] / 2, at[1] + part[1] / 2, rank)
        self.axes.add_patch(Rectangle((self.x, top), width, height, fill=False, edgecolor="#444444", linewidth=0.9))
        self.axes.text(self.x + width / 2, top - 0.08, name, ha="center", va="bottom", fontsize=11)
        self.axes.text(self.x + width / 2, top + height + 0.1, text, ha="center", va="top", fontsize=8.5)
        self.x += width + GAP

    def _label(self, x: float, y: float, rank: int) -> None:
        self.axes.text(x, y, f"rank {rank}", ha="center", va="center", color="white", fontsize=8.5)

    def sign(self, text: str) -> None:
        self.axes.text(self.x - GAP / 2, 0, text, ha="center", va="center", fontsize=11, linespacing=1.1)
