"""Passes that turn collectives and their neighbors into operators of GPUs that reach each other's memory.

The numbers are compared with diffusers' in test_parallel.py, for every layout.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import MODELS as ALL

from mmdit_lib.config import BuildConfig, Layout, Resolution
from mmdit_lib.engine import symmetric
from mmdit_lib.engine.dry_graph import dry_graph
from mmdit_lib.engine.passes import NUMERICS, SPEED, apply
from mmdit_lib.engine.pytorch_backend import GPU_PASSES
from mmdit_lib.engine.rank_passes import gathered_attention, ulysses_attention

MODELS = {name: ALL[name] for name in ("sd3-medium", "sd3.5-medium")} | {
    "sd3.5-large": ALL["sd3.5-large"].model_copy(update=dict(num_attention_heads=4, attention_head_dim=12))
}
LAYOUTS = {
    "cp2 allgather": Layout(cp_size=2),
    "cp2 ulysses": Layout(cp_size=2, cp_method="ulysses"),
    "tp2": Layout(tp_size=2),
    "tp2 trtllm": Layout(tp_size=2, tp_layout="trtllm"),
    "cfg2": Layout(cfg_size=2),
    "cfg2 x cp2": Layout(cfg_size=2, cp_size=2),
    "tp2 x cp2 ulysses": Layout(tp_size=2, cp_size=2, cp_method="ulysses"),
}


def graph(model: str, layout: Layout):
    config = BuildConfig.one_size(Resolution.read(128), 2, 77)
    return dry_graph(MODELS[model], layout.at(layout.world_size - 1), config, "float32")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_only_the_output_is_left_to_collectives(model, name):
    config, layout = MODELS[model], LAYOUTS[name]
    layers = apply(graph(model, layout), GPU_PASSES)
    found = Counter(layer.type for layer in layers)
    attentions = config.num_layers + len(config.dual_attention_layers)
    ulysses = layout.cp_method == "ulysses"
    kind = "PROJECTED" if layout.cp_size == 1 else "ULYSSES" if ulysses else "GATHERED"
    assert found[f"{kind}_ATTENTION"] == attentions and found["ATTENTION"] == 0
    reduced = found["REDUCED_GATED_SUM"] + found["REDUCED_GATED_NORM"]
    gated = 2 * config.num_layers + 2 * (config.num_layers - 1) + len(config.dual_attention_layers)
    if layout.tp_layout == "trtllm":  # its linear layers gather, and its GEMMs have no reduced neighbor
        assert reduced < gated and found["DIST_COLLECTIVE"] > 1
        return
    assert reduced == (gated if layout.tp_size > 1 else 0)
    assert found["DIST_COLLECTIVE"] == (1 if layout.cp_size * layout.cfg_size > 1 else 0)


def test_the_ranks_wait_for_each_other_where_a_step_begins():
    layers = apply(graph("sd3.5-medium", LAYOUTS["tp2 x cp2 ulysses"]), GPU_PASSES)
    marked = [(layer.type, tuple(x["group"]), x["first"]) for layer in layers if "first" in (x := layer.attributes)]
    assert len({group for _, group, _ in marked}) == 2 and marked[0] == ("ULYSSES_ATTENTION", (1, 3), True)
    for group in {group for _, group, _ in marked}:
        assert [first for _, of, first in marked if of == group].index(True) == 0
        assert sum(first for _, of, first in marked if of == group) == 1


@pytest.mark.parametrize(
    ("name", "one"), [("cp2 allgather", gathered_attention), ("cp2 ulysses", ulysses_attention)], ids=["gather", "all"]
)
def test_near_misses_are_left_alone(name, one):
    """Another order of keys and values, of ranks and tokens, or of what is cut, is another attention."""
    layers = apply(graph("sd3.5-medium", LAYOUTS[name]), NUMERICS + SPEED)
    changed = {
        "keys and values swapped": lambda x: (
            x.type == "ATTENTION" and replace(x, inputs=(x.inputs[0], x.inputs[2], x.inputs[1]))
        ),
        "ranks after tokens": lambda x: (
            x.attributes.get("first_transpose") == [1, 2, 0, 3, 4]
            and replace(x, attributes=x.attributes | {"first_transpose": [1, 2, 3, 0, 4]})
        ),
        "an all-reduce": lambda x: (
            x.type == "DIST_COLLECTIVE" and replace(x, attributes=x.attributes | {"operation": "ALL_REDUCE"})
        ),
    }
    assert one(layers) != layers
    for what, change in changed.items():
        wrong = [change(x) or x for x in layers]
        assert wrong != layers and one(wrong) == wrong, what


class FakeSlot:
    def __init__(self, nbytes, group, device):
        self.nbytes, self.barriers = nbytes, 0

    def barrier(self):
        self.barriers += 1


def test_slots_take_turns(monkeypatch):
    """What one rank may still read is not what another fills: an exchange apart, and where a step begins."""
    monkeypatch.setattr(symmetric, "Slot", FakeSlot)
    monkeypatch.setattr(symmetric.dist.distributed_c10d, "_resolve_process_group", lambda name: None)
    monkeypatch.setattr(symmetric.dist, "get_rank", lambda group: 0)
    exchange = symmetric.Exchange("0", torch.device("cpu"))
    step = [exchange.slot(5_000_000, first=True), exchange.slot(4_000_000, first=False)]
    step.append(exchange.slot(5_000_000, first=False))
    assert step[0] is step[2] is not step[1] and all(slot.nbytes >= 5_000_000 for slot in step)
    assert sum(slot.barriers for slot in step[:2]) == 1
    larger = exchange.slot(50_000_000, first=False)
    assert larger not in step
    again = [exchange.slot(5_000_000, first=True), exchange.slot(5_000_000, first=False)]
    assert again == step[:2], "a captured step uses the same slots as before"


def test_ranks_without_gpus_have_no_exchange():
    assert symmetric.exchange(torch.zeros(1), "no group is looked up") is None
