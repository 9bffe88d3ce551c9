"""What test_notebooks.py runs in a forked process; it imports nothing that takes time."""

import os
import runpy
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path


def run_snippet(folder: Path) -> None:
    """Run `snippet.py` there, as a script; what it prints is in `output.txt` and `errors.txt`."""
    os.chdir(folder)
    with open("output.txt", "w") as out, open("errors.txt", "w") as err, redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path("snippet.py", run_name="__main__")
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
