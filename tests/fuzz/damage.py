"""Damages: each takes a random generator and a file, changes the file, and says what it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Damage = Callable[[Random, Path], str]

DEEP = "[" * 5000 + "]" * 5000
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, -1, 16, 10**6, 10**12, 2**63, -(2**63), 10**400, 0.5, 1e300, -1.5, "", "1",
    "x" * 5000, "two\nlines", "../../x", "[/red]", "\x1b[2J", "float16", [], {}, [[]], [1, 2, 3], [-1], [10**12], ["a"],
    {"a": 1}, {"": {}}, [None], list(range(3000)),
)  # fmt: skip


def header_size(path: Path) -> int:
    """Bytes of a safetensors file before its data."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# Bytes -----------------------------------------------------------------------------------------------


def flip_bits(rng: Random, path: Path, end: int | None = None) -> str:
    data = bytearray(path.read_bytes())
    places = [rng.randrange(8 * len(data[:end])) for _ in range(rng.choice((1, 1, 1, 2, 8)))]
    for place in places:
        data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return f"bits {places} flipped"


def overwrite(rng: Random, path: Path, end: int | None = None) -> str:
    data = bytearray(path.read_bytes())
    first = rng.randrange(len(data[:end]))
    length = min(rng.randrange(1, 64), len(data[:end]) - first)
    data[first : first + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    path.write_bytes(data)
    return f"{length} bytes from {first} overwritten"


def truncate(rng: Random, path: Path) -> str:
    size = path.stat().st_size
    left = rng.choice((0, 4, 8, rng.randrange(size), size - 1))
    path.write_bytes(path.read_bytes()[:left])
    return f"truncated from {size} to {left} bytes"


def append(rng: Random, path: Path) -> str:
    more = rng.randbytes(rng.randrange(1, 100))
    path.write_bytes(path.read_bytes() + more)
    return f"{len(more)} bytes appended"


def header_flip(rng: Random, path: Path) -> str:
    return "header: " + rng.choice((flip_bits, overwrite))(rng, path, header_size(path))


def header_length(rng: Random, path: Path) -> str:
    data = path.read_bytes()
    length = rng.choice((0, 1, 7, header_size(path) - 9, header_size(path), len(data), 10**8, 2**40, 2**63, 2**64 - 1))
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    return f"header length {length}"


# JSON ------------------------------------------------------------------------------------------------


def containers(value: Any) -> Iterator[dict | list]:
    """Every object and list in a JSON value that is not empty."""
    if isinstance(value, (dict, list)):
        if value:
            yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from containers(child)


def change_json(rng: Random, content: dict) -> str:
    """Change one place of a parsed JSON object."""
    places = list(containers(content))
    place = content if rng.random() < 0.2 else rng.choice(places)
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    kind = rng.choice(("replace", "replace", "replace", "scale", "delete", "rename", "extra", "swap"))
    if kind == "scale" and type(place[key]) is int:
        place[key] = rng.choice((place[key] + 1, place[key] - 1, 2 * place[key], -place[key], place[key] * 10**9))
        return f"{key} becomes {place[key]}"
    if kind == "delete":
        del place[key]
        return f"{key} deleted"
    if kind in ("rename", "extra") and isinstance(place, dict):
        name = rng.choice((f"{key}_", str(key).upper(), "", "other", "a\nb"))
        place[name] = place.pop(key) if kind == "rename" else place[key]
        return f"{key} {'renamed' if kind == 'rename' else 'repeated as'} {name!r}"
    if kind == "swap" and places:
        other = rng.choice(places)
        place[key] = json.loads(json.dumps(other))
        return f"{key} becomes another part of the file"
    place[key] = rng.choice(VALUES)
    return f"{key} becomes {str(place[key])[:40]}"


def change_text(rng: Random, text: str) -> tuple[str, str]:
    """Change a JSON text in a way that a parsed value cannot express."""
    kind = rng.choice(("deep", "twice", "nan", "list", "utf"))
    body = text.strip()
    if kind == "deep":
        return f'{{"deep": {DEEP}, {body[1:]}', "a value nested 5000 deep"
    if kind == "twice":
        return f"{body[:-1]}, {body[1:]}", "every key twice"
    if kind == "nan":
        return f'{{"nan": NaN, {body[1:]}', "a NaN"
    if kind == "list":
        return f"[{body}]", "in a list"
    return "\ufeff" + body, "with a byte order mark"


def json_value(rng: Random, path: Path) -> str:
    content = json.loads(path.read_text())
    said = change_json(rng, content)
    path.write_text(json.dumps(content))
    return said


def json_text(rng: Random, path: Path) -> str:
    text, said = change_text(rng, path.read_text())
    path.write_text(text)
    return said


def header_json(rng: Random, path: Path) -> str:
    """Change the header of a safetensors file; its length stays right."""
    data, start = path.read_bytes(), header_size(path)
    text = data[8:start].decode()
    if rng.random() < 0.15:
        text, said = change_text(rng, text)
    else:
        content = json.loads(text)
        said = change_json(rng, content)
        text = json.dumps(content)
    header = text.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[start:])
    return f"header: {said}"


# Files -----------------------------------------------------------------------------------------------


def remove(rng: Random, path: Path) -> str:
    path.unlink()
    return "removed"


def make_folder(rng: Random, path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "replaced by a folder"


def swap(donors: Path, root: Path) -> Damage:
    """Replaces a file by a donor's: the one at the same place, or any other."""

    def swapped(rng: Random, path: Path) -> str:
        same = donors / path.relative_to(root)
        others = sorted(p for p in donors.rglob("*") if p.is_file() and p.suffix == path.suffix)
        donor = same if same.is_file() and rng.random() < 0.5 else rng.choice(others)
        shutil.copy(donor, path)
        return f"replaced by another model's {donor.relative_to(donors)}"

    return swapped


def damages(path: Path, *, checksummed: bool) -> list[Damage]:
    """What may happen to a file. Nothing can tell changed weights from others where no checksum is recorded."""
    if path.suffix == ".safetensors":
        of_data = [flip_bits, overwrite] if checksummed else []
        return [*of_data, header_flip, header_length, header_json, header_json, header_json, truncate, append]
    return [json_value, json_value, json_value, json_value, json_text, flip_bits, overwrite, truncate, append]
