"""Reading a checkpoint's full tensors from any number of rank files."""

from __future__ import annotations

import math

import torch

from ..config import TORCH_DTYPES
from .folder import Checkpoint
from .tensor_file import read_header


class RankFiles:
    """The full tensors of a checkpoint, read from its rank files one at a time.

    Attributes:
        paths: of the rank files.
        nbytes: of all tensors together.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.paths = [checkpoint.path / name for name in checkpoint.rank_files]
        self._ranks = [read_header(path) for path in self.paths]
        self._sharding = checkpoint.architecture.shardings[checkpoint.layout.tp_layout]
        self._shapes = checkpoint.architecture.parameters(checkpoint.model)
        self._dtype = TORCH_DTYPES[checkpoint.dtype]
        sizes = [math.prod(shape) * self._dtype.itemsize for shape in self._shapes.values()]
        self.nbytes = sum(sizes)
        self._full, self._part = (torch.empty(max(sizes), dtype=torch.uint8) for _ in range(2))

    def read(self, name: str) -> torch.Tensor:
        """The full tensor; its memory is reused by the next call.

        Raises `ValueError` if the ranks' copies of a replicated tensor differ.
        """
        dim, parts = self._sharding.shard_dim(name), [rank[name] for rank in self._ranks]
        if dim is None or len(parts) == 1:
            full = parts[0].read_into(self._full)
            for path, part in zip(self.paths[1:], parts[1:], strict=True):
                if not _same_bits(part.read_into(self._part), full):
                    raise ValueError(
                        f"{path}: tensor '{name}' differs from the copy in {self.paths[0].name}, but in the "
                        f"{self._sharding.name} layout every tp rank holds the same tensor"
                    )
            return full
        shape = self._shapes[name]
        full = self._full[: math.prod(shape) * self._dtype.itemsize].view(self._dtype).view(shape)
        for place, part in zip(full.chunk(len(parts), dim), parts, strict=True):
            place.copy_(part.read_into(self._part))
        return full


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
