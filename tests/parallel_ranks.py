"""What tests run on every rank: `ranks.py` calls the function that a task names."""

import hashlib
import importlib
import os

import torch
from helpers import relative_error
from mpi4py import MPI
from PIL import Image

from mmdit_lib import MMDiTRunner, load_pipeline, parallel, sample
from mmdit_lib.engine.fp8_passes import FP8_EPILOGUES, FP8_GEMMS, FP8_KERNELS
from mmdit_lib.engine.pytorch_backend import GPU_PASSES, PyTorchBackend
from mmdit_lib.pipeline import as_pixels

WORLD = MPI.COMM_WORLD
ALL_PASSES = FP8_GEMMS + GPU_PASSES + FP8_KERNELS + FP8_EPILOGUES


def parity(task: dict) -> list[float]:
    """The relative error of every case against diffusers' output, of the worst rank; then the same with the
    operators of a GPU, whose collectives run over gloo on a CPU, and with what can be computed ahead of a step."""
    device = task.get("device", "cpu")
    runner = MMDiTRunner.from_engine(task["engine"], backend="pytorch", device=device, verify=False)
    cases = torch.load(task["cases"], weights_only=True)
    errors = [relative_error(runner.run(inputs).cpu(), expected) for inputs, expected in cases]
    plain = runner.backend
    options = dict(device=runner.device, groups=plain._groups, passes=ALL_PASSES, cuda_graph=device == "cuda")
    conditioning = runner.folder.architecture.conditioning
    runner.backend = PyTorchBackend(plain.graph, plain._weights, conditioning=conditioning, **options)
    for inputs, expected in cases:  # a batch of one has one timestep, as in a pipeline
        runner.timesteps = lambda inputs=inputs: inputs["timestep"]
        errors.append(relative_error(runner.run(inputs).cpu(), expected))
    return [max(of_ranks) for of_ranks in zip(*WORLD.allgather(errors), strict=True)]


def adapters(task: dict) -> dict:
    """As `parity` with LoRAs set, whether other checkpoints and the base give the same bits, and refusals."""
    opened = {name: MMDiTRunner.from_engine(task[name], backend="pytorch", device="cpu") for name in ("base", "fused")}
    runner, fused, cases = opened["base"], opened["fused"], torch.load(task["cases"], weights_only=True)
    before = [runner.run(inputs) for inputs, _ in cases]
    runner.set_adapters(task["loras"])
    outputs = [runner.run(inputs) for inputs, _ in cases]
    errors = [relative_error(output, expected) for output, (_, expected) in zip(outputs, cases, strict=True)]
    same = all(torch.equal(fused.run(inputs), output) for (inputs, _), output in zip(cases, outputs, strict=True))
    said = []
    for wrong in ([*task["loras"][1:], [task["loras"][0][0], 0.1 * WORLD.rank]], ["missing"] * (WORLD.rank == 1)):
        try:
            runner.set_adapters(wrong)
        except ValueError as error:
            said.append(str(error))
    kept = all(torch.equal(runner.run(inputs), output) for (inputs, _), output in zip(cases, outputs, strict=True))
    runner.set_adapters([])
    back = all(torch.equal(runner.run(inputs), output) for (inputs, _), output in zip(cases, before, strict=True))
    found = {"errors": errors, "same": same, "said": said, "kept": kept, "back": back}
    return {name: WORLD.allgather(value) for name, value in found.items()}


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


def controlled(task: dict) -> list[str]:
    """A picture by the ControlNet pipeline; the random states differ on purpose."""
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline

    pipe = load_pipeline(
        task["model"],
        task["engine"],
        pipeline_class=StableDiffusion3ControlNetPipeline,
        controlnet=SD3ControlNetModel.from_pretrained(task["controlnet"]),
        device="cpu",
        dtype=torch.float32,
        runner_options={"backend": "pytorch"},
        encode_on_rank_0=True,
    )
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(task["seed"] + WORLD.rank)
    options = task["options"] | {"control_image": Image.open(task["image"])}
    prompt = options.pop("prompt")
    (image,) = sample(pipe, prompt, generator=torch.Generator().manual_seed(7), **options)
    if WORLD.rank == 0:
        image.save(task["png"])
    return WORLD.allgather(hashlib.sha256(image.tobytes()).hexdigest())


def script(task: dict) -> dict:
    """A script of `mmdit_lib/compat`, as if it were started in `folder`."""
    before = os.getcwd()
    os.chdir(task["folder"])
    try:
        importlib.import_module(f"mmdit_lib.compat.{task['name']}").main(task["arguments"])
    finally:
        os.chdir(before)
    return {}


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
