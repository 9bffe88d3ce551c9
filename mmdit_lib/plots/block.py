"""A transformer block as a diagram."""

from __future__ import annotations

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ..sd3 import SD3Config
from ..sd3.transformer import JointTransformerBlock, MMDiT
from .figure import GREY, Figure

IMAGE, TEXT, SHARED = "#dce9f7", "#fbe6d4", "#ead9f2"
BLACK, BLUE, GREEN = "#333333", "#3366aa", "#338844"


def block_diagram(model: SD3Config, block: int = 0) -> Figure:
    """One MMDiT block as `JointTransformerBlock.forward` runs it, drawn from its modules; green: computed from temb."""
    modules = MMDiT(model).transformer_blocks[block]
    dual, last = modules.dual, modules.context_pre_only
    figure = Figure(figsize=(9, 12.2 if dual else 9.2), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    image, text = _Stream(axes, 2.2, -1, IMAGE), _Stream(axes, 7.8, 1, TEXT)
    image.label(5, 0, "temb")
    image.to_attention("image tokens x", "norm1", "to_q, to_k, to_v")
    text.to_attention("text tokens c", "norm1_context", "add_q_proj, add_k_proj, add_v_proj")
    heads = f"{model.num_attention_heads} heads of {model.attention_head_dim}"
    norm = ", RMS norm on q and k" if model.qk_norm else ""
    text.arrow(0.65)
    image.arrow(0.65)
    image.box(f"attn: joint attention over image and text\n{heads}{norm}", SHARED, x=5, width=9)
    text.y = image.y
    widths = f"{model.hidden_size} to {modules.ff.net[1].weight.shape[1]} and back"
    end = "norm_out" if last else "the next block"
    image.from_attention(modules, "", widths, f"x, to {end}")
    if last:
        text.label(text.x, text.y + 0.95, "the last block only attends to the text:\nits stream ends here", GREY)
    else:
        text.from_attention(modules, "_context", widths, f"c, to {end}")
    axes.set_xlim(-0.2, 10.2)
    axes.set_ylim(image.y + 0.3, -0.5)
    kind = ", the last" if last else ", with dual attention" if dual else ""
    axes.set_title(f"transformer_blocks.{block} of {model.num_layers}{kind}: {model.hidden_size} channels", loc="left")
    return figure


class _Stream:
    """One stream of tokens, drawn downwards: `y` is the lower end of what is drawn, `outer` the side (-1: left)."""

    def __init__(self, axes, x: float, outer: int, colour: str):
        self.axes, self.x, self.outer, self.colour = axes, x, outer, colour
        self.y = 0.2
        self.edge, self.rail = x - 1.7 * outer, x - 2.0 * outer  # norm1's vectors run down the rail, on the inner side

    def to_attention(self, tokens: str, norm: str, projections: str) -> None:
        self.label(self.x, 0, tokens)
        self.path([(5, 0.2), (5, 1.2), (self.edge, 1.2)], GREEN)
        self.arrow()
        self.box(f"{norm}\nadaLN: layer norm,\nscale and shift from temb")
        self.arrow(0.65)
        self.box(projections, height=0.6)

    def from_attention(self, modules: JointTransformerBlock, suffix: str, widths: str, end: str) -> None:
        self.arrow(0.65)
        self.box("to_add_out" if suffix else "to_out", height=0.6)
        self.gated_sum(skip=0.45)
        skip = self.y + 0.33
        if modules.dual and not suffix:
            self.path([(self.x, self.y), (self.x, skip)], arrow=False)
            self.y += 0.75
            self.box("attn2: image tokens alone,\nmodulated a second time by norm1", SHARED)
            side, middle = self.x + 1.7 * self.outer, self.y - 0.45
            beside = side + 0.18 * self.outer
            self.path([(side, 1.2), (beside, 1.2), (beside, middle), (side, middle)], BLUE)
            self.gated_sum(skip)
            skip = self.y + 0.33
        self.arrow(0.75)
        self.from_rail(self.y + 0.3, self.edge, "shift, scale")
        self.box(f"norm2{suffix}, scale and shift", height=0.6)
        self.arrow()
        self.box(f"ff{suffix}: linear, GELU, linear\n{widths}")
        self.gated_sum(skip)
        self.path([(self.edge, 1.45), (self.rail, 1.45), (self.rail, self.y - 0.82)], GREEN, arrow=False)
        self.arrow()
        self.label(self.x, self.y + 0.25, end)

    def gated_sum(self, skip: float) -> None:
        """x + gate * branch; x leaves the stream at y = `skip`."""
        times, plus = self.y + 0.6, self.y + 1.2
        self.arrow(plus - self.y - 0.22)
        self.from_rail(times, self.x - 0.2 * self.outer, "gate")
        far = self.x + 2.05 * self.outer
        self.path([(self.x, skip), (far, skip), (far, plus), (self.x + 0.25 * self.outer, plus)])
        circle = dict(boxstyle="circle,pad=0.15", facecolor="white", edgecolor=BLACK)
        self.axes.text(self.x, times, "×", ha="center", va="center", fontsize=9, bbox=circle, zorder=4)
        self.axes.text(self.x, plus, "+", ha="center", va="center", fontsize=12, bbox=circle, zorder=4)
        self.y = plus + 0.22

    def from_rail(self, y: float, x: float, vectors: str) -> None:
        self.path([(self.rail, y), (x, y)], GREEN)
        side = "right" if self.outer > 0 else "left"
        self.axes.text(self.rail - 0.1 * self.outer, y, vectors, ha=side, va="center", fontsize=8.5, color=GREEN)

    def label(self, x: float, y: float, text: str, colour: str = "black") -> None:
        self.axes.text(x, y, text, ha="center", va="center", fontsize=10, color=colour)

    def box(self, text: str, colour: str | None = None, *, x: float | None = None, width=3.4, height=0.9) -> None:
        x, style = self.x if x is None else x, "round,pad=0,rounding_size=0.12"
        corner, colour = (x - width / 2, self.y), colour or self.colour
        self.axes.add_patch(
            FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor="#555555", zorder=3)
        )
        self.axes.text(x, self.y + height / 2, text, ha="center", va="center", fontsize=9.5, zorder=4)
        self.y += height

    def arrow(self, length: float = 0.55) -> None:
        self.path([(self.x, self.y), (self.x, self.y + length)])
        self.y += length

    def path(self, points, colour: str = BLACK, arrow: bool = True) -> None:
        """A line with corners, and an arrow at its end."""
        self.axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, solid_joinstyle="miter")
        if arrow:
            head = dict(arrowstyle="-|>", mutation_scale=11, color=colour, shrinkA=0, shrinkB=0)
            self.axes.add_patch(FancyArrowPatch(points[-2], points[-1], **head))
