"""File records in a manifest, and reading and writing the files around them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

READ_BYTES = 1 << 20
MAX_JSON = 1 << 25
"""Bytes of the longest JSON text that is read; parsed, it takes up to twenty times as much memory."""
MAX_NESTING = 32
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w.-]*$", max_length=255)]
"""The name of a file in the same folder: no path."""


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FileRecord:
    """What a manifest records about one file in its folder."""

    name: FileName
    nbytes: Annotated[int, Field(ge=0, strict=True, validation_alias="bytes")]
    sha256: Sha256

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


def _named(content: object) -> object:
    """Undo `to_json`, as far as the content has its form; pydantic refuses the rest."""
    if not isinstance(content, dict):
        return content
    return {name: {**entry, "name": name} if isinstance(entry, dict) else entry for name, entry in content.items()}


Files = Annotated[dict[FileName, FileRecord], BeforeValidator(_named)]
"""A manifest's records, by file name; a field of this type validates what `to_json` wrote."""


def to_json(files: Files) -> dict[str, dict[str, Any]]:
    """{file: {sha256, bytes}}, as config.json stores it."""
    return {name: {"sha256": file.sha256, "bytes": file.nbytes} for name, file in files.items()}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(READ_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises a one-line `ValueError` for anything else."""
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise ValueError(f"it has {size} bytes; the limit is {MAX_JSON}")
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def parse_json(text: bytes) -> Any:
    """Parse JSON as its standard defines it. Raises `ValueError`, also for repeated keys, NaN and deep nesting."""
    try:
        values = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_NESTING} levels deep") from None
    level, depth = [values], 0
    while level := [x for x in level if isinstance(x, (dict, list))]:
        depth += 1
        if depth > MAX_NESTING:
            raise ValueError(f"it is nested more than {MAX_NESTING} levels deep")
        level = [x for container in level for x in (container.values() if isinstance(container, dict) else container)]
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


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
