"""A network as TensorRT has it: its layers and the tensors between them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ..engine.graph import Graph, Layer
from .figure import Figure

SYMBOLS = {"SUM": "+", "PROD": "×", "SUB": "−", "FLOOR_DIV": "÷"}
COMPUTED, CONSTANT, GROUP, INPUT = "#dce9f7", "#eeeeee", "#ead9f2", "white"
BLACK, GREEN = "#333333", "#338844"
MANY = 4
"""Edges that leave a box with at least so many users are green."""
GAP, SWEEPS, INCHES = 0.35, 12, 0.8


@dataclass
class Node:
    """A box of the diagram, or (without a label) a bend of an edge that spans several rows."""

    label: str
    colour: str
    layers: int = 1
    inputs: list[Node] = field(default_factory=list)
    users: list[Node] = field(default_factory=list)
    row: int = 0
    x: float = 0.0

    @property
    def width(self) -> float:
        if len(self.label) <= 1:
            return 0.45 if self.label else 0.3
        return 0.35 + 0.105 * max(map(len, self.label.split("\n")))


def network_diagram(graph: Graph, *, module: str = "", title: str = "") -> Figure:
    """Every layer of a small network as a box, from the inputs down to the output; sizes (int64) are left out.

    Args:
        graph: what `read_network` returned.
        module: path of a module. Each of its children is then one box, labeled with its number of layers, and
            constants outside of them are left out.
    """
    nodes = _nodes(graph, module)
    rows = _rows(nodes)
    _place(rows)
    left, right = (f(sign * n.width / 2 + n.x for row in rows for n in row) for f, sign in ((min, -1), (max, 1)))
    width = max(right - left + 0.4, 6.0)
    figure = Figure(figsize=(INCHES * width, 0.62 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim((left + right - width) / 2, (left + right + width) / 2)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for row in rows:
        for node in row:
            _draw(axes, node)
    axes.set_title(title, loc="left")
    return figure


def _nodes(graph: Graph, module: str) -> list[Node]:
    """In the order of the layers, with their edges."""
    makers = {value.name: Node(value.name, INPUT) for value in graph.inputs}
    groups: dict[str, Node] = {}
    values: dict[str, float] = {}
    nodes = list(makers.values())
    for layer in graph.layers:
        child = _child(layer.name, module)
        if layer.output.dtype == "int64":
            continue
        if module and not child and layer.type == "CONSTANT":
            values[layer.output.name] = layer.attributes.get("values", [None])[0]
            continue
        node = groups.get(child)
        if node is None:
            node = Node(child, GROUP, 0) if child else Node(_label(layer, values), _colour(layer))
            nodes.append(node)
        if child:
            groups[child] = node
            node.layers += 1
        for name in layer.inputs:
            source = makers.get(name)
            if source not in (None, node) and source not in node.inputs:
                node.inputs.append(source)
                source.users.append(node)
        makers[layer.output.name] = node
    for name, node in groups.items():
        node.label = f"{name}\n{node.layers} layer{'s' * (node.layers > 1)}"
    for output in graph.outputs:
        end = Node(output, INPUT, inputs=[makers[output]])
        makers[output].users.append(end)
        nodes.append(end)
    return nodes


def _child(name: str, module: str) -> str:
    """'attn' for 'transformer_blocks.0.attn.to_q/matmul' in 'transformer_blocks.0'; '' for a layer of its own."""
    inside = module and name.startswith(f"{module}.")
    return re.split("[./]", name.removeprefix(f"{module}."))[0] if inside else ""


def _label(layer: Layer, values: dict[str, float]) -> str:
    """`values`: the constants that are no boxes of their own."""
    if layer.type == "ELEMENTWISE":
        symbol = SYMBOLS.get(layer.attributes["op"], layer.attributes["op"])
        return " ".join([symbol, *(f"{values[name]:g}" for name in layer.inputs if name in values)])
    if "values" in layer.attributes:
        return f"CONSTANT\n{layer.attributes['values'][0]:g}"
    if "weight" in layer.attributes:
        parts = layer.attributes["weight"].split(".")
        return "CONSTANT\n" + ".".join(parts[-4 if parts[-3:][0].isdigit() else -3 :])
    kind = layer.attributes.get("kind") or layer.attributes.get("op")
    return f"{layer.type}\n{kind}" if kind else layer.type


def _colour(layer: Layer) -> str:
    return CONSTANT if layer.type == "CONSTANT" else COMPUTED


# Placing: rows by the longest path; long edges get bends; each row is ordered by the mean place of its neighbors.


def _rows(nodes: list[Node]) -> list[list[Node]]:
    for node in nodes:
        node.row = max((source.row + 1 for source in node.inputs), default=0)
    for node in reversed(nodes):  # a source goes right above its first user
        if not node.inputs and node.users:
            node.row = min(user.row for user in node.users) - 1
    rows: list[list[Node]] = [[] for _ in range(1 + max(node.row for node in nodes))]
    for node in nodes:
        rows[node.row].append(node)
        for i, source in enumerate(node.inputs):
            for row in range(source.row + 1, node.row):
                bend = Node("", INPUT, inputs=[source], row=row)
                source.users = [bend if user is node else user for user in source.users]
                bend.users, node.inputs[i] = [node], bend
                rows[row].append(bend)
                source = bend
    return rows


def _place(rows: list[list[Node]]) -> None:
    for row in rows:
        _settle(row, [float(i) for i in range(len(row))])
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            wanted = {id(n): _mean(n.inputs if down else n.users, n.x) for n in row}
            row.sort(key=lambda node: wanted[id(node)])
            _settle(row, [wanted[id(node)] for node in row])
    for row in [*rows, *reversed(rows)]:
        _settle(row, [_mean(node.inputs + node.users, node.x) for node in row])


def _mean(nodes: Iterable[Node], default: float) -> float:
    """Their mean place; constants do not count, so that they stand beside the computation."""
    places = [node.x for node in nodes if node.colour != CONSTANT]
    return float(np.mean(places)) if places else default


def _settle(row: list[Node], wanted: list[float]) -> None:
    """Move each node to where it wants to be, as far as the widths of its neighbors allow."""
    offsets = np.cumsum([0.0, *((a.width + b.width) / 2 + GAP for a, b in pairwise(row))])
    weights = [0.01 if node.colour == CONSTANT else 1.0 for node in row]
    blocks: list[list[tuple[float, float]]] = []  # nodes that touch are shifted together
    for wish in zip(np.asarray(wanted) - offsets, weights, strict=True):
        blocks.append([wish])
        while len(blocks) > 1 and _shift(blocks[-2]) > _shift(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    shifts = [_shift(block) for block in blocks for _ in block]
    for node, shift, offset in zip(row, shifts, offsets, strict=True):
        node.x = shift + offset


def _shift(block: list[tuple[float, float]]) -> float:
    places, weights = zip(*block, strict=True)
    return float(np.average(places, weights=weights))


def _edge_colour(node: Node) -> str:
    while not node.label:
        (node,) = node.inputs
    return GREEN if len(node.users) >= MANY else BLACK


def _draw(axes, node: Node) -> None:
    for source in node.inputs:
        colour = _edge_colour(source)
        ends = (source.x, source.row + _half(source)), (node.x, node.row - _half(node))
        if node.label:
            head = dict(arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, color=colour, linewidth=0.9)
            axes.add_patch(FancyArrowPatch(*ends, **head))
        else:
            axes.plot(*zip(*ends, strict=True), color=colour, linewidth=0.9)
    if not node.label:
        return
    text = dict(ha="center", va="center", fontsize=8.5, zorder=4)
    if len(node.label) > 1:
        frame = FancyBboxPatch(
            (node.x - node.width / 2, node.row - _half(node)), node.width, 2 * _half(node), zorder=3, linewidth=0.8,
            boxstyle="round,pad=0,rounding_size=0.1", facecolor=node.colour, edgecolor="#555555",
        )  # fmt: skip
        axes.add_patch(frame)
        axes.text(node.x, node.row, node.label, **text)
    else:
        circle = dict(boxstyle="circle,pad=0.15", facecolor=node.colour, edgecolor="#555555")
        axes.text(node.x, node.row, node.label, bbox=circle, **text)


def _half(node: Node) -> float:
    if not node.label:
        return 0.0
    return 0.19 if len(node.label) == 1 else 0.17 + 0.1 * node.label.count("\n")
