"""Every figure that the notebooks and the command show. Each function returns a matplotlib `Figure`."""

from __future__ import annotations

import io
from collections.abc import Mapping as Values
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from .config import Mapping, ModelConfig, TpLayout
from .network.mmdit import MMDiT
from .network.plan import cut_dim, rule_for

COLOURS = ("#3366aa", "#dd7733", "#339977", "#aa4466", "#8866bb", "#bb9922", "#55aacc", "#777777")
"""Told apart by readers with any colour vision, in print too."""
IMAGE, TEXT, SHARED = "#dce9f7", "#fbe6d4", "#ead9f2"
GREY, BLUE = "#888888", "#3366aa"


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows though it has no part in pyplot's global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def error_by_depth(tables: Values[str, pd.DataFrame]) -> Figure:
    """Relative error of every value against the module's place in the order of execution, on a logarithmic axis.

    Args:
        tables: what `compare_layers` returned, by label (a dtype, say). An error of exactly 0 has no
            place on the axis: it is drawn at its foot. A cross marks a value that is not ok.
    """
    figure, axes = _axes(9, 4.5)
    floor = _floor(tables)
    for colour, (label, table) in zip(_colours(len(tables)), tables.items(), strict=True):
        known = table[table.relative_error.notna() & np.isfinite(table.relative_error)]
        errors = known.relative_error.clip(lower=floor)
        fine = known.status == "ok"
        axes.scatter(known.depth[fine], errors[fine], s=12, color=colour, alpha=0.35, linewidths=0)
        axes.scatter(known.depth[~fine], errors[~fine], s=40, color=colour, marker="x")
        worst = errors.groupby(known.depth).max().rolling(9, center=True, min_periods=1).max()
        axes.plot(worst.index, worst, color=colour, linewidth=1.8, label=label)
        axes.axhline(known.tolerance.max(), color=colour, linestyle=":", linewidth=1.2)
        axes.annotate("tolerance", (0.995, known.tolerance.max()), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", fontsize=8, color=colour)  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor / 2)
    axes.set_ylabel("relative error")
    axes.set_title("Error of each module against diffusers", loc="left")
    _mark_blocks(axes, next(iter(tables.values())))
    axes.legend(frameon=False, loc="upper left", ncols=len(tables), bbox_to_anchor=(0, -0.16), borderaxespad=0)
    return figure


def _floor(tables: Values[str, pd.DataFrame]) -> float:
    errors = pd.concat([table.relative_error for table in tables.values()])
    above = errors[(errors > 0) & np.isfinite(errors)]
    return above.min() / 3 if len(above) else 1e-9


def _mark_blocks(axes, table: pd.DataFrame) -> None:
    """A tick where each transformer block ends; every few only, where there are many."""
    blocks = table[table.module.str.fullmatch(r"transformer_blocks\.\d+")]
    ends = blocks.groupby("module", sort=False).depth.first()
    every = -(-len(ends) // 14)
    axes.set_xticks(list(ends)[::every], [f"{name.rpartition('.')[2]}" for name in ends.index[::every]])
    axes.set_xlabel("transformer block (the tick is its end), in order of execution")
    axes.set_xlim(-1, table.depth.max() + 1)


def images_side_by_side(images: Sequence, titles: Sequence[str], *, difference: bool = True) -> Figure:
    """Images in a row and, with `difference`, that of the first two, amplified so that it can be seen.

    Args:
        images: PIL images or arrays [H, W, 3] of 0 to 255.
    """
    arrays = [np.asarray(image) for image in images]
    titles = list(titles)
    if difference:
        gap = np.abs(arrays[0].astype(int) - arrays[1].astype(int))
        most = int(gap.max())
        gain = 255 // most if most else 1
        arrays.append((gap * gain).astype(np.uint8))
        says = f"at most {most} grey level{'s' * (most != 1)} of 255" if most else "none: equal in every pixel"
        titles.append(f"difference{f', {gain} times' if gain > 1 else ''}\n{says}")
    figure = Figure(figsize=(3.6 * len(arrays), 4.2), layout="constrained")
    for axes, array, title in zip(figure.subplots(1, len(arrays), squeeze=False)[0], arrays, titles, strict=True):
        axes.imshow(array, interpolation="nearest" if array.shape[0] < 256 else "antialiased")
        axes.set_title(title, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(GREY)
    return figure


def shard_map(model: ModelConfig, tp_size: int, *, tp_layout: TpLayout = "megatron", block: int = 0) -> Figure:
    """Which rank holds which part of each weight matrix of one block. A matrix that every rank holds is striped.

    Outputs (rows of the matrix) downwards, inputs to the right; a side is drawn as the root of its length.
    """
    Mapping(tp_size=tp_size).check(model, tp_layout=tp_layout)
    rows = _matrices(model, block)
    colours = _colours(tp_size)
    figure = Figure(figsize=(12.5, 7.6), layout="constrained")
    axes = figure.subplots()
    top = widest = 0.0
    for matrices in rows:
        left = 0.0
        for label, (name, shape) in matrices.items():
            height, width = (np.sqrt(n / model.hidden_size) for n in shape)
            style = rule_for(name.removesuffix(".weight"), tp_layout).style
            axes.text(
                left,
                top + 0.42,
                f"{label}\n{style}\n{shape[0]} x {shape[1]}",
                fontsize=8.5,
                va="bottom",
                linespacing=1.25,
            )
            _matrix(axes, (left, top + 0.5), (width, height), cut_dim(name, tp_layout), colours)
            left += max(width, 1.0) + 0.62
        widest = max(widest, left)
        top += 0.75 + max(np.sqrt(shape[0] / model.hidden_size) for _, shape in matrices.values())
    axes.set_xlim(-0.02, widest - 0.3)
    axes.set_ylim(top, -0.1)
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.legend(
        handles=[Patch(color=colour, label=f"rank {rank}") for rank, colour in enumerate(colours)],
        loc="outside lower left", ncols=min(tp_size, 8), frameon=False,
    )  # fmt: skip
    figure.suptitle(
        f"Weights of block {block} over {tp_size} tensor-parallel ranks, layout {tp_layout}", x=0.01, ha="left"
    )
    return figure


def _matrices(model: ModelConfig, block: int) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """{label: (checkpoint name, full shape)} of one block: projections in, projections out, MLPs, modulation."""
    start = f"transformer_blocks.{block}."
    rows: list[dict] = [{}, {}, {}]
    for name, shape in MMDiT(model).named_parameters().items():
        if name.startswith(start) and name.endswith(".weight") and len(shape) == 2:
            label = name.removeprefix(start).removesuffix(".weight")
            row = 2 if label.startswith(("ff", "norm")) else 1 if label.startswith("attn2") or "_out" in label else 0
            rows[row][label] = (name, shape)
    return rows


def _matrix(axes, corner, size, dim: int | None, colours: Sequence[str]) -> None:
    (x, y), (width, height), ranks = corner, size, len(colours)
    stripes = 1 if dim is not None else max(1, 8 // ranks)
    parts = ranks * stripes
    for i in range(parts):
        if dim == 0:
            box = (x, y + height * i / parts), width, height / parts
        else:
            box = (x + width * i / parts, y), width / parts, height
        solid = dict(facecolor=colours[i % ranks], edgecolor="white", linewidth=1.0)
        whole = dict(facecolor=colours[i % ranks], alpha=0.35, linewidth=0)
        axes.add_patch(Rectangle(*box, **(whole if dim is None else solid)))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="#444444", linewidth=0.9))


def block_diagram(model: ModelConfig, block: int = 0) -> Figure:
    """One MMDiT block as `JointTransformerBlock.forward` runs it, drawn from the modules that it has."""
    modules = MMDiT(model).transformer_blocks[block]
    dual, last = modules.dual, modules.context_pre_only
    figure = Figure(figsize=(9, 11.4 if dual else 8.8), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    draw = _Diagram(axes)
    x, c, y = 2.2, 7.8, 0.0
    heads = f"{model.num_attention_heads} heads of {model.attention_head_dim}"
    norm = ", RMS norm on q and k" if model.qk_norm else ""

    draw.text(x, y, "image tokens x")
    draw.text(c, y, "text tokens c")
    draw.text(5, y, "temb")
    adaln = "adaLN: layer norm,\nscale and shift from temb"
    draw.box(x, y + 1.2, f"norm1\n{adaln}", IMAGE)
    draw.box(c, y + 1.2, f"norm1_context\n{adaln}", TEXT)
    for centre in (x, c):
        draw.arrow((centre, y + 0.2), (centre, y + 0.75))
        draw.path([(5, y + 0.2), (5, y + 1.2), (centre + (1.7 if centre == x else -1.7), y + 1.2)], "#338844")
    draw.box(x, y + 2.6, "to_q, to_k, to_v", IMAGE, height=0.6)
    draw.box(c, y + 2.6, "add_q_proj, add_k_proj, add_v_proj", TEXT, height=0.6)
    draw.box(5, y + 4.0, f"attn: joint attention over image and text\n{heads}{norm}", SHARED, width=9.0)
    for centre in (x, c):
        draw.arrow((centre, y + 1.65), (centre, y + 2.3))
        draw.arrow((centre, y + 2.9), (centre, y + 3.55))
    ends = [x] if last else [x, c]
    y += 5.4
    if dual:
        draw.box(x, y + 2.9, "attn2: image tokens alone,\nmodulated a second time by norm1", SHARED)
        draw.path([(x - 1.7, 1.2), (x - 1.88, 1.2), (x - 1.88, y + 2.9), (x - 1.7, y + 2.9)], BLUE)
    for centre in ends:
        outer = -1 if centre == x else 1
        suffix, colour = ("", IMAGE) if centre == x else ("_context", TEXT)
        draw.box(centre, y, "to_out" if centre == x else "to_add_out", colour, height=0.6)
        draw.arrow((centre, y - 0.95), (centre, y - 0.3))
        draw.arrow((centre, y + 0.3), (centre, y + 0.88))
        total = y + 1.1
        draw.residual(centre, 0.45, total, outer)
        draw.plus(centre, total)
        if dual and centre == x:
            draw.residual(centre, total + 0.55, y + 4.2, outer)
            draw.path([(centre, total + 0.22), (centre, total + 0.55)], arrow=False)
            draw.arrow((centre, y + 3.35), (centre, y + 3.98))
            total = y + 4.2
            draw.plus(centre, total)
        bottom = y + (5.7 if dual else 2.6)
        draw.arrow((centre, total + 0.22), (centre, bottom - 0.3))
        draw.box(centre, bottom, f"norm2{suffix}, scale and shift", colour, height=0.6)
        draw.arrow((centre, bottom + 0.3), (centre, bottom + 0.85))
        hidden = modules.ff.net[1].weight.shape[1]
        draw.box(
            centre, bottom + 1.3, f"ff{suffix}: linear, GELU, linear\n{model.hidden_size} to {hidden} and back", colour
        )
        draw.arrow((centre, bottom + 1.75), (centre, bottom + 2.38))
        draw.residual(centre, total + 0.55, bottom + 2.6, outer)
        draw.plus(centre, bottom + 2.6)
        draw.arrow((centre, bottom + 2.82), (centre, bottom + 3.35))
        where = "norm_out" if last else "the next block"
        draw.text(centre, bottom + 3.6, f"{'x' if centre == x else 'c'}, to {where}")
    if last:
        draw.text(c, y, "the last block only reads the text:\nits stream ends here", GREY)
    axes.set_xlim(-0.2, 10.2)
    axes.set_ylim(bottom + 3.9, -0.5)
    kind = ", the last" if last else ", with dual attention" if dual else ""
    axes.set_title(f"transformer_blocks.{block} of {model.num_layers}{kind}: {model.hidden_size} channels", loc="left")
    return figure


class _Diagram:
    """Boxes and arrows in one style."""

    def __init__(self, axes):
        self.axes = axes

    def text(self, x: float, y: float, text: str, colour: str = "black") -> None:
        self.axes.text(x, y, text, ha="center", va="center", fontsize=10, color=colour)

    def box(self, x: float, y: float, text: str, colour: str, width: float = 3.4, height: float = 0.9) -> None:
        corner = (x - width / 2, y - height / 2)
        style = "round,pad=0,rounding_size=0.12"
        self.axes.add_patch(
            FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor="#555555")
        )
        self.axes.text(x, y, text, ha="center", va="center", fontsize=9.5)

    def arrow(self, start, end) -> None:
        self.axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#333333", shrinkA=0, shrinkB=0)
        )

    def path(self, points, colour: str = "#333333", arrow: bool = True) -> None:
        """A line with corners, and an arrow at its end."""
        self.axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, solid_joinstyle="miter")
        if arrow:
            self.axes.add_patch(FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=11,
                                                color=colour, shrinkA=0, shrinkB=0))  # fmt: skip

    def plus(self, x: float, y: float) -> None:
        """Where a gated branch is added to its stream."""
        self.axes.text(x, y, "+", ha="center", va="center", fontsize=12,
                       bbox=dict(boxstyle="circle,pad=0.15", facecolor="white", edgecolor="#333333"))  # fmt: skip
        self.axes.text(x + 0.12, y - 0.45, "× gate", fontsize=8.5, color="#338844", va="center")

    def residual(self, x: float, top: float, bottom: float, side: int) -> None:
        """The stream past a branch: it leaves its line at `top` and is added at `bottom`."""
        far = x + side * 2.05
        self.path([(x, top), (far, top), (far, bottom), (x + side * 0.25, bottom)])


def time_bars(times: Values[str, float], *, unit: str = "ms", title: str = "Time per denoising step") -> Figure:
    """A bar per label and, on it, how many times faster it is than the slowest."""
    slowest = max(times.values())
    notes = [
        f"{value:.3g} {unit}" + (f", {slowest / value:.2f} times faster" if value < slowest else "")
        for value in times.values()
    ]
    return _bars(times, notes, unit, title)


def traffic_bars(nbytes: Values[str, float], *, title: str = "Sent by each rank per denoising step") -> Figure:
    """A bar per label: bytes between ranks, and their ratio to the least."""
    least = min((n for n in nbytes.values() if n), default=1)
    megabytes = {label: n / 1e6 for label, n in nbytes.items()}
    notes = [f"{n / 1e6:.3g} MB" + (f", {n / least:.3g} times the least" if n > least else "") for n in nbytes.values()]
    return _bars(megabytes, notes, "MB", title)


def _bars(values: Values[str, float], notes: Sequence[str], unit: str, title: str) -> Figure:
    figure, axes = _axes(8.5, 1.1 + 0.55 * len(values))
    bars = axes.barh(list(values), list(values.values()), color=_colours(len(values)), height=0.62)
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


def _axes(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
