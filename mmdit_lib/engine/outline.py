"""Outlining: all blocks of one kind become one function, called once per block.

`torch.compile` takes more than a minute for a full MMDiT, but seconds for its two or three kinds of block.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from itertools import groupby

import torch
from torch import fx


def outline_blocks(module: fx.GraphModule, blocks: str, compile: Callable = lambda f: f) -> fx.GraphModule:
    """Rewrite a lowered graph so that each block calls the function of its kind, with its weights as arguments.

    Args:
        blocks: path of the module list, for instance 'transformer_blocks'.
        compile: applied to the function of each kind.
    """
    root = torch.nn.Module()
    for name, buffer in module.named_buffers():
        root.register_buffer(name, buffer)
    target = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    kinds: dict[str, str] = {}
    nodes = list(module.graph.nodes)
    for node in nodes:  # weights first: a block takes them all as arguments
        if node.op == "get_attr":
            copies[node] = target.node_copy(node)
    number = re.compile(rf"{re.escape(blocks)}\.(\d+)\b")
    for block, members in groupby((n for n in nodes if n.op != "get_attr"), key=lambda n: block_of(n, number)):
        if block is None:
            for node in members:
                copies[node] = target.node_copy(node, copies.__getitem__)
            continue
        members = list(members)
        inputs, outputs = boundary(members)
        kind = signature(members, inputs)
        if kind not in kinds:
            kinds[kind] = f"block_kind_{len(kinds)}"
            function = fx.GraphModule(torch.nn.Module(), subgraph(members, inputs, outputs))
            root.add_module(kinds[kind], compile(function))
        call = target.call_module(kinds[kind], tuple(copies[n] for n in inputs))
        for i, node in enumerate(outputs):
            copies[node] = target.call_function(operator.getitem, (call, i))
    return fx.GraphModule(root, target)


def block_of(node: fx.Node, number: re.Pattern) -> str | None:
    found = number.match(node.meta.get("tensor", "")) if node.op == "call_function" else None
    return found and found[1]


def boundary(members: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """A block's inputs, in order of use, and its outputs (values used outside it)."""
    inside = set(members)
    inputs = dict.fromkeys(n for member in members for n in member.all_input_nodes if n not in inside)
    outputs = [member for member in members if any(user not in inside for user in member.users)]
    return list(inputs), outputs


def signature(members: list[fx.Node], inputs: list[fx.Node]) -> str:
    """Equal for blocks that differ only in their weights."""
    index = {node: i for i, node in enumerate([*inputs, *members])}
    lines = []
    for node in members:
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{index[n]}")
        lines.append(f"{node.target!r}{arguments}")
    return "\n".join(lines)


def subgraph(members: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"x{i}") for i, node in enumerate(inputs)}
    for node in members:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return graph
