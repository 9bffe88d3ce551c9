"""The notebooks as they are committed: executed, short, in the agreed form; and their snippets, each run alone.

`make test` also runs every other cell in order (nbval; `notebooks/conftest.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from gpu_cells import gpus_needed
from notebook_statistics import lines, notebooks
from run_snippet import run_snippet

ROOT = Path(__file__).parents[1]
KILOBYTES = 500
LARGEST_CELL = 20
MEDIAN_CELL = 5
SNIPPETS = 3
CELLS = range(40, 71)
"""A sitting. The solutions are not counted, nor are GPU cells with the texts before and after."""
EXERCISES = range(2, 4)
SECONDS = 300
"""Of one snippet; on two idle cores they take 1 to 30."""
PRELOADED = ["diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3", "matplotlib.pyplot", "pandas"]
"""What takes most of a snippet's time to import. The library itself is imported by each snippet."""

each_notebook = pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)


def cells(path: Path, kind: str | None = None) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if kind in (None, cell.cell_type)]


def number(path: Path) -> str:
    """`00b` of `00b-the-mmdit`: what its title and its folder in `work/` begin with."""
    return path.stem.split("-")[0]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def snippets() -> list:
    found = []
    for path in notebooks():
        sources = [cell.source for cell in cells(path, "code") if "snippet" in tags(cell)]
        found += [pytest.param(source, id=f"{path.stem}-{i}") for i, source in enumerate(sources, 1)]
    return found


def test_there_are_notebooks():
    assert notebooks()


@each_notebook
def test_is_executed_in_order_without_errors(path):
    code = cells(path, "code")
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run it from a fresh kernel: python tests/execute_notebooks.py"
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error", f"{output.ename}: {output.evalue}"
            assert output.get("name") != "stderr", f"there is output on stderr: {output.text[:200]}"


@each_notebook
def test_is_small_and_says_nothing_about_the_machine(path):
    assert path.stat().st_size < 1000 * KILOBYTES
    text = path.read_text()
    found = re.findall(r"(?<![\w./:-])/(?:home|root|work|tmp|usr|opt|var|Users|mnt|data)/[\w./-]*", text)
    assert not found, f"paths of the machine that executed it: {sorted(set(found))[:3]}"
    assert str(ROOT) not in text
    assert set(nbformat.read(path, as_version=4).metadata) == {"kernelspec", "language_info"}


@each_notebook
def test_cells_are_short_and_explained(path):
    code = cells(path, "code")
    assert max(lines(cell.source) for cell in code) <= LARGEST_CELL
    # A GPU cell stands alone, so it is longer.
    assert statistics.median(lines(cell.source) for cell in code if not gpus_needed(cell)) <= MEDIAN_CELL
    kinds = [cell.cell_type for cell in cells(path)]
    assert kinds.count("markdown") >= 2 * kinds.count("code")
    alone = [i for i, kind in enumerate(kinds) if kind == "code" and kinds[i - 1] != "markdown"]
    assert not alone, f"code cells without a sentence before them: {alone}"


@each_notebook
def test_begins_and_ends_as_all_do(path):
    first, *_ = cells(path)
    assert first.cell_type == "markdown" and first.source.startswith(f"# {number(path)} · ")
    assert "**At the end you will have**" in first.source and "**It takes**" in first.source
    assert "__version__" in cells(path, "code")[0].source, "the first code cell prints the versions"
    words = [cell.source for cell in cells(path, "markdown")]
    takeaways = [text for text in words if text.startswith("## Takeaways")]
    assert len(takeaways) == 1 and "../mmdit_lib/" in takeaways[0], "takeaways link to the files that were read"
    kinds = [set(tags(cell)) & {"snippet", "solution"} for cell in cells(path, "code")]
    while kinds[-1] == {"solution"}:
        kinds.pop()
    last = len(kinds) - SNIPPETS
    assert all(kinds[last:]) and not any(kinds[:last]), f"the {SNIPPETS} snippets are last, but for the solutions"


@each_notebook
def test_is_a_sitting(path):
    found = cells(path)
    end = next((i for i, cell in enumerate(found) if cell.source.startswith("## Solutions")), len(found))
    assert end - 3 * sum(gpus_needed(cell) > 0 for cell in found) in CELLS


@each_notebook
def test_every_exercise_has_a_solution_that_runs(path):
    words = "\n".join(cell.source for cell in cells(path, "markdown"))
    exercises, solutions = (re.findall(rf"^### {kind} (\d)", words, flags=re.M) for kind in ("Exercise", "Solution"))
    assert exercises == solutions and len(exercises) in EXERCISES
    code = [cell for cell in cells(path, "code") if "solution" in tags(cell)]
    assert len(code) >= len(exercises)
    for cell in code:  # collapsed in JupyterLab and on the website
        assert cell.metadata.get("jupyter", {}) == {"source_hidden": True, "outputs_hidden": True}
        assert "hide-cell" in tags(cell)


@each_notebook
def test_links_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", cell.source):
            assert (path.parent / target).exists(), f"{target} is not there"


@each_notebook
def test_writes_only_into_its_own_folder(path):
    """Notebooks run at the same time: one that rewrites another's checkpoint breaks it."""
    for cell in cells(path, "code"):
        used = set(re.findall(r"(?<!\w)work/([^/\"']*)", cell.source))
        assert used <= {number(path)}, f"folders of other notebooks: {sorted(used - {number(path)})}"


@each_notebook
def test_asserts_say_what_is_wrong(path):
    for cell in cells(path, "code"):
        for statement in re.findall(r"^\s*assert .*$", cell.source, flags=re.M):
            assert "," in statement, f"an assert without a message: {statement.strip()}"


@pytest.fixture(scope="module")
def forks():
    """Processes forked from one that has imported `PRELOADED` and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.mark.slow
@pytest.mark.parametrize("source", snippets())
def test_snippet_runs_alone(source, tmp_path, forks):
    (tmp_path / "snippet.py").write_text(source)
    run = run_in_new_python if "parallel.cluster" in source else run_in_fork  # MPI and forks do not mix
    status, errors = run(tmp_path, forks)
    assert status == 0, errors[-2000:]


def run_in_new_python(folder: Path, _) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "snippet.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    return run.returncode, run.stderr


def run_in_fork(folder: Path, forks) -> tuple[int, str]:
    process = forks.Process(target=run_snippet, args=(folder,))
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    return process.exitcode, (folder / "errors.txt").read_text()
