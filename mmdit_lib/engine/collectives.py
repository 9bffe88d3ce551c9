"""TensorRT's collectives, by `torch.distributed`."""

from __future__ import annotations

import torch


def dist_collective(x, *, operation, group, size):
    """`group` is the name of a `torch.distributed` process group, `size` its number of ranks."""
    collective = torch.ops._c10d_functional
    x = x.contiguous()
    if operation == "ALL_REDUCE":
        y = collective.all_reduce(x, "sum", group)
    elif operation == "ALL_GATHER":
        y = collective.all_gather_into_tensor(x, size, group)
    else:
        rows = [x.shape[0] // size] * size
        y = collective.all_to_all_single(x, rows, rows, group)
    return collective.wait_tensor(y)


def without_ranks(x: torch.Tensor, operation: str, size: int) -> torch.Tensor:
    """An empty tensor shaped like the result of a collective over `size` ranks, for shape-only runs."""
    rows = x.shape[0] * (size if operation == "ALL_GATHER" else 1)
    return x.new_empty(rows, *x.shape[1:])
