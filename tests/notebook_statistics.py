"""Statistics of the notebooks as a table: `python tests/notebook_statistics.py`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


class Statistics(NamedTuple):
    code_cells: int
    words_cells: int
    median_lines: float
    largest_lines: int
    words_per_cell: float
    """Average per text cell."""
    pictures: int
    kilobytes: float


def notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("[0-9]*-*.ipynb"))


def lines(source: str) -> int:
    """Lines of code, without blank lines."""
    return sum(bool(line.strip()) for line in source.splitlines())


def statistics_of(path: Path) -> Statistics:
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    words = [cell for cell in cells if cell.cell_type == "markdown"]
    lengths = [lines(cell.source) for cell in code]
    pictures = sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    return Statistics(
        code_cells=len(code),
        words_cells=len(words),
        median_lines=statistics.median(lengths),
        largest_lines=max(lengths),
        words_per_cell=sum(len(cell.source.split()) for cell in words) / len(words),
        pictures=pictures,
        kilobytes=path.stat().st_size / 1000,
    )


def main() -> None:
    print("| notebook | code cells | words cells | median lines | largest | words per cell | pictures | KB |")
    print("|---|---|---|---|---|---|---|---|")
    for path in notebooks():
        s = statistics_of(path)
        print(
            f"| {path.stem} | {s.code_cells} | {s.words_cells} | {s.median_lines:g} | {s.largest_lines} "
            f"| {s.words_per_cell:.0f} | {s.pictures} | {s.kilobytes:.0f} |"
        )


if __name__ == "__main__":
    main()
