"""The model of a step's time: every term by hand, and its predictions beside what GPUs measured.

The measurements are those that the model was made with, on 2026-11-26, before modulations were computed ahead: each
step read all of their weights. Notebook 07 compares the model with those of benchmarks/results, from which it is up to
1.6 % (SD3.5-medium) and 4.3 % (SD3.5-large) off.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import MODELS

from benchmarks.parallel import LAYOUTS
from mmdit_lib.config import Layout, Sizes
from mmdit_lib.reports.step_time import Link, OneGPU, conditioning_bytes, pairs_of, predict, rank_collectives
from mmdit_lib.sd3 import KNOWN_MODELS

RESULTS = Path(__file__).parent / "data/step_time"
LATEST = Path(__file__).parents[1] / "benchmarks/results"
TWO = {size: json.loads((RESULTS / f"parallel_h100x2_{size}.json").read_text())["rows"] for size in ("medium", "large")}
ONE = json.loads((RESULTS / "single_gpu_h100.json").read_text())["rows"]
SIZES = Sizes(2, 1024, 1024, 333)
NVLINK, PCIE = Link("NVLink", 328, 4, direct=True), Link("PCIe", 50, 10)
MEMORY_BANDWIDTH, LOSS = 3350, 0.060
SMALL = MODELS["sd3.5-medium"]
SMALL_SIZES = Sizes(2, 64, 64, 77)
KERNELS = {"attention": 40.0, "GEMM": 40.0, "norm, modulation, gate": 10.0, "heads": 5.0, "other": 5.0}
SMALL_GPU = OneGPU(100.0, KERNELS, SMALL_SIZES, MEMORY_BANDWIDTH)


def measured(size: str) -> tuple:
    rows = {row["layout"]: row for row in TWO[size] if "ms CUDA graph" in row}
    alone = rows["1 GPU"]
    one = OneGPU(alone["ms CUDA graph"], alone["profile"], SIZES, MEMORY_BANDWIDTH, LOSS)
    return KNOWN_MODELS[f"stable-diffusion-3.5-{size}"], one, {name: row["ms CUDA graph"] for name, row in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "tolerance"), [("medium", 0.025), ("large", 0.05)])
def test_beside_two_gpus(size, tolerance):
    """The loss is fitted on SD3.5-medium, cfg 2; the form was chosen with earlier measurements of all rows in view.

    SD3.5-large loses less: 1.5 % by its own cfg 2, so with SD3.5-medium's 6.0 % it is predicted too slow.
    """
    model, one, times = measured(size)
    assert times.keys() == LAYOUTS.keys()
    for name, layout in LAYOUTS.items():
        assert predict(model, layout, one, NVLINK).ms == pytest.approx(times[name], rel=tolerance), name


@pytest.mark.slow
@pytest.mark.parametrize(("size", "tolerance"), [("medium", 0.025), ("large", 0.05)])
def test_beside_the_latest_measurements(size, tolerance):
    """With modulations computed ahead: 7 of an image's 28 steps share one reading of their weights."""
    rows = json.loads((LATEST / f"parallel_h100x2_{size}.json").read_text())["rows"]
    found = {row["layout"]: row for row in rows if "ms CUDA graph" in row}
    alone, model = found["1 GPU"], KNOWN_MODELS[f"stable-diffusion-3.5-{size}"]
    one = OneGPU(alone["ms CUDA graph"], alone["profile"], SIZES, 7 * MEMORY_BANDWIDTH, loss=0.061)
    assert found.keys() == LAYOUTS.keys()
    for name, layout in LAYOUTS.items():
        assert predict(model, layout, one, NVLINK).ms == pytest.approx(found[name]["ms CUDA graph"], rel=tolerance), (
            name
        )


@pytest.mark.slow
@pytest.mark.parametrize("size", TWO)
def test_the_loss_is_that_of_cfg_2(size):
    """What each model's own cfg 2 gives; `LOSS` is the first."""
    model, one, times = measured(size)
    step = predict(model, Layout(cfg_size=2), replace(one, loss=0.0), NVLINK)
    found = (times["cfg 2"] - (step.ms - step.divided)) / step.divided - 1
    assert found == pytest.approx({"medium": LOSS, "large": 0.015}[size], abs=0.0005)


@pytest.mark.slow
def test_whole_images_beside_two_gpus():
    """The steps of an image: one step's tolerance, and 1 % for the scheduler between them, which is not predicted."""
    model, one, _ = measured("medium")
    pictures = json.loads((RESULTS / "pictures_h100x2.json").read_text())["rows"]
    assert {row["layout"] for row in pictures} == LAYOUTS.keys()
    for row in pictures:
        steps = 28 * predict(model, LAYOUTS[row["layout"]], one, NVLINK).ms / 1000
        assert steps == pytest.approx(row["seconds"][2], rel=0.035), row["layout"]


@pytest.mark.slow
def test_tensor_parallelism_loses_over_pcie():
    model, one, _ = measured("medium")
    two = predict(model, Layout(tp_size=2), one, PCIE)
    assert two.ms > one.ms > predict(model, Layout(cp_size=2), one, PCIE).ms
    assert one.ms / 2 + two.megabytes / PCIE.bandwidth == pytest.approx(54.9, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["3-medium", "3.5-medium", "3.5-large"])
def test_other_sizes_on_one_gpu(name):
    model = KNOWN_MODELS[f"stable-diffusion-{name}"]
    rows = [row for row in ONE if row["model"] == name]
    first = next(row for row in rows if (row["side"], row["batch"]) == (1024, 2))
    one = OneGPU(first["ms"]["ours + CUDA graph"], first["kernels"], SIZES, MEMORY_BANDWIDTH, LOSS)
    for row in rows:
        sizes = Sizes(row["batch"], row["side"], row["side"], 333)
        found = predict(model, Layout(), one, NVLINK, sizes=sizes).ms
        assert found == pytest.approx(row["ms"]["ours + CUDA graph"], rel=0.05), sizes


def test_every_term_by_hand():
    link = Link("by hand", bandwidth=2.0, latency=100.0)
    layout = Layout(tp_size=2)
    found = rank_collectives(SMALL, layout, SMALL_SIZES, "float32")
    step = predict(SMALL, layout, SMALL_GPU, link, dtype="float32")
    sent = sum(c.nbytes * times for c, times in found.items())  # an all-reduce of two ranks sends its input once
    assert step.collectives == found.total() > 0
    assert step.megabytes == pytest.approx(sent / 1e6) and step.transfer == pytest.approx(sent / 1e6 / 2.0)
    assert step.latency == pytest.approx(found.total() * 0.1) and step.hidden == 0
    conditioning = conditioning_bytes(SMALL, "bfloat16") / 1e6 / MEMORY_BANDWIDTH
    assert step.divided == pytest.approx((90.0 - conditioning) / 2)
    assert step.replicated == pytest.approx(10.0 + 2 * conditioning)  # float32 has twice the bytes
    assert step.ms == pytest.approx(step.divided + step.replicated + step.transfer + step.latency)


def test_one_gpu_is_what_was_measured():
    assert predict(SMALL, Layout(), SMALL_GPU, PCIE).ms == pytest.approx(100.0)


def test_a_direct_link_hides_the_kernel_that_transfers():
    slow, fast = (Link("-", bandwidth, 0, direct=True) for bandwidth in (1e-3, 1e9))
    for layout, kernel in ((Layout(tp_size=2), 10.0), (Layout(cp_size=2), 2.5)):
        assert predict(SMALL, layout, SMALL_GPU, slow).hidden == pytest.approx(kernel)
        step = predict(SMALL, layout, SMALL_GPU, fast)
        assert step.hidden == pytest.approx(step.transfer)
        assert predict(SMALL, layout, SMALL_GPU, replace(slow, direct=False)).hidden == 0
    assert predict(SMALL, Layout(tp_size=4), SMALL_GPU, slow).hidden == 0  # NCCL's all-reduce


def test_half_of_the_work_takes_more_than_half_of_the_time():
    one = replace(SMALL_GPU, loss=0.1)
    two, four = (predict(SMALL, Layout(cp_size=n), one, NVLINK).divided for n in (2, 4))
    conditioning = conditioning_bytes(SMALL, "bfloat16") / 1e6 / MEMORY_BANDWIDTH
    assert two == pytest.approx((100 - conditioning) * 0.5 * 1.1)
    assert four == pytest.approx((100 - conditioning) * 0.25 * 1.1**2)
    assert one.scaled(1.0, 4.0) == 4.0


def test_groups_that_span_machines_use_the_network():
    layout, slow = Layout(tp_size=2, cfg_size=2), Link("network", 1e-3, 1000)
    found = rank_collectives(SMALL, layout, SMALL_SIZES, "bfloat16")
    across = {c: times for c, times in found.items() if c.group == (0, 2)}
    assert len(across) == 1 and found.total() > 1
    step = predict(SMALL, layout, SMALL_GPU, Link("-", 1e12, 0), network=slow, ranks_per_machine=2)
    (gather,) = across
    assert step.transfer == pytest.approx(gather.sent / 1e6 / 1e-3) and step.latency == pytest.approx(1.0)
    apart = predict(SMALL, layout, SMALL_GPU, Link("-", 1e12, 0), network=slow, ranks_per_machine=1)
    assert apart.latency == pytest.approx(found.total() * 1.0)


def test_pairs_of_tokens():
    medium = KNOWN_MODELS["stable-diffusion-3.5-medium"]
    assert pairs_of(medium, SIZES) == 24 * (4096 + 333) ** 2 + 13 * 4096**2


def test_what_is_not_legal_is_refused():
    with pytest.raises(ValueError, match="4 heads are not divisible by tp_size=3"):
        predict(SMALL, Layout(tp_size=3), SMALL_GPU, NVLINK)
    with pytest.raises(ValueError, match="batch 1 is not divisible by cfg_size=2"):
        predict(SMALL, Layout(cfg_size=2), SMALL_GPU, NVLINK, sizes=SMALL_SIZES._replace(batch=1))
