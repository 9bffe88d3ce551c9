"""The scripts of TensorRT-LLM's example: the original's command lines run, and the docs list exactly their flags."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_on_ranks

from mmdit_lib import Checkpoint, Resolution, build, cli, tiny
from mmdit_lib.compat import convert_checkpoint, sample
from mmdit_lib.config import Layout
from mmdit_lib.generate import generate_by_diffusers
from mmdit_lib.sd3 import SD3

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "from-tensorrt-llm.md").read_text()
PROMPT = "A capybara holding a sign that reads 'Hello World' in the forrest."

CONVERT = [  # the original README's commands, for a model that is at hand
    ("--model_path='{model}'", Layout()),
    ("--tp_size=2 --model_path='{model}'", Layout(tp_size=2)),
    ("--tp_size=2 --cp_size=2 --workers=4 --log_level=warning --model_path {model}", Layout(tp_size=2, cp_size=2)),
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "layout"), CONVERT)
def test_convert_checkpoint(here, command, layout, capsys):
    convert_checkpoint.main(shlex.split(command.format(model=tiny.model_path())))
    checkpoint = Checkpoint.open("tllm_checkpoint", verify=True)
    assert checkpoint.layout == layout.model_copy(update={"tp_layout": "trtllm"}) and checkpoint.dtype == "float16"
    assert ("convert:" in capsys.readouterr().err) == ("warning" not in command)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float16"), ("bfloat16", "bfloat16")])
def test_dtype_and_output_dir(here, dtype, expected):
    convert_checkpoint.main(["--model_path", "tiny", "--dtype", dtype, "--output_dir", "elsewhere"])
    assert Checkpoint.open("elsewhere").dtype == expected  # the tiny model is stored in float16
    assert [path.name for path in here.iterdir()] == ["elsewhere"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Path:
    """Engine folders of the tiny model for one rank and for two, at its smallest size."""
    root = tmp_path_factory.mktemp("compat")
    for name, tp_size in (("engine_outputs", 1), ("two", 2)):
        arguments = ["--model_path", "tiny", "--dtype", "float32", "--log_level", "error", "--tp_size", str(tp_size)]
        convert_checkpoint.main([*arguments, "--output_dir", str(root / f"checkpoint_{name}")])
        sizes = dict(min_resolution="32", opt_resolution="32", max_resolution="64")
        build(root / f"checkpoint_{name}", root / name, plan=False, progress=False, **sizes)
    return root


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """diffusers' own pipeline with the original's settings."""
    options = dict(dtype=torch.float32, resolution=Resolution(height=32, width=32), seed=0)
    options |= dict(num_inference_steps=40, guidance_scale=4.5)
    return np.asarray(generate_by_diffusers(PROMPT, "tiny", SD3.pipelines.default_class(), **options).image).astype(int)


def difference(file: Path, expected: np.ndarray) -> int:
    return int(np.abs(np.asarray(Image.open(file)).astype(int) - expected).max())


@pytest.mark.slow
def test_sample(engines, expected, monkeypatch):
    """`python sample.py`, without any flag."""
    monkeypatch.chdir(engines)
    sample.main([])
    assert difference(engines / "sd3.5-mmdit.png", expected) <= 1  # rounding to 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
def test_sample_on_ranks(engines, expected, here, world):
    """`mpirun -n 2 --allow-run-as-root python sample.py "A capybara ..."`"""
    flags = ["--tllm_model_dir", str(engines / "two"), "--gpus_per_node", "8", "--log_level", "info"]
    task = {"kind": "script", "name": "sample", "arguments": [PROMPT, *flags], "folder": str(here)}
    run_on_ranks(world, {"sample": task})
    assert difference(here / "sd3.5-mmdit.png", expected) <= 1


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (sample, ["--debug_mode"], "sample: --debug_mode saves no tensors here: `mmdit parity` compares"),
        (sample, ["a", "red", "circle"], "sample: 3 prompts"),
        (sample, ["--tllm_model_dir", "nowhere"], "sample: nowhere is not an engine folder"),
        (convert_checkpoint, ["--model_path", "tiny", "--tp_size", "3"], "not divisible by tp_size=3; use 1, 2 or 4"),
        (convert_checkpoint, ["--model_path", "nowhere"], "convert_checkpoint: nowhere does not exist"),
    ],
)
def test_what_is_not_possible_is_one_line(here, script, arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        script.main(arguments)
    assert words in exit.value.code and "\n" not in exit.value.code
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", ["convert_checkpoint", "sample"])
def test_the_modules_are_scripts(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"mmdit_lib.compat.{name}")
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(f"mmdit_lib.compat.{name}", run_name="__main__")
    assert exit.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {name}")


# The docs --------------------------------------------------------------------------------------------


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its two header rows."""
    section = DOCS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def options(text: str) -> set[str]:
    """Names of options; `mmdit --help` spells them with hyphens and accepts both."""
    return {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z_-]*)", text)}


@pytest.mark.parametrize(
    ("script", "heading"), [(convert_checkpoint, "`convert_checkpoint.py`"), (sample, "`sample.py`")]
)
def test_the_docs_list_every_flag(script, heading):
    """Exactly the parser's flags, and the parser accepts each by itself."""
    parser = script.make_parser()
    actions = [action for action in parser._actions if action.dest != "help"]
    assert [row[0].strip("`") for row in table(heading)] == [(*a.option_strings, a.dest)[0] for a in actions]
    for action in actions:
        value = [] if action.nargs == 0 else [str((action.choices or [2 if action.type is int else "x"])[-1])]
        values = vars(parser.parse_args([*action.option_strings, *value]))
        assert str(values[action.dest]) in (*value, "True", str(value)), action


@pytest.mark.parametrize(
    ("heading", "command"),
    [("`convert_checkpoint.py`", "convert"), ("`trtllm-build`", "build"), ("`sample.py`", "generate")],
)
def test_the_counterparts_exist(heading, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["mmdit", command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    known = options(capsys.readouterr().out)
    named = set().union(*(options(row[1]) for row in table(heading)))
    assert named and named <= known, named - known
