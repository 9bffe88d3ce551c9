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
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, TypeAdapter

from ..config import STORED_DTYPES, TORCH_DTYPES, FileConfig, Text, one_line, shown
from ..files import FileRecord, parse_json
from ..files.records import MAX_JSON

CODES = {names.safetensors: dtype for dtype, names in STORED_DTYPES.items()}
"""Our names for data types, by their code in the format."""
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of every dtype in the format; most of them cannot be converted."""


class HeaderEntry(FileConfig):
    """One tensor in the header of a safetensors file."""

    dtype: Text
    shape: tuple[Annotated[int, Field(ge=1, strict=True)], ...] = Field(max_length=8)
    data_offsets: tuple[Annotated[int, Field(ge=0, strict=True)], Annotated[int, Field(ge=0, strict=True)]]


HEADER = TypeAdapter(dict[Text, HeaderEntry])
METADATA = TypeAdapter(dict[str, str])


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
        return buffer[: self.nbytes].view(TORCH_DTYPES[self.dtype]).view(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, which together cover its data exactly.

    Raises `ValueError` if the file is truncated or not a safetensors file.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """As `read_header`, and the file's free-form metadata."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_JSON:
            raise ValueError(f"{path} is not a safetensors file ({size} bytes)")
        start = 8 + length
        if size < start:
            raise ValueError(f"{path} is truncated: its header alone takes {start} bytes, found {size}")
        entries, metadata = _parse_header(file.read(length), path)
    tensors = {name: _stored(path, start, name, entry) for name, entry in entries.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].spans):
        ((offset, nbytes),) = tensor.spans
        if offset != end:
            raise ValueError(f"{path}: tensor '{name}' starts at byte {offset}, expected {end}: gaps are not allowed")
        end += nbytes
    if size != end:
        fault = "is truncated" if size < end else "has bytes after its last tensor"
        raise ValueError(f"{path} {fault}: expected {end} bytes, found {size}")
    return tensors, metadata


def _parse_header(text: bytes, path: Path) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
    where = f"{path} is not a safetensors file: its header does not parse"
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} ({error})") from None
    with one_line(where):
        metadata = METADATA.validate_python(header.pop("__metadata__", {}) if isinstance(header, dict) else {})
        return HEADER.validate_python(header), metadata


def _stored(path: Path, data: int, name: str, entry: HeaderEntry) -> StoredTensor:
    first, last = entry.data_offsets
    if entry.dtype not in BITS:
        raise ValueError(f"{path}: tensor '{name}' has dtype {shown(entry.dtype)}, which is not a safetensors dtype")
    if 8 * (last - first) != BITS[entry.dtype] * math.prod(entry.shape):
        raise ValueError(
            f"{path}: tensor '{name}' has {last - first} bytes for {entry.dtype} of shape {list(entry.shape)}"
        )
    return StoredTensor(path, entry.dtype, entry.shape, ((data + first, last - first),))


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
