"""Times of layers: measured by the pytorch backend, attributed to modules, summed, drawn."""

import time

import helpers
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from torch import fx

from mmdit_lib import plots
from mmdit_lib.engine.profile import layer_times
from mmdit_lib.reports.profile import by_module, module_of, profile_step, profile_table

BLOCKS = "transformer_blocks"
MODULES = {"", "proj_out", BLOCKS, f"{BLOCKS}.1", f"{BLOCKS}.1.attn", f"{BLOCKS}.1.attn.to_q", f"{BLOCKS}.12"}


def slow(x):
    time.sleep(0.02)
    return x + 1


def test_the_slow_node_has_the_time():
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = {name: graph.call_function(f, (x,)) for name, f in (("a.slow", slow), ("b", torch.neg))}
    for name, node in nodes.items():
        node.meta["tensor"] = name
    graph.output(tuple(nodes.values()))
    times = layer_times(fx.GraphModule(torch.nn.Module(), graph), [torch.ones(3)], torch.device("cpu"), repeats=3)
    assert times.keys() == {"a.slow", "b"}
    assert (
        times["a.slow"] >= 20 and times["a.slow"] > times["b"]
    )  # milliseconds: `sleep` sleeps no less than it is asked to


def test_every_layer_of_a_step():
    case = helpers.case("sd3.5-medium")
    runner = case.runner()
    size = runner.folder.build_config.opt_resolution
    times = profile_step(runner, resolution=size, batch=2, text_tokens=154, repeats=1)
    nodes = [n.meta["tensor"] for n in runner.backend.module.graph.nodes if n.op == "call_function"]
    assert list(times.layer) == nodes and (times.ms > 0).all()
    groups = by_module(times, BLOCKS)
    assert groups.ms.sum() == pytest.approx(times.ms.sum()) and groups.layers.sum() == len(times)
    parts = {block: set(rows.part) for block, rows in groups.groupby("block")}
    assert {"pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out"} <= parts[-1]
    assert {"attn", "attn2", "ff", "ff_context", "norm1"} <= parts[0] and "ff_context" not in parts[2]


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        (f"{BLOCKS}.1.attn.to_q", f"{BLOCKS}.1.attn.to_q"),
        (f"{BLOCKS}.1.attn/concat_2", f"{BLOCKS}.1.attn"),
        (f"{BLOCKS}.12:0", f"{BLOCKS}.12"),
        (f"{BLOCKS}.1.new.part/sum", f"{BLOCKS}.1"),
        (f"__myl_MulAdd+{BLOCKS}.1.attn/sum+proj_out_0x3", f"{BLOCKS}.1.attn"),
        (f"{{ForeignNode[{BLOCKS}.1.attn.to_q/matmul...proj_out/sum]}}", f"{BLOCKS}.1.attn.to_q"),
        ("reshape_2", ""),
        ("output", ""),
    ],
)
def test_the_module_of_a_layer(layer, module):
    assert module_of(layer, MODULES) == module


TIMES = pd.DataFrame(
    [("a", f"{BLOCKS}.0.attn.to_q", 3.0), ("b", f"{BLOCKS}.1.attn", 2.0), ("c", f"{BLOCKS}.1", 1.0), ("d", "", 0.5)],
    columns=["layer", "module", "ms"],
)


def test_the_table_sums_over_blocks():
    table = profile_table(TIMES, BLOCKS, "title")
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        (f"{BLOCKS}.*.attn", "2", "5.000", "76.9%"),
        (f"{BLOCKS}.* (own layers)", "1", "1.000", "15.4%"),
        ("outside any module", "1", "0.500", "7.7%"),
        ("all", "4", "6.500", ""),
    ]


def test_the_plot_stacks_the_modules_of_each_block():
    axes = plots.time_by_block(by_module(TIMES, BLOCKS)).axes[0]
    attn = [bar.get_width() for bar in axes.patches if to_hex(bar.get_facecolor()) == plots.figure.COLOURS[0]]
    assert attn == [3.0, 2.0] and sum(bar.get_width() for bar in axes.patches) == TIMES.ms.sum()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "outside"]
    assert "6.5 ms in all" in axes.get_title("left")
