"""What test_parallel_faults.py runs on every rank: a team at work, in which rank 1 fails in some way."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from mmdit_lib.parallel.faults import guard, start_mpi
from mmdit_lib.parallel.launch import launched_rank

WHAT, ENGINE, MARK = sys.argv[1], sys.argv[2], Path(sys.argv[3])
BAD = launched_rank() == 1


def mark() -> None:
    MARK.write_text(str(time.time()))


def main() -> None:
    torch.set_num_threads(1)
    if WHAT == "unstarted" and BAD:
        mark()
        time.sleep(120)
    start_mpi(3 if WHAT == "unstarted" else 25)
    from mmdit_lib import MMDiTRunner, parallel
    from mmdit_lib.engine.folder import EngineFolder
    from mmdit_lib.engine.inputs import sample_inputs

    if WHAT == "absent":
        if BAD:
            mark()
            time.sleep(120)
        parallel.join(EngineFolder.open(ENGINE), "cpu", seconds=3)
    runner = MMDiTRunner.from_engine(ENGINE, backend="pytorch", device="cpu")
    inputs = sample_inputs(runner.folder, resolution=128, text_tokens=154, batch=2)
    runner.run(inputs)
    if BAD:
        mark()
        if WHAT == "raise":
            raise RuntimeError("rank 1 had enough")
        if WHAT == "exit":
            sys.exit("rank 1 says so in one line")
        if WHAT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    while True:
        runner.run(inputs)


if WHAT == "exit":
    with guard():
        main()
else:
    main()
