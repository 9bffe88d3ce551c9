"""Cells of the notebooks that need GPUs, by their tag.

Such a cell needs nothing of the cells before it but the files that they wrote, so it can be run by itself, on another
machine: `record_gpu_cells.py` does this. What it printed there is kept in the notebook.
"""

from __future__ import annotations

import builtins
import hashlib
import symtable
from functools import cache

GPUS = {"gpu": 1, "two-gpus": 2}
"""How many GPUs a cell with this tag needs."""
RECORDED = "recorded"
"""The key of a cell's metadata with the checksum of the source that was recorded."""


def gpus_needed(cell) -> int:
    return max((GPUS.get(tag, 0) for tag in cell.metadata.get("tags", [])), default=0)


@cache
def gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def checksum(cell) -> str:
    return hashlib.sha256(cell.source.encode()).hexdigest()[:16]


def missing_names(source: str) -> set[str]:
    """Names that the code reads but neither assigns nor imports: it needs them from cells before it."""

    def tables(table: symtable.SymbolTable):
        yield table
        for child in table.get_children():
            yield from tables(child)

    top = symtable.symtable(source, "cell", "exec")
    own = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    read = {
        symbol.get_name()
        for table in tables(top)
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (table is top or symbol.is_global())
    }
    return read - own - set(dir(builtins))
