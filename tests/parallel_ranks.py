"""What test_parallel.py runs on every rank: `mpirun -n N python parallel_ranks.py tasks.json results.json`."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from helpers import relative_error
from mpi4py import MPI

from mmdit_lib import MMDiTRunner, load_pipeline, parallel, sample
from mmdit_lib.pipeline import as_pixels

WORLD = MPI.COMM_WORLD


def parity(task: dict) -> list[float]:
    """The relative error of every case against diffusers' output, of the worst rank."""
    runner = MMDiTRunner.from_engine(task["engine"], backend="pytorch", device="cpu", verify=False)
    cases = torch.load(task["cases"], weights_only=True)
    errors = [relative_error(runner.run(inputs), expected) for inputs, expected in cases]
    return [max(of_ranks) for of_ranks in zip(*WORLD.allgather(errors), strict=True)]


def refuse(task: dict) -> list[str]:
    """Every rank opens its own folder; returns what each of them raised."""
    try:
        MMDiTRunner.from_engine(task["engines"][WORLD.rank], backend="pytorch", device="cpu", verify=False)
        said = "nothing"
    except ValueError as error:
        said = str(error)
    return WORLD.allgather(said)


def picture(task: dict) -> dict:
    pipe = load_pipeline(
        task["model"],
        task["engine"],
        device="cpu",
        dtype=torch.float32,
        runner_options={"backend": "pytorch"},
        encode_on_rank_0=True,
    )
    pipe.set_progress_bar_config(disable=True)
    # Only rank 0's prompt and noise are used: the others' are wrong on purpose.
    prompt = task["prompt"] if WORLD.rank == 0 else "nonsense"
    noise = {"generator": torch.Generator().manual_seed(WORLD.rank)}
    if task["by_latents"]:  # the same noise, drawn here
        height, width = (task["options"][side] // 8 for side in ("height", "width"))
        noise = {"latents": torch.randn(1, pipe.transformer.config.in_channels, height, width, **noise)}
    (image,) = sample(pipe, prompt, **noise, **task["options"])
    if WORLD.rank == 0:
        image.save(task["png"])
    return {
        "hashes": WORLD.allgather(hashlib.sha256(image.tobytes()).hexdigest()),
        "encoders": WORLD.allgather(pipe.text_encoder is not None),
    }


def usage(task: dict) -> dict:
    """Every call of `sample`, on one pipeline; rank 0 saves the pictures."""
    pipe = load_pipeline(
        task["model"], task["engine"], device="cpu", runner_options={"backend": "pytorch"}, encode_on_rank_0=True
    )
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for name, call in torch.load(task["calls"], weights_only=True).items():
        found[name] = as_pixels(sample(pipe, **call, generator=torch.Generator().manual_seed(7)))
    if WORLD.rank == 0:
        torch.save(found, task["output"])
    return {}


def again(task: dict) -> list[bool]:
    """The end of a team, after which `join` starts afresh."""
    parallel.leave()
    return [parallel.current() is None]


def main() -> None:
    torch.set_num_threads(1)
    tasks, results = Path(sys.argv[1]), Path(sys.argv[2])
    found = {name: globals()[task["kind"]](task) for name, task in json.loads(tasks.read_text()).items()}
    if WORLD.rank == 0:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
