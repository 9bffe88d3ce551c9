"""The ranks that run one engine folder, their devices and process groups."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from ..config import Layout, RankMapping
from .faults import START_SECONDS, abort_on_error, start_mpi
from .heartbeat import doing, watch
from .launch import check_launch

COLLECTIVE_SECONDS = 600

log = logging.getLogger("mmdit_lib")

Groups = dict[tuple[int, ...], str]


class SharedFolder(Protocol):
    """The folder that all ranks run: an engine folder."""

    path: Path
    layout: Layout

    def fingerprint(self) -> dict[str, str]:
        """What must be the same on all ranks: part -> checksum."""


@dataclass
class Team:
    """This process as one of the ranks of an engine folder."""

    rank: int
    mapping: RankMapping
    device: torch.device
    groups: Groups = field(default_factory=dict)
    """Process group names, by ranks."""

    def agree(self, what: str, value: str) -> None:
        """Raises `ValueError` on every rank if the ranks have different values. Every rank must call it."""
        everyone = start_mpi().COMM_WORLD.allgather(value)
        if len(set(everyone)) > 1:
            found = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(everyone))
            raise ValueError(f"the ranks do not agree on the {what} ({found}): give the same one to all of them")

    def nccl_communicator(self):
        """The `ncclComm_t` of all ranks as a capsule, for `IExecutionContext.set_communicator`.

        Setting it is collective, so every rank must open its plan at the same time.
        Written against TensorRT 11's documentation; not yet run with it. Raises `ValueError` without NCCL.
        """
        if self.device.type != "cuda":
            raise ValueError("TensorRT's collectives run over NCCL, which needs CUDA devices; use backend pytorch")
        backend = dist.distributed_c10d._get_default_group()._get_backend(self.device)
        if not hasattr(backend, "_comm_ptr"):
            raise ValueError(f"torch {torch.__version__} does not expose its NCCL communicator; use backend pytorch")
        dist.barrier(device_ids=[self.device.index])  # torch creates the communicator on first use
        return capsule(backend._comm_ptr())


def capsule(pointer: int):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(pointer, None, None)


_team: Team | None = None
_groups: Groups = {}


def current() -> Team | None:
    """The team that this process joined last; None if it is in none."""
    return _team


def join(
    folder: SharedFolder,
    device: str | torch.device | None = None,
    *,
    seconds: float = START_SECONDS,
    heartbeat: float | None = None,
) -> Team:
    """Form a team from the ranks of this mpirun or ipyparallel cluster. Every rank must call it.

    It can be called again, also with another folder for the same number of ranks: process groups are reused.

    Args:
        folder: the engine folder; its files must be the same on all ranks.
        device: cuda or cpu; by default CUDA if available. The ranks on a machine take its GPUs in order.
        seconds: how long to wait for the slowest rank.
        heartbeat: seconds after which a rank that is frozen or unreachable ends all ranks; 0: never. By default
            as set before, at first `HEARTBEAT_SECONDS`.

    Raises:
        ValueError: on every rank, before any collective: the number of ranks is not the folder's, or
            the ranks' folders differ.
        TimeoutError: a rank did not join.
    """
    global _team
    MPI = start_mpi(seconds)
    abort_on_error()
    with doing("joining"):
        watch(MPI.COMM_WORLD, seconds, heartbeat)
        _team = form_team(MPI, folder, device)
    return _team


def form_team(MPI, folder: SharedFolder, device: str | torch.device | None) -> Team:
    """Compare the ranks' folders and devices, and start `torch.distributed`."""
    world = MPI.COMM_WORLD
    # All ranks compare the same data, so either all of them raise or none.
    everyone = world.allgather((str(folder.path), folder.fingerprint()))
    check_launch(folder.layout, world.size, folder.path)
    check_same(everyone)
    mapping = folder.layout.at(world.rank)
    here = world.Split_type(MPI.COMM_TYPE_SHARED)
    place = device_of(device, here.rank, here.size)
    # Each rank checked its own machine: the device types must match.
    kinds = world.allgather(place.type)
    if len(set(kinds)) > 1:
        raise ValueError(f"the ranks found different devices ({', '.join(kinds)}): give cuda or cpu")
    if (scattered := order_of_hosts(world.allgather(socket.gethostname()))) and world.rank == 0:
        log.warning(scattered)
    start_torch(world, place, one_machine=here.size == world.size)
    here.Free()
    return Team(world.rank, mapping, place, make_groups(mapping))


def leave() -> None:
    """Dissolve the team. Every rank must call it; a later `join` starts afresh."""
    global _team
    _team = None
    _groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def check_same(everyone: list[tuple[str, dict[str, str]]]) -> None:
    first_path, first = everyone[0]
    for rank, (path, parts) in enumerate(everyone):
        differ = sorted(name for name in first.keys() | parts.keys() if first.get(name) != parts.get(name))
        if differ:
            raise ValueError(
                f"rank {rank}'s engine folder {path} is not rank 0's {first_path}: they differ in {differ[0]}"
                + (f" and {len(differ) - 1} more" if len(differ) > 1 else "")
            )


def device_of(device: str | torch.device | None, local_rank: int, local_size: int) -> torch.device:
    """This rank's device: its own GPU, or the CPU."""
    asked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if asked.type != "cuda":
        return asked
    found = torch.cuda.device_count()
    if local_size > found:
        raise ValueError(
            f"{local_size} ranks run on this machine, which has {found} GPUs: NCCL needs one for each rank"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen


def start_torch(world, device: torch.device, *, one_machine: bool) -> None:
    """`torch.distributed` over gloo (CPU) and NCCL (CUDA), with a store on rank 0.

    Rank 0 picks a free port and broadcasts it over MPI. Across machines, all of them must be able to resolve
    rank 0's host name; if they cannot, set MASTER_ADDR to an address that they can reach.
    """
    if dist.is_initialized():
        if device.type == "cpu" or "nccl" in dist.get_backend_config():
            return
        leave()
    host = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if one_machine else socket.getfqdn())
    store = None
    if world.rank == 0:
        store = dist.TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False)
    host, port = world.bcast((host, store.port) if store else None)
    if store is None:
        store = dist.TCPStore(host, port, world.size, is_master=False)
    options = {"device_id": device} if device.type == "cuda" else {}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout, **options)


def order_of_hosts(hosts: list[str]) -> str | None:
    """A warning if consecutive ranks, which form the tp groups, alternate between hosts. It is slow, not wrong."""
    changes = sum(host != before for before, host in pairwise(hosts))
    if changes < len(set(hosts)):
        return None
    return f"the ranks alternate between hosts ({', '.join(hosts)}), which is slow: use mpirun --map-by slot"


def make_groups(mapping: RankMapping) -> Groups:
    """Every tp, cp and output group of the layout. All ranks create all of them, in the same order."""
    wanted = {group for other in mapping.layout.ranks() for group in other.groups}
    for ranks in sorted(group for group in wanted if len(group) > 1):
        if ranks not in _groups:
            group = dist.new_group(ranks)
            _groups[ranks] = group.group_name if mapping.rank in ranks else ""
    return {ranks: name for ranks, name in _groups.items() if mapping.rank in ranks}
