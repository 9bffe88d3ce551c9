"""What depends only on the timestep and the prompt, computed for several steps at once.

Tolerances as in test_network: float32 5e-6 of the norm; a GEMM with more rows may add up in another order.
"""

import time
import warnings
import weakref
from itertools import count

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from helpers import MODELS, case, relative_error

from benchmarks import common
from mmdit_lib import load_pipeline
from mmdit_lib.checkpoint import convert
from mmdit_lib.engine.ahead import KEPT, ROWS, VALUE, Ahead, last_early, split_ahead
from mmdit_lib.engine.build import build
from mmdit_lib.engine.finite import FiniteCheck
from mmdit_lib.engine.kernel_passes import KERNELS, SUMS
from mmdit_lib.engine.lowering import lower
from mmdit_lib.engine.passes import NUMERICS, SPEED
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.engine.schedule import place_in
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


def view_at(inputs: dict, step: int, steps: torch.Tensor) -> dict:
    """With the timestep as a pipeline of diffusers gives it."""
    return {**inputs, "timestep": steps[step].expand(len(inputs["timestep"]))}


@pytest.fixture
def compared(monkeypatch) -> list[float]:
    """The timesteps of the calls in which values were compared, as on a GPU after a transfer."""
    found, compare = [], Ahead._compared

    def watch(self, inputs):
        found.append(float(inputs["timestep"][0]))
        return compare(self, inputs)

    monkeypatch.setattr(Ahead, "_compared", watch)
    return found


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


def test_values_are_compared_in_the_first_step_only(compared):
    """The prompt in the same tensors, and timesteps that are views of the schedule: the rest needs no transfer."""
    backend, inputs, counted = opened("sd3.5-medium")
    for _ in range(2):  # images
        steps = STEPS.clone()
        for step in range(len(steps)):
            given = view_at(inputs, step, steps)
            assert relative_error(backend(given, steps), backend(given)) <= LIMIT, step
    assert compared == [1000.0, 1000.0]
    assert counted.rows == [2, *[ROWS] * 8]


def test_two_prompts_in_each_step(compared):
    backend, inputs, _ = opened("sd3.5-medium")
    one = {name: value[:1] for name, value in inputs.items()}
    steps = STEPS.clone()
    for step in range(12):
        for tensors in (inputs, one):
            given = view_at(tensors, step, steps)
            assert relative_error(backend(given, steps), backend(given)) <= LIMIT, step
    assert compared == [1000.0, 1000.0]


def test_tensors_that_are_written_to(compared):
    """In the middle of an image."""
    backend, inputs, _ = opened("sd3.5-medium")
    steps = STEPS.clone()
    changes = {
        2: lambda: inputs["pooled_projections"].mul_(2),
        4: lambda: steps.sub_(3),
        6: lambda: steps[7].sub_(1),
    }
    for step in range(9):
        changes.get(step, lambda: None)()
        given = view_at(inputs, step, steps)
        assert relative_error(backend(given, steps), backend(given)) <= LIMIT, step
    assert compared == [float(x) for x in (STEPS[0], STEPS[2], STEPS[4] - 3, STEPS[6] - 3)]


@pytest.mark.parametrize("changed", ["prompt", "schedule", "both"])
def test_uncounted_writes_between_images(changed, compared):
    """As those of CUDA graphs and collectives into tensors that are kept."""
    ahead = Ahead(lambda inputs: inputs["timestep"][:, None] + inputs["prompt"], "timestep", "prompt")
    steps, prompt = torch.linspace(1000.0, 100.0, 12), torch.ones(2, 3)
    for _ in range(3):
        for step in steps:
            found = ahead.rows({"timestep": step.expand(2), "prompt": prompt}, steps)
            assert torch.equal(found, (step + prompt).expand(2, 3))
        versions = prompt._version, steps._version
        if changed != "schedule":
            prompt.data.add_(1)
        if changed != "prompt":
            steps.data.mul_(0.9)
        assert versions == (prompt._version, steps._version)
    assert len(compared) == 3


def test_two_images_in_turn(compared):
    """With schedules of their own, as of two pipelines that share a runner."""
    ahead = Ahead(lambda inputs: inputs["timestep"][:, None] + inputs["prompt"], "timestep", "prompt")
    images = [(STEPS.clone(), torch.ones(2, 3)), (STEPS * 0.9, torch.zeros(2, 3))]
    for step in range(len(STEPS)):
        for steps, prompt in images:
            found = ahead.rows({"timestep": steps[step].expand(2), "prompt": prompt}, steps)
            assert torch.equal(found, (steps[step] + prompt).expand(2, 3))
    assert len(compared) == 2


def test_tensors_are_not_kept_alive():
    ahead = Ahead(lambda inputs: inputs["timestep"][:, None] + inputs["prompt"], "timestep", "prompt")
    steps, prompt = STEPS.clone(), torch.ones(2, 3)
    alive = [weakref.ref(steps), weakref.ref(prompt)]
    ahead.rows({"timestep": steps[0].expand(2), "prompt": prompt}, steps)
    del steps, prompt
    assert [x() for x in alive] == [None, None]


def test_tensors_of_inference_mode_are_compared(compared):
    """PyTorch does not count how often they are written to."""
    ahead = Ahead(lambda inputs: inputs["timestep"][:, None] + inputs["prompt"], "timestep", "prompt")
    with torch.inference_mode():
        steps, prompt = STEPS.clone(), torch.ones(2, 3)
        for step in range(3):
            prompt.add_(1)
            found = ahead.rows({"timestep": steps[step].expand(2), "prompt": prompt}, steps)
            assert torch.equal(found, (steps[step] + prompt).expand(2, 3))
    assert len(compared) == 3


def test_place_of_a_timestep():
    for steps in (STEPS, torch.arange(56.0)[9:37], torch.arange(56.0)[::2]):
        assert [place_in(x.expand(batch), steps) for x in steps for batch in (1, 3)] == sorted([*range(28)] * 2)
    assert [place_in(x.expand(2), STEPS) for x in STEPS[5:]] == [*range(5, 28)], "image to image"
    for other in (STEPS[3].clone(), STEPS[3:5], STEPS[3].expand(2).contiguous(), STEPS[3].double(), STEPS[3] + 0):
        assert place_in(other, STEPS) is None
    whole = torch.arange(56.0)
    assert place_in(whole[3].expand(2), whole[::2]) is None, "between two of them"
    assert place_in(whole[1].expand(2), whole[2:]) is None, "before the first"
    assert place_in(whole[9].expand(2), whole[:9]) is None, "after the last"


@pytest.mark.gpu
def test_steps_on_a_gpu_do_not_wait():
    """With the check for NaN, PyTorch reports synchronizations in an image's first step and its last one only.

    It does not report the wait for the step before, which ends while this step runs.
    """
    ahead = Ahead(lambda inputs: inputs["timestep"][:, None] + inputs["prompt"], "timestep", "prompt")
    not_finite, prompt, waits = FiniteCheck(late=True), torch.ones(2, 3, device="cuda"), []
    steps = STEPS.cuda()
    for step in range(len(steps)):
        inputs = {"timestep": steps[step].expand(2), "prompt": prompt}
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = ahead.rows(inputs, steps)
                assert not_finite({**inputs, "output": output}, inputs["timestep"], steps) == []
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(any("synchronizing" in str(x.message) for x in found))
        assert torch.equal(output, steps[step] + prompt)
    assert [step for step, waited in enumerate(waits) if waited] == [0, 27]


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
def test_in_a_pipeline(call, calls, engine, compared):
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
    prompts = 2 if "skip_guidance_layers" in call else 1
    assert len(compared) == prompts, "each in its first step; the runner hands the timesteps on as they are"


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


@pytest.mark.parametrize("inference", [False, True])
def test_a_timed_image_is_recognized_as_in_a_pipeline(compared, inference):
    """Unless a benchmark asks for what a step took when it was not."""
    backend, inputs, _ = opened("sd3.5-medium")
    with torch.inference_mode(inference):
        image = Loop(backend, inputs, SD3.conditioning[0])
        image()
    assert len(compared) == 1
    with common.comparing_steps():
        image()
    assert len(compared) == 1 + Loop.steps


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
