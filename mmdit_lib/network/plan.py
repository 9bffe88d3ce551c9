"""The tensor-parallel plan, as data: which linear layer is cut along which dimension.

In diffusers' words. `colwise` cuts weight and bias on dim 0 (output features), `rowwise` cuts the
weight on dim 1 (input features) and adds the whole bias once, after the all-reduce;
`colwise_gather` is colwise with the output gathered at once, as upstream does it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch

from ..config import TpLayout

Style = Literal["colwise", "colwise_gather", "rowwise", "replicated"]


class Rule(NamedTuple):
    pattern: str
    style: Style
    reason: str


HEADS = "every rank holds its own heads"
MEGATRON: tuple[Rule, ...] = (
    Rule("*.attn*.to_[qkv]", "colwise", HEADS),
    Rule("*.attn.add_[qkv]_proj", "colwise", HEADS),
    Rule("*.attn*.to_out.0", "rowwise", "heads come back together in one all-reduce"),
    Rule("*.attn.to_add_out", "rowwise", "heads come back together in one all-reduce"),
    Rule("*.attn*.norm_*", "replicated", "one weight per head channel, the same for every head"),
    Rule("*.ff*.net.0.proj", "colwise", "GELU acts element by element, so the hidden features stay cut"),
    Rule("*.ff*.net.1", "rowwise", "one all-reduce per MLP"),
    Rule("*.norm1*.linear", "replicated", "a vector per sample: gathering it costs more than computing it"),
    Rule("norm_out.linear", "replicated", "a vector per sample: gathering it costs more than computing it"),
    Rule("time_text_embed.*", "replicated", "a vector per sample: reducing it costs more than computing it"),
    Rule("context_embedder", "replicated", "its output is the text stream, which every tp rank needs whole"),
    Rule("pos_embed*", "replicated", "its output is the image stream, which every tp rank needs whole"),
    Rule("proj_out", "replicated", "patch_size^2 * channels rows: too few to cut"),
)

# TensorRT-LLM <= 1.2.1: a gather after nearly every layer, 2.5 times the MLP's traffic and 1.6 to
# 1.8 times a whole step's (`mmdit traffic`). Written and read so that its users' checkpoints stay
# exchangeable.
TRTLLM: tuple[Rule, ...] = (
    Rule("*.ff*.net.0.proj", "colwise_gather", "upstream"),
    Rule("*.ff*.net.1", "colwise_gather", "upstream"),
    Rule("*.norm1.linear", "colwise_gather", "upstream"),
    Rule("time_text_embed.*.linear_1", "colwise", "upstream"),
    Rule("time_text_embed.*.linear_2", "rowwise", "upstream"),
    Rule("context_embedder", "colwise_gather", "upstream"),
    Rule("proj_out", "colwise_gather", "upstream"),
    *MEGATRON,
)

PLANS: dict[TpLayout, tuple[Rule, ...]] = {"megatron": MEGATRON, "trtllm": TRTLLM}


def rule_for(module: str, layout: TpLayout) -> Rule:
    """The first rule whose pattern fits a module's path, for instance 'transformer_blocks.0.ff.net.1'."""
    for rule in PLANS[layout]:
        if fnmatchcase(module, rule.pattern):
            return rule
    raise ValueError(f"no rule of the {layout} plan covers '{module}'")


def cut_dim(tensor: str, layout: TpLayout) -> int | None:
    """The dimension along which a checkpoint tensor is cut over the tp ranks, or None."""
    module, _, kind = tensor.rpartition(".")
    style = rule_for(module, layout).style
    if style.startswith("colwise"):
        return 0
    return 1 if style == "rowwise" and kind == "weight" else None


def local_shape(tensor: str, shape: tuple[int, ...], layout: TpLayout, tp_size: int) -> tuple[int, ...]:
    """The shape of one tp rank's part of a checkpoint tensor of full `shape`."""
    dim = cut_dim(tensor, layout)
    return tuple(size // tp_size if i == dim else size for i, size in enumerate(shape))


def shard(name: str, tensor: torch.Tensor, layout: TpLayout, tp_size: int, tp_rank: int) -> torch.Tensor:
    """One tp rank's part of the full tensor `name` (a view)."""
    dim = cut_dim(name, layout)
    return tensor if dim is None else tensor.chunk(tp_size, dim)[tp_rank]
