"""Memory that the ranks of a group, on one machine, read and write directly: torch's symmetric memory.

A kernel that produces data for other ranks either stores it in their memory, or leaves it in this rank's memory for
them to load; a barrier on the GPU follows. No other kernel or copy is needed. Exchanges alternate between two slots:
while a slow rank still reads one, a fast rank can write the other, and the barrier keeps it from getting further ahead.
"""

from __future__ import annotations

import os
import socket
from math import prod
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist


class Slot:
    """A buffer of the same size on each rank.

    Attributes:
        addresses: its address on each rank, [ranks] int64 on this rank's GPU, as seen by this rank's kernels.
    """

    def __init__(self, nbytes: int, group: str, device: torch.device):
        import torch.distributed._symmetric_memory as symmetric_memory

        self.memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize(device)  # the others may write as soon as the handles are exchanged
        self.handle = symmetric_memory.rendezvous(self.memory, group)
        self.addresses = torch.tensor(self.handle.buffer_ptrs, dtype=torch.int64, device=device)

    def view(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The beginning of this rank's buffer."""
        return self.memory[: prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def barrier(self) -> None:
        """Make the GPU wait until all ranks' GPUs get here; it then sees what they have written."""
        self.handle.barrier()


class Exchange:
    """The slots of one group. All ranks must ask for the same sizes in the same order."""

    def __init__(self, group: str, device: torch.device):
        self.group, self.device = group, device
        self.rank = dist.get_rank(dist.distributed_c10d._resolve_process_group(group))
        self._pairs: dict[int, tuple[Slot, Slot]] = {}
        self._turn = 0

    def slot(self, nbytes: int, *, first: bool) -> Slot:
        """The slot for the next exchange.

        Args:
            first: whether this is the step's first exchange. The ranks then wait for each other, because the previous
                step may have had an odd number of exchanges.
        """
        found = min((size for size in self._pairs if size >= nbytes), default=None)
        if found is None:
            found = -(-nbytes // 2**21) * 2**21
            self._pairs[found] = tuple(Slot(found, self.group, self.device) for _ in range(2))
        pair = self._pairs[found]
        if first:
            pair[0].barrier()
            self._turn = 0
        self._turn ^= 1
        return pair[self._turn]


_exchanges: WeakKeyDictionary[dist.ProcessGroup, Exchange | None] = WeakKeyDictionary()


def exchange(x: torch.Tensor, group: str) -> Exchange | None:
    """The exchange of the process group with this name; None if its ranks cannot reach each other's memory.

    The first call for a group is collective.
    """
    if not x.is_cuda:
        return None
    ranks = dist.distributed_c10d._resolve_process_group(group)
    if ranks not in _exchanges:
        _exchanges[ranks] = _open(group, ranks, x.device)
    return _exchanges[ranks]


def _open(group: str, ranks: dist.ProcessGroup, device: torch.device) -> Exchange | None:
    # NVLink multicast is not used here, and its setup fails on some machines.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    places = [None] * ranks.size()
    mine = (socket.gethostname(), device.index)
    dist.all_gather_object(places, mine, group=ranks)
    peers = [index for _, index in places if index != device.index]
    direct = {host for host, _ in places} == {mine[0]} and all(
        torch.cuda.can_device_access_peer(device.index, peer) for peer in peers
    )
    opened = torch.tensor(float(direct), device=device)
    dist.all_reduce(opened, dist.ReduceOp.MIN, group=ranks)
    if not opened.item():
        return None
    made = Exchange(group, device)
    try:
        made.slot(1, first=True)
    except (RuntimeError, ImportError):
        opened.zero_()
    dist.all_reduce(opened, dist.ReduceOp.MIN, group=ranks)
    return made if opened.item() else None
