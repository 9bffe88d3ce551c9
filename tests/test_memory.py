"""Memory from the graph alone, beside what a GPU measured."""

import json
import time
from pathlib import Path

import pytest
from helpers import case

from benchmarks.parallel import LAYOUTS
from benchmarks.single_gpu import PROFILE, TEXT_TOKENS
from mmdit_lib.config import BuildConfig, Layout, Resolution, Sizes
from mmdit_lib.engine.dry_graph import dry_graph
from mmdit_lib.reports.inspection import inspect
from mmdit_lib.reports.memory import memory_of
from mmdit_lib.reports.resident import resident_during
from mmdit_lib.sd3 import KNOWN_MODELS, SD3

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
MEASURED = json.loads((RESULTS / "single_gpu_h100.json").read_text())["rows"]
MEASURED_ON_TWO = json.loads((RESULTS / "parallel_h100x2_medium.json").read_text())["rows"]


@pytest.mark.slow
def test_as_measured_on_a_gpu():
    """Measurements are rounded to 0.01 GB; the allocator rounds each tensor up to 2 MB."""
    model = KNOWN_MODELS["stable-diffusion-3.5-medium"]
    graph = dry_graph(model, Layout().at(0), PROFILE, "bfloat16")
    rows = [row for row in MEASURED if row["model"] == "3.5-medium"]
    assert len(rows) == 4
    for row in rows:
        sizes = Sizes(row["batch"], row["side"], row["side"], TEXT_TOKENS)
        found = memory_of(graph, SD3, model, Layout(), "bfloat16", sizes, PROFILE)
        assert found.weights / 1e9 == pytest.approx(4.94, abs=0.005)  # the size of its published file
        assert found.total / 1e9 == pytest.approx(found.weights / 1e9 + row["GB"]["ours"], abs=0.015)
        # The modulations of 16 rows: of all 24 blocks, 13 of which are dual, and of the last norm.
        vectors = 24 * 12 - 4 + 13 * 3 + 2
        assert found.ahead == 16 * vectors * model.hidden_size * 2


@pytest.mark.slow
def test_as_measured_on_two_gpus():
    """Every rank's peak; the memory they exchange through is not torch's, so it is not part of it."""
    rows = {row["layout"]: row["GB"] for row in MEASURED_ON_TWO if "GB" in row}
    assert rows.keys() == LAYOUTS.keys()
    model, sizes = KNOWN_MODELS["stable-diffusion-3.5-medium"], Sizes(2, 1024, 1024, TEXT_TOKENS)
    build = BuildConfig.one_size(Resolution.read(1024), 2, TEXT_TOKENS)
    for name, layout in LAYOUTS.items():
        graph = dry_graph(model, layout.at(0), build, "bfloat16")
        found = memory_of(graph, SD3, model, layout, "bfloat16", sizes, build)
        assert (found.activations + found.ahead) / 1e9 == pytest.approx(rows[name], abs=0.005), name


@pytest.mark.slow
def test_layouts_share_weights_and_activations():
    c = case("sd3.5-medium")
    config = inspect(c.engine()).folder.build_config

    def memory(**sizes):
        layout = Layout(**sizes)
        graph = dry_graph(c.config, layout.at(0), config, "float32")
        return memory_of(graph, SD3, c.config, layout, "float32", config.sizes(layout.cfg_size)[2], config)

    config = config.model_copy(update=dict(max_batch_size=4))
    one, tp, cp, cfg = memory(), memory(tp_size=2), memory(cp_size=2), memory(cfg_size=2)
    assert one.weights == sum(p.numel() * 4 for p in c.reference.parameters()) + 48 * 48 * 64 * 4  # and the table
    assert 0.5 < tp.weights / one.weights < 1 and cp.weights == cfg.weights == one.weights
    assert max(tp.activations, cp.activations, cfg.activations) < one.activations
    # Keys and values of all tokens; the sums that one linear layer's halves contribute to. Twice each.
    rows, columns = (side // 16 for side in (config.max_resolution.height, config.max_resolution.width))
    image, text, token = rows * columns, config.max_text_tokens, 4 * c.config.hidden_size * 4
    assert one.exchange == cfg.exchange == 0
    assert cp.exchange == 2 * (image + text) * 2 * token
    assert tp.exchange == 2 * max(image, text) * token


def test_resident_memory_is_watched():
    run = resident_during(lambda: [bytearray(50_000_000), time.sleep(0.1)])
    seconds, megabytes = zip(*run, strict=True)
    assert max(megabytes) > 40 and list(seconds) == sorted(seconds)
