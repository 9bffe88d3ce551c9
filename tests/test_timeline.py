"""Recording what a rank does when."""

from itertools import pairwise

import pytest
import torch
from helpers import case

from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.reports.timeline import Span, quickest, record_steps


def test_every_operator_of_a_step_in_order():
    runner = case("sd3.5-medium").runner()
    steps = record_steps(runner, sample_inputs(runner.folder, batch=2), steps=2)
    nodes = [n.meta["tensor"] for n in runner.backend.module.graph.nodes if n.op == "call_function"]
    assert len(steps) == 2 and steps[0][-1].end <= steps[1][0].start
    for spans in steps:
        assert [span.name for span in spans] == nodes
        assert all(a.start <= a.end <= b.start for a, b in pairwise(spans))
        assert {span.kind for span in spans} == {"GEMM", "attention", "other"}  # one rank: no collectives


def test_only_where_a_call_returns_when_its_work_is_done():
    class OnGPU:
        device = torch.device("cuda")

        class backend:
            name = "pytorch"

    with pytest.raises(ValueError, match="record_steps: pytorch on cuda; use the pytorch backend on a CPU"):
        record_steps(OnGPU(), {})


def test_the_quickest_step_of_all_ranks():
    def spans(start, end):
        return [Span("GEMM", "a", start, end)]

    ranks = [[spans(0, 5), spans(10, 13)], [spans(0, 1), spans(10, 12)]]
    assert quickest(ranks) == [spans(10, 13), spans(10, 12)]
