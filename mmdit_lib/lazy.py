"""Packages whose names are imported when first asked for: `import mmdit_lib` stays quick and needs no extra."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def names_from(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562): `homes` says which submodule of `package` each name comes from."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get
