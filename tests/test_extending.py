"""docs/extending.md is true: its operator recipe, followed on a copy of the library, gives a working operator."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmdit_lib.network.trt import installed

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
STEP = re.compile(
    r"^In `(?P<file>[^`]+)`, (?P<how>append|(?:insert before|add to) `(?P<table>\w+)`):\n\n"
    r"```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
EXAMPLE = re.compile(r"^A network of this operator alone.*?:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
THEN_ITS_CASE = (
    "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/test_engine_ops.py']))"
)


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return found


def follow(step: re.Match, root: Path) -> None:
    """Do what one step says: append to a file, insert before a table, or add to the end of a table."""
    path, code = root / step["file"], step["code"]
    text = path.read_text()
    if step["how"] == "append":
        path.write_text(f"{text}\n\n{code}")
        return
    (start,) = re.finditer(rf"^{step['table']}\b.*[\[{{]$", text, re.MULTILINE)
    if step["how"].startswith("insert"):
        path.write_text(f"{text[: start.start()]}{code}\n\n{text[start.start() :]}")
        return
    end = re.compile(r"^[\]}]", re.MULTILINE).search(text, start.end()).start()
    path.write_text(f"{text[:end]}    {code}{text[end:]}")


@pytest.mark.skipif(installed() is None, reason="TensorRT is not installed")
def test_the_operator_recipe(tmp_path):
    shutil.copytree(ROOT / "mmdit_lib", tmp_path / "mmdit_lib", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_engine_ops.py", tmp_path / "tests")
    recipe = section("An operator")
    steps = list(STEP.finditer(recipe))
    assert {step["file"] for step in steps} == set(re.findall(r"^In `([^`]+)`", recipe, re.MULTILINE))
    for step in steps:
        follow(step, tmp_path)
    (example,) = EXAMPLE.findall(recipe)
    script = f"import mmdit_lib; assert mmdit_lib.__file__.startswith({str(tmp_path)!r})\n{example}\n{THEN_ITS_CASE}"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_file_that_the_page_names_exists():
    paths = re.findall(r"`((?:mmdit_lib|tests)/[\w./]*)`", PAGE)
    paths += [f"mmdit_lib/sd3/{name}" for name in re.findall(r"`(\w+\.py)`", section("A model"))]
    assert len(set(paths)) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_name_that_the_page_quotes_exists():
    names = set(re.findall(r"`([A-Za-z_]\w+)`", PAGE)) - {"softmax", "dequantize", "layer", "quantization"}
    source = "\n".join(path.read_text() for path in (ROOT / "mmdit_lib").rglob("*.py"))
    words = set(re.findall(r"\w+", source + (ROOT / "tests" / "test_engine_ops.py").read_text()))
    assert sorted(names - words) == ["IDequantizeLayer", "TANH"]  # TensorRT's
