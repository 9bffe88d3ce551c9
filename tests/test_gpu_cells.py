"""The notebooks' GPU cells: they stand alone, and show what a GPU printed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from execute_notebooks import execute
from gpu_cells import GPUS, RECORDED, checksum, gpus_needed, missing_names
from notebook_statistics import notebooks
from record_gpu_cells import record

SOME = {"03", "04", "05", "06", "07", "08", "09"}
"""Notebooks that have such cells."""


def cells() -> list:
    found = []
    for path in notebooks():
        here = [cell for cell in nbformat.read(path, as_version=4).cells if gpus_needed(cell)]
        found += [pytest.param(cell, id=f"{path.stem}-{i}") for i, cell in enumerate(here, 1)]
    return found


def test_there_are_some():
    assert SOME <= {found.id[:2] for found in cells()}


@pytest.mark.parametrize("cell", cells())
def test_stands_alone(cell):
    assert missing_names(cell.source) == set()
    # Only imports and functions before its first line, which the recorded output needs.
    defined = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    first = next(line for line in ast.parse(cell.source).body if not isinstance(line, defined))
    assert ast.unparse(first) == "print(recorded_on())"


@pytest.mark.parametrize("cell", cells())
def test_shows_what_a_gpu_printed(cell):
    assert cell.metadata.get(RECORDED) == checksum(cell), "record it again: python tests/record_gpu_cells.py"
    first = cell.outputs[0].text.splitlines()[0]
    assert re.fullmatch(r"recorded on (\d x )?NVIDIA .*, \d{4}-\d\d-\d\d, torch [\d.]+\+cu\d+", first)
    assert max(GPUS.values()) >= int((re.search(r"(\d) x", first) or [0, 1])[1]) >= gpus_needed(cell)


def test_a_name_of_another_cell_is_found():
    assert missing_names("import torch\nprint(torch.zeros(2), runner)") == {"runner"}
    assert missing_names("def step(x):\n    return options, x\n\nprint([step(y) for y in range(2)])") == {"options"}
    assert missing_names("def step(x):\n    import torch\n    return torch.add(x, x)\n\nstep(1)") == set()


def notebook(folder: Path) -> Path:
    """The third cell needs a name of the first, the last one needs more GPUs than the test has."""
    new = nbformat.v4.new_code_cell
    sources = {"x = 1\nprint(x)": [], "print('on a GPU')": ["gpu"], "print(x)": ["gpu"], "print('two')": ["two-gpus"]}
    content = [new(source, metadata={"tags": tags}) for source, tags in sources.items()]
    content[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text="as recorded before")]
    made = nbformat.v4.new_notebook(cells=content)
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(made, folder / "cells.ipynb")
    return folder / "cells.ipynb"


def outputs(path: Path) -> list[str]:
    return ["".join(output.text for output in cell.outputs) for cell in nbformat.read(path, as_version=4).cells]


@pytest.mark.slow
def test_recording_changes_only_gpu_cells_that_succeed(tmp_path):
    path = notebook(tmp_path)
    (fault,) = record(path, gpus=1)
    assert fault.startswith("cells.ipynb, cell 2: ") and "name 'x' is not defined" in fault
    assert outputs(path) == ["", "on a GPU\n", "as recorded before", ""]
    execute(path)  # keeps them
    assert outputs(path) == ["1\n", "on a GPU\n", "as recorded before", ""]
    read = nbformat.read(path, as_version=4).cells
    assert [cell.execution_count for cell in read] == [1, 2, 3, 4]
    assert [RECORDED in cell.metadata for cell in read] == [False, True, False, False]
