"""The notebooks' snippets for real models, which no test can run: their calls must at least fit the library."""

from __future__ import annotations

import ast
import importlib
import inspect
import re

import nbformat
import pytest
from notebook_statistics import notebooks


def fences() -> list:
    """The ```python blocks of text cells that import from the library."""
    found = []
    for path in notebooks():
        words = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
        blocks = re.findall(r"^```python\n(.*?)^```", "\n".join(words), flags=re.M | re.S)
        blocks = [block for block in blocks if "from mmdit_lib" in block]
        found += [pytest.param(block, id=f"{path.stem}-{i}") for i, block in enumerate(blocks, 1)]
    return found


@pytest.mark.parametrize("source", fences())
def test_calls_fit_the_library(source):
    tree, known = ast.parse(source), {}
    for statement in ast.walk(tree):
        if isinstance(statement, ast.ImportFrom) and statement.module.split(".")[0] == "mmdit_lib":
            module = importlib.import_module(statement.module)
            known |= {name.asname or name.name: getattr(module, name.name) for name in statement.names}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in known:
            keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
            inspect.signature(known[call.func.id]).bind_partial(*call.args, **keywords)
