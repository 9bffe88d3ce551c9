"""A transformer block as a diagram."""

from __future__ import annotations

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ..sd3 import SD3Config
from ..sd3.transformer import MMDiT
from .figure import GREY, Figure

IMAGE, TEXT, SHARED = "#dce9f7", "#fbe6d4", "#ead9f2"
BLUE = "#3366aa"


def block_diagram(model: SD3Config, block: int = 0) -> Figure:
    """One MMDiT block as `JointTransformerBlock.forward` runs it, drawn from its modules."""
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
        draw.text(c, y, "the last block only attends to the text:\nits stream ends here", GREY)
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
        """The skip connection around a branch, from `top` to the addition at `bottom`."""
        far = x + side * 2.05
        self.path([(x, top), (far, top), (far, bottom), (x + side * 0.25, bottom)])
