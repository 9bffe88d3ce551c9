"""Run notebooks in place, as they are committed: `python tests/execute_notebooks.py [notebooks/04-generate.ipynb ...]`.

Every notebook runs alone, in a fresh kernel. Cells that need a GPU do not run: they keep what `record_gpu_cells.py`
recorded. A web page shows no widgets: a progress bar is kept as the line of text
that it ended with, sliders and other controls as a line that names them, and what an `interact` displayed as it is.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from html import unescape
from itertools import chain
from pathlib import Path

import nbformat
from gpu_cells import gpus_needed
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
LARGE = 40_000
"""Characters of an image above which it gets a palette: a notebook may have 500 KB."""
CONTROLS = {"Slider": "slider", "Dropdown": "dropdown", "Checkbox": "checkbox", "ToggleButtons": "choice"}
"""What to call a control, by a part of the name of its widget model."""


class WithoutGPU(NotebookClient):
    async def async_execute_cell(self, cell, *arguments, **options):
        return cell if gpus_needed(cell) else await super().async_execute_cell(cell, *arguments, **options)


def execute(path: Path, timeout: int = 600) -> float:
    """Run a notebook; returns its seconds. If a cell fails, raises `CellExecutionError` and writes nothing.

    Rarely, nbclient does not notice a cell's reply (https://github.com/jupyter/nbclient/issues/312) and looks again
    only after `timeout` seconds, the most that a cell may take.
    """
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    client = WithoutGPU(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
    )
    client.execute()
    seconds = time.perf_counter() - start
    states = notebook.metadata.pop("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
        cell.metadata.pop("execution", None)
        if not gpus_needed(cell):
            cell.outputs = settled(cell.outputs, states)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)
    return seconds


def settled(outputs: list, states: dict) -> list:
    """`outputs` with every widget replaced by `without_widget`, neighboring texts joined."""
    kept = []
    for output in chain.from_iterable(without_widget(output, states) for output in outputs):
        data = output.get("data", {})
        data.pop("image/jpeg", None)  # the same image as the PNG
        if len(data.get("image/png", "")) > LARGE:
            data["image/png"] = with_palette(data["image/png"])
        if (
            output.output_type == "stream"
            and kept
            and kept[-1].output_type == "stream"
            and kept[-1].name == output.name
        ):
            kept[-1].text += output.text
        else:
            kept.append(output)
    return [output for output in kept if output.output_type != "stream" or output.text.strip()]


def without_widget(output, states: dict) -> list:
    """A progress bar as text on stdout; controls as a line of text, then the output that they made last."""
    widget = output.get("data", {}).get(WIDGET)
    if widget is None:
        bar = output.output_type == "stream" and output.name == "stderr" and is_bar(output.text)
        return [text_output(output.text) if bar else output]
    models = list(below(states, widget["model_id"]))
    if any("ProgressModel" in model["model_name"] for model in models):
        return [text_output(bar_text(states, widget["model_id"]))]
    kept = [text_output(controls_text(models))]
    for model in models:
        for shown in model["state"].get("outputs", []):  # an Output widget's
            kept += without_widget(nbformat.from_dict(shown), states)
    return kept


def below(states: dict, model_id: str) -> Iterator[dict]:
    """The model and its children, in the order in which they are displayed."""
    model = states.get(model_id.removeprefix("IPY_MODEL_"))
    if model is not None:
        yield model
        for child in model["state"].get("children", []):
            yield from below(states, child)


def controls_text(models: list[dict]) -> str:
    """For instance `[sliders: guidance, steps; run the notebook to change them]`."""
    found: dict[str, list[str]] = {}
    for model in models:
        kind = next((name for part, name in CONTROLS.items() if part in model["model_name"]), None)
        if kind is not None:
            found.setdefault(kind, []).append(model["state"].get("description", ""))
    kinds = [f"{kind}{'s' * (len(names) > 1)}: {', '.join(names)}" for kind, names in found.items()]
    return f"[{'; '.join([*kinds, 'run the notebook to change them'])}]\n" if kinds else ""


def is_bar(text: str) -> bool:
    return all(re.search(r"\d+%\||\d+(step|it|B) \[", line) for line in text.splitlines() if line.strip())


def bar_text(states: dict, model_id: str) -> str:
    """A tqdm bar: a box with a title, a bar and the text to its right."""
    box = states.get(model_id, {}).get("state", {})
    parts = [states[child.removeprefix("IPY_MODEL_")]["state"] for child in box.get("children", [])]
    layout = states.get(box.get("layout", "").removeprefix("IPY_MODEL_"), {}).get("state", {})
    if len(parts) != 3 or layout.get("display") == "none":  # tqdm's leave=False
        return ""
    title, bar, right = parts
    filled = round(20 * bar.get("value", 0) / (bar.get("max", 0) or 1))
    return f"{plain(title['value'])}{'█' * filled}{' ' * (20 - filled)}{plain(right['value'])}\n"


def plain(markup: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", markup)).replace("\xa0", " ").replace("\u2007", " ")


def with_palette(png: str) -> str:
    """A PNG in base64 with 256 colors, which takes less than half the space."""
    stored = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        stored, "PNG", optimize=True
    )
    return base64.b64encode(stored.getvalue()).decode()


def text_output(text: str):
    return nbformat.v4.new_output("stream", name="stdout", text=text)


def main() -> None:
    os.environ.setdefault("IPP_NONINTERACTIVE", "1")
    # A bar that is closed early would show its second-to-last state; rates are means over all steps.
    os.environ |= {"TQDM_MININTERVAL": "0", "TQDM_SMOOTHING": "0"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH")]))
    for path in [Path(name) for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        print(f"{path.name}: {execute(path):.0f} s, {path.stat().st_size / 1000:.0f} KB", flush=True)


if __name__ == "__main__":
    main()
