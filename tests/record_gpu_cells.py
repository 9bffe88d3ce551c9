"""Run the GPU cells of notebooks and record what they print, in place: `python tests/record_gpu_cells.py 04-*.ipynb`.

It needs GPUs, but neither TensorRT nor the rest of the notebooks: each cell runs alone, in a fresh kernel, with the
engine folders that the notebook's other cells wrote to `notebooks/work/`, here or on another machine. Cells that need
more GPUs than there are keep their outputs, and so do cells that fail; then the exit status is 1.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from execute_notebooks import NOTEBOOKS, settled
from gpu_cells import RECORDED, checksum, gpus_here, gpus_needed
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SILENT = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""As the first cell of each notebook."""


def record(path: Path, gpus: int) -> list[str]:
    """Run the cells that need 1 to `gpus` GPUs; returns what went wrong, by cell. Only cells that succeed change."""
    notebook, faults = nbformat.read(path, as_version=4), []
    for number, cell in enumerate(notebook.cells):
        needed = gpus_needed(cell)
        if needed > gpus:
            print(f"{path.name}, cell {number}: kept, as it needs {needed} GPUs, not {gpus}", flush=True)
        if not 0 < needed <= gpus:
            continue
        start = time.perf_counter()
        try:
            cell.outputs = run(cell.source, path.parent)
        except Exception as error:  # also a kernel that died or did not start
            text = str(error) if isinstance(error, CellExecutionError) else repr(error)
            faults.append(f"{path.name}, cell {number}: {text}")
            continue
        cell.metadata[RECORDED] = checksum(cell)
        nbformat.write(notebook, path)  # what is recorded stays, whatever happens to the next cell
        print(f"{path.name}, cell {number}: recorded in {time.perf_counter() - start:.0f} s", flush=True)
    return faults


def run(source: str, folder: Path) -> list:
    """The outputs of `source` in a fresh kernel whose working directory is `folder`, without those on stderr."""
    cell = nbformat.v4.new_code_cell(source)
    with tempfile.TemporaryDirectory() as cache:  # so that a first image includes compiling the kernels
        client = NotebookClient(
            nbformat.v4.new_notebook(cells=[cell]),
            timeout=300,
            startup_timeout=180,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            coalesce_streams=True,
        )
        client.execute(env=os.environ | SILENT | {"TRITON_CACHE_DIR": cache})
    errors = [output for output in cell.outputs if output.get("name") == "stderr"]
    for output in errors:
        print(output.text, file=sys.stderr)
    return settled([output for output in cell.outputs if output not in errors], {})


def main() -> None:
    os.environ.setdefault("IPP_NONINTERACTIVE", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH")]))
    faults = []
    for path in [Path(name) for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        faults += record(path.resolve(), gpus_here())
    sys.exit("\n".join(faults) or None)


if __name__ == "__main__":
    main()
