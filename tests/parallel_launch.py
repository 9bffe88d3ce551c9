"""Starting ranks in tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mmdit_lib.parallel import mpi_environment

TESTS = Path(__file__).parent


def mpirun(ranks: int, *arguments, timeout: float) -> subprocess.CompletedProcess:
    """`mpirun -n ranks python arguments`, in a process group of its own, ended with all it started on a timeout."""
    beside = Path(sys.executable).parent / "mpirun"
    command = [str(beside) if beside.exists() else "mpirun", "-n", str(ranks), sys.executable, *map(str, arguments)]
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | mpi_environment(ranks) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # mpirun ends its ranks
            out, err = process.communicate(timeout=20)
            raise AssertionError(f"{ranks} ranks did not end within {timeout} s\n{err[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)
