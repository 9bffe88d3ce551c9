"""Safetensors files, one tensor at a time: plain reads and writes at known offsets.

The safetensors package maps the entire file, which becomes resident memory as it is read, and its
writer needs all tensors at once.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import STORED_DTYPES
from ..files import FileRecord

CODES = {names.safetensors: dtype for dtype, names in STORED_DTYPES.items()}
"""Our names for data types, by their code in the format."""
ITEM_SIZES = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_SIZES |= {names.safetensors: names.torch.itemsize for names in STORED_DTYPES.values()}
MAX_HEADER = 100_000_000
"""The format's limit, in bytes."""


class Stored(NamedTuple):
    """How a tensor is stored."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are: `spans` of (offset, length) in one file, concatenated."""

    path: Path
    code: str
    """Its dtype in the format, for instance 'BF16'."""
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(length for _, length in self.spans)

    @property
    def dtype(self) -> str | None:
        """The dtype as a config names it; None if it cannot be converted."""
        return CODES.get(self.code)

    def read_into(self, buffer: torch.Tensor) -> torch.Tensor:
        """Read the bytes into the start of `buffer` (uint8); returns a view with the right dtype and shape."""
        view = memoryview(buffer.numpy())
        end = 0
        with open(self.path, "rb", buffering=0) as file:
            for offset, length in self.spans:
                file.seek(offset)
                first, end = end, end + length
                while first < end:
                    count = file.readinto(view[first:end])
                    if not count:
                        raise ValueError(f"{self.path} became shorter while it was being read")
                    first += count
        return buffer[: self.nbytes].view(getattr(torch, self.dtype)).view(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises `ValueError` if it is truncated or not a safetensors file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file ({size} bytes)")
        if size < 8 + length:
            raise ValueError(f"{path} is truncated: its header alone takes {8 + length} bytes, found {size}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header does not parse ({error})") from None
    expected = max((offset + count for t in tensors.values() for offset, count in t.spans), default=8 + length)
    if size != expected:
        fault = "is truncated" if size < expected else "has bytes after its last tensor"
        raise ValueError(f"{path} {fault}: expected {expected} bytes, found {size}")
    return tensors


def _stored(path: Path, data: int, entry: dict) -> StoredTensor:
    (first, last), shape, code = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    item = ITEM_SIZES.get(code)  # others (8-bit floats, for instance) are refused later, by tensor name
    if first < 0 or last < first or (item and last - first != item * math.prod(shape)):
        raise ValueError(f"{last - first} bytes for {code} of shape {list(shape)}")
    return StoredTensor(path, code, shape, ((data + first, last - first),))


class TensorFileWriter:
    """Writes a safetensors file one tensor at a time, in the declared order, and computes its checksum."""

    def __init__(self, path: Path, tensors: dict[str, Stored]):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, (dtype, shape) in tensors.items():
            names = STORED_DTYPES[dtype]
            first, end = end, end + names.torch.itemsize * math.prod(shape)
            header[name] = {"dtype": names.safetensors, "shape": shape, "data_offsets": [first, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
        self.nbytes = 8 + len(text) + end
        self._path = path
        self._awaited = iter(tensors.items())
        self._sha256 = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 closed in __exit__
        self._put(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        found = Stored(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert (name, found) == next(self._awaited), f"{name} {found} is out of order"
        self._put(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))

    def _put(self, data: bytes | memoryview) -> None:
        hashed = self._hasher.submit(self._sha256.update, data)  # during the write: neither holds the GIL
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        finally:
            hashed.result()  # the caller reuses the memory

    def finish(self) -> FileRecord:
        """Flush the file to disk; returns its size and checksum."""
        assert next(self._awaited, None) is None, "tensors are missing"
        os.fsync(self._file.fileno())
        return FileRecord(self._path.name, self.nbytes, self._sha256.hexdigest())

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *exception) -> None:
        self._hasher.shutdown()
        self._file.close()


def refuse_pickles(paths: Iterable[Path]) -> None:
    """Raises `ValueError` for the first pickle: loading one runs code."""
    for path in paths:
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            raise ValueError(f"{path} is a pickle, which can run code when loaded: convert it to safetensors first")
