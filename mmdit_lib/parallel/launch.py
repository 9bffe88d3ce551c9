"""Environment variables that mpirun sets, read without starting MPI, and those that mpirun needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the watchdogs import this file, and need no torch
    from ..config import Layout

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
JOB_VARIABLE = "PMIX_NAMESPACE"
FAULT_FILE = "MMDIT_FAULT_FILE"
"""The variable with the file in which `cluster` finds why the ranks were stopped."""


def launched_rank(variables: Mapping[str, str] = os.environ) -> int:
    """The rank that mpirun gave this process, or the one with these environment variables; 0 without mpirun."""
    return _first(RANK_VARIABLES, variables, 0)


def launched_size() -> int:
    """How many ranks mpirun started; 1 without mpirun."""
    return _first(SIZE_VARIABLES, os.environ, 1)


def launched_locally() -> bool:
    """Whether mpirun started all ranks on this machine."""
    return _first(LOCAL_SIZE_VARIABLES, os.environ, 0) == launched_size()


def launched_job(variables: Mapping[str, str] = os.environ) -> str | None:
    """An id that exactly the ranks of one mpirun share; None if the launcher gives none."""
    return variables.get(JOB_VARIABLE)


def _first(names: tuple[str, ...], variables: Mapping[str, str], otherwise: int) -> int:
    return next((int(variables[name]) for name in names if name in variables), otherwise)


def check_launch(layout: Layout, size: int, folder: object = "this engine folder") -> None:
    """Raises `ValueError`, with the right way to start it, if `size` ranks cannot run `layout`."""
    wanted = layout.world_size
    if size == wanted:
        return
    if wanted == 1:
        raise ValueError(f"{folder} is for one process, and {size} ranks are running: start it without mpirun")
    ranks = "1 rank is" if size == 1 else f"{size} ranks are"
    raise ValueError(f"{folder} is for {layout}, {wanted} ranks, and {ranks} running: start it with mpirun -n {wanted}")


def mpi_environment(ranks: int) -> dict[str, str]:
    """Variables for OpenMPI that let it start any number of ranks on any machine.

    This includes root, as in a container, and more ranks than cores. The ranks on a machine share its
    cores. Variables that are already set keep their value.
    """
    wanted = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",  # OpenMPI 4
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # OpenMPI 5
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def session_environment(folder: str) -> dict[str, str]:
    """Variables with which an mpirun on this machine keeps its session files in `folder`.

    In /tmp, what a killed mpirun left stops a later one that gets its process id: "The PMIx server's listener thread
    failed to start".
    """
    return {"OMPI_MCA_orte_tmpdir_base": folder, "PRTE_MCA_prte_tmpdir_base": folder}  # OpenMPI 4 and 5
