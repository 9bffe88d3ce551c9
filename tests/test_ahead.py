"""What depends only on the timestep and the prompt, computed for several steps at once.

Tolerances as in test_network: float32 5e-6 of the norm; a GEMM with more rows may add up in another order.
"""

import time
import weakref
from itertools import count

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from helpers import MODELS, case, relative_error

from mmdit_lib import load_pipeline
from mmdit_lib.checkpoint import convert
from mmdit_lib.engine.ahead import KEPT, ROWS, VALUE, Ahead, last_early, split_ahead
from mmdit_lib.engine.build import build
from mmdit_lib.engine.kernel_passes import KERNELS, SUMS
from mmdit_lib.engine.lowering import lower
from mmdit_lib.engine.passes import NUMERICS, SPEED
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.bench import Loop, alternately
from mmdit_lib.sd3 import SD3

PASSES = NUMERICS + SPEED + KERNELS + SUMS
LIMIT = 5e-6
STEPS = torch.linspace(1000.0, 40.0, 28)


class Counted:
    """Counts the rows of each call."""

    def __init__(self, compute):
        self.compute, self.rows = compute, []

    def __call__(self, inputs):
        self.rows.append(len(inputs["timestep"]))
        return self.compute(inputs)


def opened(name: str) -> tuple[PyTorchBackend, dict[str, torch.Tensor], Counted]:
    """As on a GPU, with the formulas in place of the kernels."""
    c = case(name)
    weights = {n: x.clone() for n, x in c.runner().folder.open_checkpoint(verify=False).weights().items()}
    backend = PyTorchBackend(c.runner().backend.graph, weights, passes=PASSES, conditioning=SD3.conditioning)
    backend._ahead.compute = counted = Counted(backend._ahead.compute)
    return backend, c.inputs(patches=(5, 7), tokens=97, batch=2), counted


def at(inputs: dict, step: int, steps: torch.Tensor = STEPS) -> dict:
    return {**inputs, "timestep": steps[step].expand(len(inputs["timestep"])).contiguous()}


@pytest.mark.parametrize("name", MODELS)
def test_every_step_of_an_image(name):
    backend, inputs, counted = opened(name)
    for step in range(len(STEPS)):
        given = at(inputs, step)
        assert relative_error(backend(given, STEPS), backend(given)) <= LIMIT, step
    # Once with the rows of a step, to learn how many are this rank's; then 16 rows for every 8 of 28 steps.
    assert counted.rows == [2, *[ROWS] * 4]


def test_the_rest_does_not_read_the_timestep():
    backend, inputs, _ = opened("sd3.5-medium")
    first, rest = split_ahead(backend.module, SD3.conditioning)
    names = [node.target for node in rest.graph.find_nodes(op="placeholder")]
    assert sorted(names) == sorted({*inputs, VALUE} - set(SD3.conditioning))
    assert first(*(inputs[node.target] for node in first.graph.find_nodes(op="placeholder"))).shape[0] == 2
    weights = lambda module: {x.data_ptr() for x in module.buffers()}
    assert weights(first) | weights(rest) <= weights(backend.module), "weights were copied"


def test_a_network_that_cannot_be_split_stays_whole():
    """Without merged linear layers, each block has its own."""
    runner = case("sd3.5-medium").runner()
    module = lower(runner.backend.graph, runner.folder.open_checkpoint(verify=False).weights(), passes=NUMERICS)
    assert last_early(module.graph, SD3.conditioning) is None
    assert split_ahead(module, SD3.conditioning) is None


def test_another_prompt_and_other_weights():
    backend, inputs, counted = opened("sd3.5-medium")
    other = {**inputs, "pooled_projections": 2 * inputs["pooled_projections"]}
    one = {name: value[:1] for name, value in inputs.items()}  # skip-layer guidance: the prompt alone
    for step in range(3):
        for given in (inputs, other, one):
            given = at(given, step)
            assert relative_error(backend(given, STEPS), backend(given)) <= LIMIT
    assert KEPT == 2 and len(counted.rows) == 1 + 3 * 3, "three prompts in turn, two of them kept"
    counted.rows.clear()
    for step in range(3, 19):
        for given in (inputs, one):
            backend(at(given, step), STEPS)
    # The first prompt anew, and again after 8 steps; the second, with one row, is known for 16 steps from step 2 on.
    assert counted.rows == [ROWS, ROWS, ROWS]
    name = "transformer_blocks.0.norm1.linear.weight"
    before = backend(at(inputs, 0), STEPS)
    backend.replace_weights([name], lambda name: torch.zeros_like(backend._weights[name]))
    assert relative_error(backend(at(inputs, 0), STEPS), before) > 100 * LIMIT
    assert relative_error(backend(at(inputs, 0), STEPS), backend(at(inputs, 0))) <= LIMIT


@pytest.mark.parametrize(
    ("timestep", "batch"),
    [((500.0, 500.0), 2), ((1000.0, 40.0), 2), ((float("nan"),) * 2, 2), ((1000.0,) * 9, 9)],
    ids=["not in the schedule", "two timesteps", "NaN", "too many rows"],
)
def test_nothing_is_computed_ahead(timestep, batch):
    ahead = Ahead(lambda inputs: inputs["timestep"][:, None], "timestep", "prompt")
    inputs = {"timestep": torch.tensor(timestep), "prompt": torch.ones(batch, 3)}
    assert ahead.rows(inputs, STEPS) is None


def test_ranks_of_cfg_compute_their_rows():
    """Each of two ranks has half of the batch, and computes as many rows as one GPU would."""
    sizes = []

    def half(inputs):
        sizes.append(len(inputs["timestep"]) // 2)
        return (inputs["timestep"][:, None] + inputs["prompt"]).chunk(2)[1]

    ahead = Ahead(half, "timestep", "prompt")
    inputs = {"timestep": STEPS[3].expand(4), "prompt": torch.arange(8.0).view(4, 2)}
    found = ahead.rows(inputs, STEPS)
    assert torch.equal(found, (STEPS[3] + inputs["prompt"])[2:])
    assert sizes == [2, ROWS]
    assert torch.equal(
        ahead.rows({**inputs, "timestep": STEPS[10].expand(4)}, STEPS), (STEPS[10] + inputs["prompt"])[2:]
    )
    assert sizes == [2, ROWS], "the eighth step was not known"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead")
    convert("tiny", folder / "checkpoint", dtype="float32", progress=False)
    return build(folder / "checkpoint", folder / "engine", plan=False, skip_layers=True, progress=False)


@pytest.mark.parametrize(
    ("call", "calls"),
    [({}, 2), ({"guidance_scale": 1.0}, 1), ({"skip_guidance_layers": [1]}, 3)],
    ids=["guidance", "no guidance", "skip-layer guidance"],
)
def test_in_a_pipeline(call, calls, engine):
    """The schedule of a pipeline's scheduler reaches the backend, also after the scheduler was replaced."""
    size = {"height": 64, "width": 64, "output_type": "latent"}
    found = []
    for conditioning in ((), SD3.conditioning):
        pipe = load_pipeline("tiny", engine, device="cpu", runner_options={"backend": "pytorch"})
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=2.0)
        graph, weights = pipe.transformer.backend.graph, pipe.transformer.folder.open_checkpoint(verify=False).weights()
        backend = PyTorchBackend(graph, weights, passes=PASSES, conditioning=conditioning)
        if conditioning:
            backend._ahead.compute = counted = Counted(backend._ahead.compute)
        pipe.transformer.backend = backend
        generator = torch.Generator().manual_seed(7)
        found.append(pipe("a red circle", num_inference_steps=10, generator=generator, **size, **call).images)
    assert relative_error(found[1], found[0]) <= 100 * LIMIT, "guidance multiplies errors, and ten steps add them up"
    assert counted.rows[1:] == [ROWS] * calls


def test_a_pipeline_made_from_the_components_of_another(engine):
    """It shares the scheduler and keeps it after the first pipeline is deleted; nothing keeps the first one alive."""
    first = load_pipeline("tiny", engine, device="cpu", runner_options={"backend": "pytorch"})
    first.scheduler = FlowMatchEulerDiscreteScheduler.from_config(first.scheduler.config, shift=2.0)
    runner, alive = first.transformer, weakref.ref(first)
    runner.timesteps()  # as in a step
    second = StableDiffusion3Img2ImgPipeline(**first.components)
    del first
    assert alive() is None, "freed without waiting for the garbage collector"
    second.scheduler.set_timesteps(7)
    assert torch.equal(runner.timesteps(), second.scheduler.timesteps)


def test_a_timed_image_runs_all_steps(monkeypatch):
    """`mmdit bench` on a GPU times whole images, including all steps and what is computed ahead."""
    seen = []

    def backend(inputs, timesteps):
        assert len(timesteps) == Loop.steps and float(inputs["timestep"][0]) in timesteps.tolist()
        seen.append(tuple(inputs["timestep"].tolist()))

    clock = count(step=0.28)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    times = alternately({"image": Loop(backend, {"timestep": torch.zeros(2)}, "timestep")}, torch.device("cpu"), 5)
    assert len(seen) == 3 * Loop.steps and len(set(seen)) == Loop.steps, "three rounds of one image"
    assert seen[0] == (1000.0, 1000.0) and all(a == b for a, b in seen)
    assert times["image"] == pytest.approx(280 / 28), "milliseconds of a step, not of an image"
