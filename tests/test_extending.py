"""docs/extending.md is true: its operator recipe, followed on a copy of the library, gives a working operator."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch

from mmdit_lib import MMDiTRunner, build
from mmdit_lib.architecture import Input
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.models import ARCHITECTURES
from mmdit_lib.network.trt import installed
from mmdit_lib.reports.parity import all_ok, compare
from mmdit_lib.sd3 import SD3

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


@pytest.mark.slow
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
    names = set(re.findall(r"`([A-Za-z_]\w+)`", PAGE)) - {"einsum", "dequantize", "layer", "quantization"}
    source = "\n".join(path.read_text() for path in (ROOT / "mmdit_lib").rglob("*.py"))
    words = set(re.findall(r"\w+", source + (ROOT / "tests" / "test_engine_ops.py").read_text()))
    assert sorted(names - words) == ["TANH"]  # TensorRT's


def test_an_input_with_a_default_can_be_left_out(tmp_path, monkeypatch):
    def define(model, inputs, build):
        inputs = dict(inputs)
        return SD3.define(model, inputs | {"timestep": inputs.pop("timestep") + inputs.pop("offset")}, build)

    offset = Input("offset", ("batch",), dtype="float32", default=0.0)
    monkeypatch.setitem(ARCHITECTURES, SD3.name, replace(SD3, inputs=(*SD3.inputs, offset), define=define))
    case = helpers.case("sd3.5-medium")
    sizes = {f"{end}_resolution": str(8 * case.step) for end in ("min", "opt", "max")}
    engine = build(case.checkpoint(), tmp_path / "engine", plan=False, progress=False, **sizes)
    runner = MMDiTRunner.from_engine(engine, device="cpu")
    inputs = case.inputs()
    assert torch.equal(sample_inputs(runner.folder, batch=2)["offset"], torch.zeros(2))
    assert torch.equal(runner.run(inputs), runner.run(inputs | {"offset": torch.zeros(2)}))
    later = runner.run(inputs | {"timestep": inputs["timestep"] + 5.0})
    assert torch.equal(runner.run(inputs | {"offset": torch.full((2,), 5.0)}), later)
    with monkeypatch.context() as another, pytest.raises(ValueError, match="has no input later: build it again"):
        later_input = Input("later", ("batch",), default=0.0)
        another.setitem(ARCHITECTURES, SD3.name, replace(SD3, inputs=(*SD3.inputs, offset, later_input)))
        MMDiTRunner.from_engine(engine, device="cpu")
    assert all_ok(compare(case.reference, runner, sample_inputs(runner.folder, batch=2)))
    with pytest.raises(ValueError, match=r"batch differs between inputs: .*'offset': 3"):
        runner.run(inputs | {"offset": torch.zeros(3)})
