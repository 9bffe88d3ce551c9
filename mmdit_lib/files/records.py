"""File records in a manifest, and reading and writing the files around them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """What a manifest records about one file in its folder."""

    name: str
    nbytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        return cls(path.name, path.stat().st_size, sha256_of(path))

    def check_size(self, folder: Path) -> None:
        """Raises `ValueError` if `folder` has no such file, or one of another size."""
        path = folder / self.name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        found = path.stat().st_size
        if found != self.nbytes:
            raise ValueError(f"{path} has changed: expected {self.nbytes} bytes, found {found}")

    def verify(self, folder: Path) -> None:
        """As `check_size`, and compare the checksum."""
        self.check_size(folder)
        found = sha256_of(folder / self.name)
        if found != self.sha256:
            raise ValueError(f"{folder / self.name} has changed: its sha256 is {found}, expected {self.sha256}")


Files = dict[str, FileRecord]
"""A manifest's records, by file name."""


def to_json(files: Files) -> dict[str, dict[str, Any]]:
    """{file: {sha256, bytes}}, as config.json stores it."""
    return {name: {"sha256": file.sha256, "bytes": file.nbytes} for name, file in files.items()}


def from_json(content: dict[str, dict[str, Any]]) -> Files:
    """Undo `to_json`. Raises `KeyError` or `TypeError` if an entry is incomplete."""
    return {name: FileRecord(name, entry["bytes"], entry["sha256"]) for name, entry in content.items()}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(READ_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises a one-line `ValueError` for anything else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def keys_in(path: Path) -> set[str]:
    """The keys of a JSON object; none if the file holds anything else."""
    try:
        return set(read_json(path))
    except ValueError:
        return set()


def write_synced(path: Path, content: str | bytes | memoryview) -> None:
    """Write and flush to disk, so that a later rename cannot reach the disk before the content."""
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
