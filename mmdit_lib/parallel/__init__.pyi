"""The names of this package, for editors and type checkers and for `lazy_loader`, which imports them on first use."""

from .clusters import Ranks, cluster, stop_clusters
from .faults import guard
from .heartbeat import doing
from .launch import check_launch, launched_rank, launched_size, mpi_environment
from .team import Team, current, join, leave

__all__ = [
    "Ranks",
    "Team",
    "check_launch",
    "cluster",
    "current",
    "doing",
    "guard",
    "join",
    "launched_rank",
    "launched_size",
    "leave",
    "mpi_environment",
    "stop_clusters",
]
