"""Reading a model's original single-file layout as diffusers' tensors.

diffusers' conversion function runs on row numbers instead of weights. Because it only moves entire rows,
its result says which bytes of the file make up each tensor, and these are read when needed.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

import torch

from ..architecture import SingleFile
from .tensor_file import StoredTensor


def is_layout(tensors: dict[str, StoredTensor], layout: SingleFile) -> bool:
    return any(name.removeprefix(layout.prefix).startswith(layout.marker) for name in tensors)


def as_diffusers(tensors: dict[str, StoredTensor], layout: SingleFile, path: Path) -> dict[str, StoredTensor]:
    """The transformer in a single file, by diffusers' names; VAE and text encoders in the file are ignored.

    Raises:
        ValueError: naming a tensor that is missing or unknown to diffusers, or if diffusers cannot convert the rest.
    """
    if any(name.startswith(layout.prefix) for name in tensors):
        tensors = {name.removeprefix(layout.prefix): t for name, t in tensors.items() if name.startswith(layout.prefix)}
    rows = _Rows(tensors)
    left = dict(rows.numbers)
    try:
        converted = layout.to_diffusers(left)
    except KeyError as error:
        raise ValueError(f"{path}: missing tensor '{error.args[0]}'") from None
    except (ValueError, IndexError, TypeError, RuntimeError, AttributeError) as error:  # it checks nothing itself
        raise ValueError(f"{path}: diffusers cannot convert these tensors: {error}") from None
    if left:
        raise ValueError(f"{path}: unknown tensor '{next(iter(left))}'")
    return {name: rows.tensor(numbers) for name, numbers in converted.items()}


class _Rows:
    """Numbers every row (index of dim 0) of every tensor, with a gap between tensors."""

    def __init__(self, tensors: dict[str, StoredTensor]):
        self.tensors = list(tensors.values())
        self.first: list[int] = []
        self.numbers: dict[str, torch.Tensor] = {}
        end = 0
        for name, tensor in tensors.items():
            count = tensor.shape[0] if tensor.shape else 1
            self.first.append(end)
            self.numbers[name] = torch.arange(end, end + count)
            end += count + 1

    def tensor(self, numbers: torch.Tensor) -> StoredTensor:
        """The tensor that consists of these rows, in this order."""
        breaks = (numbers.diff() != 1).nonzero().flatten() + 1
        runs = numbers.tensor_split(breaks.tolist())
        sources = [bisect_right(self.first, int(run[0])) - 1 for run in runs]
        like = self.tensors[sources[0]]
        assert all(self.tensors[s].code == like.code and self.tensors[s].path == like.path for s in sources)
        spans = [self._span(source, run) for source, run in zip(sources, runs, strict=True)]
        return StoredTensor(like.path, like.code, (len(numbers), *like.shape[1:]), tuple(spans))

    def _span(self, source: int, run: torch.Tensor) -> tuple[int, int]:
        tensor = self.tensors[source]
        row = tensor.nbytes // (tensor.shape[0] if tensor.shape else 1)
        ((offset, _),) = tensor.spans
        return offset + (int(run[0]) - self.first[source]) * row, len(run) * row
