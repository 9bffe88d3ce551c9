"""Sending tensors between MPI processes outside the network, as plain bytes over MPI."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

from .faults import wait

Tensors = dict[str, torch.Tensor]


def broadcast(world, tensors: Tensors | None, device: torch.device) -> Tensors:
    """Rank 0's tensors by name, on every rank. Waiting ranks sleep.

    Args:
        world: MPI's communicator of all ranks.
        tensors: on rank 0; None elsewhere.
        device: device of the results.
    """
    if world.size == 1:
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    head, body = b"", np.empty(0, np.uint8)
    if tensors is not None:
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        head = json.dumps({n: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in kept.items()}).encode()
        body = np.concatenate([t.view(torch.uint8).numpy().reshape(-1) for t in kept.values()])
    sizes = np.array([len(head), body.size], np.int64)
    wait(world.Ibcast(sizes))
    head = np.frombuffer(bytearray(head) or bytearray(int(sizes[0])), np.uint8)
    body = body if world.rank == 0 else np.empty(int(sizes[1]), np.uint8)
    wait(world.Ibcast(head))
    wait(world.Ibcast(body))
    found, start = {}, 0
    for name, (dtype, shape) in json.loads(head.tobytes()).items():
        target = torch.empty(shape, dtype=getattr(torch, dtype))
        part = torch.from_numpy(body[start : start + target.nbytes].copy())
        found[name] = part.view(target.dtype).reshape(shape).to(device)
        start += target.nbytes
    return found


def check_equal(world, tensor: torch.Tensor, what: str) -> None:
    """Raises `RuntimeError` on every rank if the ranks' tensors are not bitwise equal."""
    digest = hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    everyone = world.allgather(digest)
    differ = [rank for rank, found in enumerate(everyone) if found != everyone[0]]
    if differ:
        raise RuntimeError(f"rank {differ[0]} has different {what} from rank 0: the ranks did not compute the same")
