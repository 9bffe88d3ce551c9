"""float32 means float32: on a GPU, PyTorch would otherwise run some of it in TF32 (10 bits of mantissa)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_lock = Lock()
_inside = 0
"""How many `without_tf32` blocks are running, in all threads: the switches are the process's."""
_before: list[tuple] = []


@contextmanager
def without_tf32() -> Iterator[None]:
    """TF32 off for matrix products and for cuDNN's convolutions, which use it by default."""
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = _switches()
            for switch, name, _, off in _before:
                setattr(switch, name, off)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for switch, name, value, _ in _before:
                    setattr(switch, name, value)


def _switches() -> list[tuple]:
    """Each switch, the name of its attribute, its value, and its value without TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        return [(switch, "allow_tf32", switch.allow_tf32, False) for switch in (matmul, cudnn)]
    except RuntimeError:  # a program has used torch 2.9's names, and torch refuses both in one program
        return [(switch, "fp32_precision", switch.fp32_precision, "ieee") for switch in (matmul, cudnn.conv)]
