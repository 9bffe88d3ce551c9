"""One rank fails in some way at some stage: `mpirun -n 2 python parallel_faults.py ACTION STAGE RANK ENGINE MARK ...`

ACTION   what the rank does, a name in ACTIONS
STAGE    when: as soon as its activity (`parallel.doing`) begins with this, for instance 'step 5'
RANK     which rank
ENGINE   the engine folder; the ranks run steps for ever, or generate an image if the stage is decoding
MARK     the file that the rank writes just before, with the time
SECONDS  the timeout of the heartbeat, and of starting and joining if that is the stage; by default the library's
"""

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

from mmdit_lib.parallel import heartbeat
from mmdit_lib.parallel.faults import START_SECONDS, guard, start_mpi
from mmdit_lib.parallel.launch import launched_rank

ACTION, STAGE, RANK, ENGINE, MARK = sys.argv[1:6]
SECONDS = float(sys.argv[6]) if len(sys.argv) > 6 else None
TO_JOIN = SECONDS if SECONDS and STAGE.startswith(("starting", "joining")) else START_SECONDS
"""Before the first step, ranks import for seconds each, and not equally fast."""


def send(number: int, to: str = "self") -> None:
    os.kill(os.getppid() if to == "mpirun" else os.getpid(), number)


def run_out_of_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)
    bytearray(2**30)


def fail() -> None:
    raise RuntimeError(f"rank {RANK} had enough")


ACTIONS = {
    "kill": lambda: send(signal.SIGKILL),
    "terminate": lambda: send(signal.SIGTERM),
    "stop": lambda: send(signal.SIGSTOP),
    "interrupt": lambda: send(signal.SIGINT, "mpirun"),  # Ctrl-C in the terminal
    "kill mpirun": lambda: send(signal.SIGKILL, "mpirun"),
    "hang": lambda: ctypes.PyDLL(None).sleep(1000),  # in C, with the GIL held
    "work": lambda: ctypes.PyDLL(None).sleep(2 * int(SECONDS)),  # likewise, but it ends
    "sleep": lambda: time.sleep(1000),
    "raise": fail,
    "exit": lambda: sys.exit(f"rank {RANK} says so in one line"),
    "memory": run_out_of_memory,
    "nothing": lambda: None,
}
_say = heartbeat._say


def say(what: str, limit: float | None) -> None:
    _say(what, limit)
    if launched_rank() == int(RANK) and what.startswith(STAGE) and not Path(MARK).exists():
        Path(MARK).write_text(str(time.time()))
        ACTIONS[ACTION]()


heartbeat._say = say


def main() -> None:
    say("starting", None)
    start_mpi(TO_JOIN)
    import torch

    torch.set_num_threads(1)
    if "decod" in STAGE:
        from mmdit_lib.generate import generate

        options = {"backend": "pytorch", "heartbeat_timeout": SECONDS}
        generate("a red circle", "tiny", ENGINE, device="cpu", runner_options=options, num_inference_steps=4)
        return
    from mmdit_lib import MMDiTRunner, parallel
    from mmdit_lib.engine.folder import EngineFolder
    from mmdit_lib.engine.inputs import sample_inputs

    parallel.join(EngineFolder.open(ENGINE), "cpu", seconds=TO_JOIN, heartbeat=SECONDS)
    runner = MMDiTRunner.from_engine(ENGINE, backend="pytorch", device="cpu")
    inputs = sample_inputs(runner.folder, resolution=128, text_tokens=154, batch=2)
    with parallel.doing("steps without end"):
        while not (ACTION == "work" and Path(MARK).exists()):
            runner.run(inputs)


with guard():
    main()
