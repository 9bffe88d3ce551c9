"""float32 means float32: on a GPU, PyTorch would otherwise run some of it in TF32 (10 bits of mantissa)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock

import torch

_lock = Lock()
_inside = 0
"""How many `without_tf32` blocks are running, in all threads: the switches are the process's."""
_restore: list[Callable[[], None]] = []


@contextmanager
def without_tf32() -> Iterator[None]:
    """TF32 off for matrix products and for cuDNN's convolutions, which use it by default."""
    global _inside
    with _lock:
        if _inside == 0:
            _restore.extend(_switch_off())
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            while _restore and _inside == 0:
                _restore.pop(0)()


def _switch_off() -> list[Callable[[], None]]:
    """Switch TF32 off; returns what restores the state before, in this order."""
    cudnn, precision = torch.backends.cudnn, _matmul_precision()
    older = precision is not None and {torch.backends.fp32_precision, cudnn.fp32_precision} == {"none"}
    if older and precision == "highest":
        if not cudnn.allow_tf32:
            return []
        cudnn.allow_tf32 = False
        return [partial(setattr, cudnn, "allow_tf32", True)]
    # With the names that torch has had since 2.9. Once a program has used them, torch refuses to read the older ones.
    switches = torch.backends.cuda.matmul, cudnn.conv, torch.backends.mkldnn.matmul
    before = [partial(setattr, switch, "fp32_precision", switch.fp32_precision) for switch in switches]
    if precision not in (None, "highest"):
        torch.set_float32_matmul_precision("highest")
        before.insert(0, partial(torch.set_float32_matmul_precision, precision))
    for switch in switches:
        switch.fp32_precision = "ieee"
    return before


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
