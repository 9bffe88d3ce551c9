"""Maps tensor and module names between diffusers and this library, which uses TensorRT-LLM's.

Only the feed-forward differs: diffusers' `net.1` is a dropout, which has no weights and no counterpart
here, so the second linear layer is `net.2` there and `net.1` here.
"""

from __future__ import annotations

import re

_FEED_FORWARD = re.compile(r"^(transformer_blocks\.\d+\.(?:ff|ff_context)\.net\.)([12])(?=\.|$)")


def from_diffusers(name: str) -> str:
    """Our name for diffusers' tensor or module `name`; raises `ValueError` if there is none."""
    return _renumber(name, "2", "1", "diffusers numbers a feed-forward's dropout 1 and its second linear layer 2")


def to_diffusers(name: str) -> str:
    """diffusers' name for our tensor or module `name`; raises `ValueError` if there is none."""
    return _renumber(name, "1", "2", "a feed-forward's second linear layer is number 1 here, 2 in diffusers")


def _renumber(name: str, old: str, new: str, why: str) -> str:
    match = _FEED_FORWARD.match(name)
    if match is None:
        return name
    if match[2] != old:
        raise ValueError(f"unknown tensor or module '{name}': {why}")
    return f"{match[1]}{new}{name[match.end() :]}"
