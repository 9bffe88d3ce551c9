"""Several ranks: MPI starts and numbers them, `torch.distributed` or TensorRT's NCCL moves the tensors.

mpirun -n 2 python script.py       # the same script on every rank; `join` makes them a team
with parallel.cluster(2) as ranks: # the same from a notebook, over ipyparallel
"""

from ..lazy import names_from

_HOMES = {
    "Team": "team",
    "current": "team",
    "join": "team",
    "leave": "team",
    "check_launch": "launch",
    "launched_rank": "launch",
    "launched_size": "launch",
    "mpi_environment": "launch",
    "guard": "faults",
    "generate_together": "generation",
    "load_pipeline": "generation",
    "sample": "generation",
    "cluster": "clusters",
    "Ranks": "clusters",
    "stop_clusters": "clusters",
}  # name: the file it comes from, imported when first asked for
__all__ = sorted(_HOMES)
__getattr__ = names_from(__name__, _HOMES)
