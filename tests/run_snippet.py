"""What test_notebooks.py runs in a forked process; it imports nothing that takes time."""

import os
import runpy
import sys
import traceback
from pathlib import Path


def run_snippet(folder: Path) -> None:
    """Run `snippet.py` there, as a script; what it prints is in `output.txt` and `errors.txt`."""
    os.chdir(folder)
    with open("output.txt", "w") as sys.stdout, open("errors.txt", "w") as sys.stderr:
        try:
            runpy.run_path("snippet.py", run_name="__main__")
        except BaseException:
            traceback.print_exc()
            raise
