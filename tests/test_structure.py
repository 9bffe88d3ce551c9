"""The shape of the library: imports go one way, SD3 is in one package, the public names can be discovered."""

import ast
import re
import subprocess
import sys

import pytest
from import_graph import LIBRARY, cycles, file_graph, levels, part_graph

import mmdit_lib
from mmdit_lib import parallel
from mmdit_lib.models import ARCHITECTURES

ROAD = ["config", "architecture", "sd3", "models", "checkpoint", "engine", "runner", "pipeline", "generate", "cli"]
"""From the bottom up."""
MODEL_FREE = ["network", "files", "config", "architecture", "checkpoint", "engine", "runner", "pipeline", "parallel"]
SD3_FACTS = (
    r"SD3Transformer2DModel|StableDiffusion3|transformer_blocks|pos_embed\b|joint_blocks|diffusion_model\.|"
    r"hidden_states|pooled_projections|context_embedder|norm1_context|proj_out|dual_attention|text_encoder_[23]"
)


def test_no_cycles():
    assert cycles(part_graph()) == []
    assert cycles(file_graph()) == []


def test_at_most_17_parts_and_the_road_goes_up():
    graph = part_graph()
    parts = graph.keys() - {"__main__"}  # which only starts the command
    assert len(parts) - len(ARCHITECTURES) <= 16, sorted(parts)  # each model is a package of its own
    heights = [levels(graph)[part] for part in ROAD]
    assert heights == sorted(set(heights)), dict(zip(ROAD, heights, strict=True))


def test_the_check_sees_a_cycle():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert cycles(graph) == [["a", "b", "c"]] and levels(graph) == {"a": 0, "b": 0, "c": 0, "d": 1}


def code_of(text: str) -> str:
    """A file without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [x for x in node.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
            node.body = node.body or [ast.Pass()]
    return ast.unparse(tree)


@pytest.mark.parametrize("part", MODEL_FREE)
def test_no_fact_about_sd3_outside_its_package(part):
    files = [LIBRARY / f"{part}.py"] if (LIBRARY / f"{part}.py").is_file() else sorted((LIBRARY / part).rglob("*.py"))
    assert files
    # The suffix by which any model's position table is recognized when random weights are drawn.
    text = "\n".join(code_of(file.read_text()).replace("'.pos_embed'", "") for file in files)
    assert set(re.findall(SD3_FACTS, text)) == set()


def test_the_core_does_not_import_the_toy_or_its_training():
    graph = part_graph()
    assert {part for part, imports in graph.items() if "tiny" in imports} == {"cli"}
    assert not any(
        "training" in re.findall(r"^\s*(?:from|import) (\w+)", f.read_text(), re.M) for f in LIBRARY.rglob("*.py")
    )


DEFINITIONS = (r"def _?rounded\(", r"def _?through_fp8\(", r"def _?relative(_error)?\(")
"""Rounding to FP8, rounding to FP8 and back, a relative error."""


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_one_definition(definition):
    folders = (LIBRARY, LIBRARY.parent / "benchmarks")
    files = [file for folder in folders for file in folder.rglob("*.py") if re.search(definition, file.read_text())]
    assert len(files) == 1, files


@pytest.mark.parametrize("part", ["checkpoint", "engine", "reports", "sd3"])
def test_names_of_dtypes_are_looked_up_in_the_config(part):
    assert not [f for f in (LIBRARY / part).rglob("*.py") if "getattr(torch, " in f.read_text()]


@pytest.mark.parametrize("package", [mmdit_lib, parallel], ids=lambda p: p.__name__)
def test_public_names_are_discoverable(package):
    assert dir(package) == sorted(package.__all__) and not {"lazy_loader", "names_from"} & set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert (LIBRARY / "py.typed").is_file()


def test_importing_the_library_is_quick():
    """It imports neither torch nor diffusers until a name is used."""
    code = "import sys, mmdit_lib; assert not {'torch', 'diffusers', 'tensorrt_rtx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=LIBRARY.parent)


@pytest.mark.parametrize("file", sorted(LIBRARY.rglob("*.py")), ids=lambda f: str(f.relative_to(LIBRARY)))
def test_a_file_holds_one_idea(file):
    assert len(file.read_text().splitlines()) <= 350
