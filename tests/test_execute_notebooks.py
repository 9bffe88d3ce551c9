"""Executed notebooks contain no widgets, but what these displayed."""

import nbformat
import pytest
from execute_notebooks import execute

INTERACT = """
import ipywidgets
from IPython.display import display
from tqdm.auto import tqdm


def show(steps, model):
    for _ in tqdm(range(steps)):
        pass
    display({"image/png": "iVBORw0KGgo=", "text/plain": f"{model} after {steps} steps"}, raw=True)


options = ipywidgets.Dropdown(options=["medium", "large"], description="model")
ipywidgets.interact(show, steps=(1, 8), model=options);
"""


@pytest.mark.slow
def test_controls_become_a_line_and_what_they_displayed(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(INTERACT)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "widgets.ipynb")
    execute(tmp_path / "widgets.ipynb", timeout=60)
    (cell,) = nbformat.read(tmp_path / "widgets.ipynb", as_version=4).cells
    text, image = cell.outputs
    line, bar = text.text.splitlines()
    assert line == "[slider: steps; dropdown: model; run the notebook to change them]"
    assert bar.startswith("100%█") and "4/4" in bar
    assert image.data == {"image/png": "iVBORw0KGgo=", "text/plain": "medium after 4 steps"}
