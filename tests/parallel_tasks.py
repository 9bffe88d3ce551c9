"""What test_parallel_faults.py calls on ipyparallel's engines: it is sent by name, so it must be importable there."""


def greet(text):
    from mpi4py import MPI

    print(text)
    return MPI.COMM_WORLD.rank


def join_twice(folder):
    """A second folder in the same session, and a fresh team after `leave`."""
    from mmdit_lib import MMDiTRunner, parallel

    ranks = [MMDiTRunner.from_engine(folder, backend="pytorch", device="cpu").rank for _ in range(2)]
    parallel.leave()
    return [*ranks, MMDiTRunner.from_engine(folder, backend="pytorch", device="cpu").rank]


def fail(how):
    import os
    import signal

    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 1:
        if how != "raise":
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
        raise ValueError("rank 1 had enough")
    MPI.COMM_WORLD.barrier()
