"""Memory beside the transformer, against published sizes and tensors counted by hand."""

import pytest
import torch
from helpers import MODELS

from mmdit_lib.config import Layout, Sizes
from mmdit_lib.reports.planner import PeakBytes, bytes_of_rank_0, companions, memory_plan
from mmdit_lib.reports.step_time import rank_memory

SIZES = Sizes(2, 64, 64, 77)


def test_peak_of_the_tensors_that_are_alive():
    with PeakBytes() as peak:
        x = torch.zeros(1000, dtype=torch.uint8)
        y = x.view(10, 100)[:, :50] + 1  # 500 bytes; views share their storage
        del x
        z = torch.zeros(400, dtype=torch.uint8)
        del y, z
        torch.zeros(1200, dtype=torch.uint8)
    assert peak.nbytes == 1500


def test_published_sizes():
    found = companions("bfloat16", 1024, 1024, 1)
    gigabytes = {name: round(n / 1e9, 2) for name, n in found.encoders.items()}
    assert gigabytes == {"CLIP-L": 0.25, "CLIP-G": 1.39, "T5-XXL": 9.52}
    assert found.vae == 2 * 83_819_683
    assert found.decoding == pytest.approx(3 * 256 * 1024**2 * 2, rel=1e-3)  # three tensors of the last stage
    assert companions("float32", 512, 1024, 2).decoding == pytest.approx(2 * found.decoding, rel=0.02)


def test_rank_0():
    model = MODELS["sd3.5-medium"]
    memory, beside = rank_memory(model, Layout(), SIZES, "bfloat16"), companions("bfloat16", 64, 64, 1)
    without = bytes_of_rank_0(model, Layout(), SIZES, "bfloat16", encoders=False)
    assert without == memory.weights + beside.vae + memory.ahead + max(memory.activations, beside.decoding)
    assert bytes_of_rank_0(model, Layout(), SIZES, "bfloat16") - without == sum(beside.encoders.values())


def test_plan():
    layouts = {"1 GPU": Layout(), "tp 3": Layout(tp_size=3)}
    plan = memory_plan({"small": MODELS["sd3.5-medium"]}, layouts, SIZES, cards=(1, 12))
    assert plan.loc[("small", "with"), "1 GPU"].endswith(": 12 GB")
    assert plan.loc[("small", "without"), "1 GPU"].endswith(": 1 GB") and set(plan["tp 3"]) == {"-"}
    assert set(memory_plan({"small": MODELS["sd3.5-medium"]}, layouts, SIZES, cards=(0,))["1 GPU"].str[-4:]) == {"none"}
