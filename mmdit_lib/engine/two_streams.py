"""The text's share of a block on a second CUDA stream, beside the image's, in steps that are replayed as CUDA graphs.

FlashAttention-3 gives each of a GPU's multiprocessors one tile of queries at a time. For one image of SD3.5-medium at
1024x1024, the queries of image and text are 4.4 tiles for each multiprocessor, so in the fifth round most of them are
idle. Those of the image alone are 4 tiles: the text's attention then runs beside the image's GEMMs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import ceil

import torch
from torch import fx

from . import kernels, torch_ops
from .attention import attention, has_flash_attention_3

ROWS, CHANNELS = 192, 96
"""Queries in a tile of FlashAttention-3, for heads of up to so many channels."""
IDLE = 0.5
"""The text's attention runs beside other work if more than this part of the GPU would be idle in the last round."""


def two_streams(module: fx.GraphModule) -> fx.GraphModule:
    """A lowered graph in which what only depends on the text's rows of a joint attention runs on a second stream.

    It computes the same, bit for bit. What depends on neither stream is called before the attention, so that both can
    read it. Memory stays safe because a block's operators for the image are called before those for the text, which
    are followed by a wait: nothing is allocated on the first stream while the second one runs.
    """
    nodes = list(module.graph.nodes)
    joint = [i for i, node in enumerate(nodes) if _is_joint(node)]
    order, begins, enters, leaves = nodes[: joint[0] if joint else None], set(), set(), set()
    for start, end in zip(joint, [*joint, len(nodes)][1:], strict=True):
        attention, *rest = nodes[start:end]
        last = [rest.pop()] if rest and rest[-1].op == "output" else []
        parts = _parts(attention, rest)
        if parts:
            first, items, image, text = parts
            order += [*first, attention, *items, *image, *text, *last]
            begins.add(attention)
            enters.add(text[0])
            leaves.add(text[-1])
        else:
            order += [attention, *rest, *last]
    if not begins:
        return module
    graph, copies, begun = fx.Graph(), {}, None
    for node in order:
        if node in begins:
            begun = graph.call_function(begin, *fx.node.map_arg((node.args, node.kwargs), copies.__getitem__))
            copies[node] = graph.call_function(getattr, (begun, "result"))
            copies[node].meta = node.meta
            continue
        if node in enters:
            graph.call_function(enter, (begun,))
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in leaves:
            graph.call_function(leave, (begun,))
    return fx.GraphModule(module, graph)


def _is_joint(node: fx.Node) -> bool:
    """Attention over image and text, without the communication that it has on several ranks."""
    if node.target is not kernels.projected_attention:
        return False
    return len(node.args) // (node.kwargs["inputs"] + 2) == 2


def _parts(attention: fx.Node, nodes: list[fx.Node]) -> tuple[list[fx.Node], ...] | None:
    """`nodes`, which follow a joint attention, in four parts; None if they cannot be separated.

    Those that depend on neither stream's rows, which both may read; the ITEMs of the attention, if it has two results;
    those that depend on the image's rows; on the text's.
    """
    items = [node for node in attention.users if node.target is torch_ops.item]
    joint = next((node for node in items if node.kwargs["index"] == 0), attention)
    slices = [node for node in joint.users if node.kwargs.get("axes") == [2]]
    if len(slices) != 2 or len(joint.users) != 2 or slices[0].args[1:2] != ((0,),):  # the last block has no text
        return None
    image, text = (_after({rows}, nodes) for rows in slices)
    if image & text or any("group" in node.kwargs for node in (*image, *text)):  # several ranks
        return None
    if not _after({attention}, nodes) <= {attention, *items} | image | text:
        return None
    first = [node for node in nodes if node not in image | text and node not in items]
    return first, items, [node for node in nodes if node in image], [node for node in nodes if node in text]


def _after(found: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
    """`found` and all that depends on it among `nodes`."""
    for node in nodes:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


class Begun:
    """A joint attention whose text may still be missing.

    Attributes:
        result: of `kernels.projected_attention`.
        text: computes the text's rows; None if all rows are there.
        device: where.
    """

    def __init__(self, result: kernels.Attended, device: torch.device, text: Callable[[], torch.Tensor] | None = None):
        self.result, self.device, self.text = result, device, text
        if text:
            self.main, self.ready = torch.cuda.current_stream(device), torch.cuda.Event()
            self.ready.record(self.main)


def begin(*streams, inputs: int, heads: int, eps: float, scale: float, to_type: str | None = None) -> Begun:
    """`kernels.projected_attention`, or only the image's rows if the text's may follow later."""
    options = dict(inputs=inputs, heads=heads, eps=eps)
    x, weight, bias, c = streams[0], streams[1], streams[inputs - 1], streams[inputs + 2]
    (batch, image), text, size = x.shape[:2], c.shape[1], weight.shape[-2] // (3 * heads)
    known = bias.dtype == torch.bfloat16 and size <= CHANNELS and size % 16 == 0
    known = known and kernels.on_gpu(x) and has_flash_attention_3(x.device)
    if not known or not worthwhile(batch, heads, image, text, processors_of(x.device)):
        return Begun(kernels.projected_attention(*streams, **options, scale=scale, to_type=to_type), x.device)
    q, k, v, v_scale, mean = kernels.projected_heads(*streams, **options)
    out = torch.empty(image + text, batch, heads, size, dtype=torch.bfloat16, device=x.device).permute(1, 2, 0, 3)

    def attend(rows: slice) -> torch.Tensor:
        return attention(q[:, :, rows], k, v, scale, v_scale, out[:, :, rows])

    attend(slice(image))
    return Begun(out if mean is None else (out, mean), x.device, lambda: attend(slice(image, None)))


@cache
def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def worthwhile(batch: int, heads: int, image: int, text: int, processors: int) -> bool:
    """Whether all tokens leave most of the GPU idle in the last round, and the image's tokens need fewer rounds.

    In each round, every multiprocessor computes one tile of `ROWS` queries of a head.
    """
    everything, without = (batch * heads * ceil(tokens / ROWS) / processors for tokens in (image + text, image))
    return ceil(everything) - everything > IDLE and ceil(without) < ceil(everything)


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def enter(begun: Begun) -> None:
    """What follows is for the text: it runs on the second stream, once the image's attention is done."""
    if begun.text:
        second = _second(begun.device)
        second.wait_event(begun.ready)
        torch.cuda.set_stream(second)
        begun.text()


def leave(begun: Begun) -> None:
    """What follows runs on the first stream, after all of the second."""
    if begun.text:
        torch.cuda.set_stream(begun.main)
        begun.main.wait_stream(_second(begun.device))


@contextmanager
def on_one_stream_again(device: torch.device) -> Iterator[None]:
    """After an exception inside, the stream from before is the current one again, as the end of a capture needs."""
    main = torch.cuda.current_stream(device)
    try:
        yield
    except BaseException:
        if torch.cuda.current_stream(device) != main:
            torch.cuda.set_stream(main)
            main.wait_stream(_second(device))
        raise
