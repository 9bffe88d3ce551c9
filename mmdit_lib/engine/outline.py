"""Outlining: transformer blocks of one kind become one function, called once per block.

A whole MMDiT takes `torch.compile` more than a minute; its two or three kinds of block take seconds.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from itertools import groupby

import torch
from torch import fx

BLOCK = re.compile(r"transformer_blocks\.(\d+)\b")


def outline_blocks(module: fx.GraphModule, compile: Callable = lambda f: f) -> fx.GraphModule:
    """Rewrite a lowered graph: each block is a call of the function of its kind, with its weights as arguments.

    Args:
        compile: applied to the function of every kind.
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
    for block, members in groupby((n for n in nodes if n.op != "get_attr"), key=block_of):
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


def block_of(node: fx.Node) -> str | None:
    found = BLOCK.match(node.meta.get("tensor", "")) if node.op == "call_function" else None
    return found and found[1]


def boundary(members: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a block takes from outside, in the order of use, and what is used outside of it."""
    inside = set(members)
    inputs = dict.fromkeys(n for member in members for n in member.all_input_nodes if n not in inside)
    outputs = [member for member in members if any(user not in inside for user in member.users)]
    return list(inputs), outputs


def signature(members: list[fx.Node], inputs: list[fx.Node]) -> str:
    """The same for blocks that do the same with other weights."""
    index = {node: i for i, node in enumerate([*inputs, *members])}
    lines = []
    for node in members:
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{index[n]}")
        lines.append(f"{node.target.__name__}{arguments}")
    return "\n".join(lines)


def subgraph(members: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"x{i}") for i, node in enumerate(inputs)}
    for node in members:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return graph
