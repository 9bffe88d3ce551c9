"""The figures match the data: labels, numbers and colors are read from the drawn figure."""

import io

import numpy as np
import pandas as pd
import pytest
from helpers import MODELS
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mmdit_lib import plots
from mmdit_lib.config import Layout
from mmdit_lib.sd3 import KNOWN_MODELS

MEDIUM = KNOWN_MODELS["stable-diffusion-3.5-medium"]


def texts(figure: Figure) -> str:
    """All text in a figure; drawing it must not warn (of a missing glyph or lack of space)."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    found = [
        t.get_text() for axes in figure.axes for t in (*axes.texts, axes.title, axes._left_title, axes.xaxis.label)
    ]
    legends = [axes.get_legend() for axes in figure.axes] + figure.legends
    found += [t.get_text() for legend in legends if legend for t in legend.get_texts()]
    return "\n".join([*found, figure._suptitle.get_text() if figure._suptitle else ""])


def test_a_notebook_shows_them():
    image = Image.open(io.BytesIO(plots.time_bars({"a": 1.0})._repr_png_()))
    assert image.width > 500 and len(np.unique(np.asarray(image.convert("L")))) > 2


def table(errors, statuses=None) -> pd.DataFrame:
    modules = [f"transformer_blocks.{i}" for i in range(len(errors))]
    return pd.DataFrame(
        dict(
            module=modules,
            relative_error=errors,
            depth=range(len(errors)),
            status=statuses or ["ok"] * len(errors),
            tolerance=5e-6,
        )
    )


def test_error_by_depth():
    figure = plots.error_by_depth(
        {"float32": table([0.0, 1e-7, 2e-7]), "float16": table([1e-3, np.nan, 0.5], ["ok", "missing", "mismatch"])}
    )
    (axes,) = figure.axes
    assert axes.get_yscale() == "log" and [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"]
    said = texts(figure)
    assert "float32" in said and "float16" in said and "tolerance" in said
    points = np.concatenate([c.get_offsets() for c in axes.collections])
    assert len(points) == 5 and (points[:, 1] > 0).all()
    assert "exactly 0" in said
    assert texts(plots.error_by_depth({"exact": table([0.0, 0.0])}))
    assert "exactly 0" not in texts(plots.error_by_depth({"inexact": table([1e-7, 2e-7])}))


def test_many_blocks_get_few_ticks():
    assert len(plots.error_by_depth({"a": table([1e-7] * 38)}).axes[0].get_xticks()) <= 14


@pytest.mark.parametrize(
    ("gap", "words"),
    [(0, "equal in every pixel"), (1, "255 times\nat most 1 gray level of"), (5, "51 times\nat most 5 gray levels")],
)
def test_images_side_by_side(gap, words):
    a = Image.new("RGB", (32, 24), (100, 100, 100))
    b = Image.new("RGB", (32, 24), (100 - gap, 100, 100))
    figure = plots.images_side_by_side([a, b], ["diffusers", "engine"])
    assert len(figure.axes) == 3 and words in texts(figure) and "diffusers" in texts(figure)
    assert figure.axes[2].images[0].get_array().max() == (255 if gap else 0)
    assert len(plots.images_side_by_side([a, b, a], list("abc"), difference=False).axes) == 3


def test_few_differing_pixels_are_enlarged_and_counted():
    a = np.full((128, 128, 3), 100, np.uint8)
    b = a.copy()
    b[0, 0] += 2
    b[64, 100, 2] += 1
    figure = plots.images_side_by_side([a, b], ["one", "other"])
    assert "at most 2 gray levels of 255, in 2 pixels,\neach drawn as a square of 7 x 7" in texts(figure)
    shown = figure.axes[2].images[0].get_array()
    assert (shown[:4, :4] == 254).all() and (shown > 0).any(-1).sum() == 4 * 4 + 7 * 7
    assert shown[61:68, 97:104].max(-1).min() == 127 and not shown[61:68, 97:104, :2].any()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_shard_map_gives_every_rank_its_share(tp_size):
    figure = plots.shard_map(MEDIUM, tp_size)
    said = texts(figure)
    for label in (
        "attn.to_q\ncolwise\n1536 x 1536",
        "ff.net.1\nrowwise\n1536 x 6144",
        "norm1.linear\nreplicated\n13824 x 1536",
        f"rank {tp_size - 1}",
    ):
        assert label in said, label
    parts = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and p.get_fill()]
    area = {
        c: sum(p.get_width() * p.get_height() for p in parts if to_hex(p.get_facecolor()) == c)
        for c in plots.figure.COLOURS[:tp_size]
    }
    assert max(area.values()) == pytest.approx(min(area.values())) and min(area.values()) > 0


def test_shard_map_refuses_and_knows_both_layouts():
    assert "colwise_gather" in texts(plots.shard_map(MEDIUM, 2, tp_layout="trtllm"))
    with pytest.raises(ValueError, match="38 heads are not divisible by tp_size=4; use 1, 2, 19 or 38"):
        plots.shard_map(KNOWN_MODELS["stable-diffusion-3.5-large"], 4)


@pytest.mark.parametrize(
    ("model", "block", "there", "absent"),
    [
        (MEDIUM, 0, ["attn2", "with dual attention", "RMS norm", "1536 to 6144", "to_add_out"], ["only reads"]),
        (MEDIUM, 13, ["ff_context", "the next block"], ["attn2", "only reads"]),
        (MEDIUM, 23, ["only attends to the text", "norm_out"], ["attn2", "ff_context", "to_add_out"]),
        (MODELS["sd3-medium"], 0, ["4 heads of 16"], ["RMS norm", "attn2"]),
    ],
)
def test_block_diagram_is_drawn_from_the_model(model, block, there, absent):
    said = texts(plots.block_diagram(model, block))
    assert all(word in said for word in there), said
    assert not any(word in said for word in absent), said


def test_bars_carry_numbers_and_ratios():
    said = texts(plots.time_bars({"diffusers": 101.2, "engine": 61.5}))
    assert "101 ms" in said and "61.5 ms, 1.65 times faster" in said and "101 ms," not in said
    said = texts(plots.traffic_bars({"megatron": 310e6, "trtllm": 775e6, "none": 0}))
    assert "310 MB\n" in said and "775 MB, 2.5 times the minimum" in said
    assert "2,610 MB" in texts(plots.traffic_bars({"trtllm": 2.6082e9}))


def test_bars_are_of_one_colour():
    bars = plots.time_bars({"a": 1.0, "b": 2.0, "c": 3.0}).axes[0].patches
    assert len(bars) == 3 and len({to_hex(bar.get_facecolor()) for bar in bars}) == 1


def test_predictions_add_up_beside_the_measurements():
    parts = {"tp 2": dict(divided=20.0, replicated=3.0, transfer=6.0, hidden=2.0, latency=0.5)}
    figure = plots.predicted_and_measured(parts, {"tp 2": 26.0}, title="two GPUs")
    said = texts(figure)
    assert "27.5, measured 26.0" in said and all(word in said for word in ("divided work", "latency", "two GPUs"))
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [20.0, 3.0, 4.0, 0.5]
    assert [bar.get_x() for bar in bars] == [0.0, 20.0, 23.0, 27.0]
    assert "measured" not in texts(plots.predicted_and_measured(parts, {}))


def test_timeline_draws_every_span():
    ranks = [[("GEMM", "a", 5.0, 5.01), ("collective", "b", 5.01, 5.03)], [("attention", "a", 5.0, 5.02)]]
    figure = plots.timeline({"tp 2": ranks, "cfg 2": ranks[:1]}, title="two processes")
    assert "collective" in texts(figure) and [len(axes.get_yticks()) for axes in figure.axes] == [2, 1]
    (gemm, attention) = (
        next(c for c in figure.axes[0].collections if to_hex(c.get_facecolor()[0]) == colour and c.get_paths())
        for colour in (plots.figure.COLOURS[0], plots.figure.COLOURS[2])
    )
    assert gemm.get_paths()[0].get_extents().width == pytest.approx(10)
    assert figure.axes[0].get_xlim()[1] == pytest.approx(30)
    assert attention.get_paths()[0].get_extents().ymin > gemm.get_paths()[0].get_extents().ymax


def test_rank_grid_numbers_the_ranks():
    figure = plots.rank_grid(Layout(tp_size=2, cp_size=3, cfg_size=2))
    assert len(figure.axes) == 2 and "unconditional" in texts(figure)
    place = {t.get_text(): t.get_position() for t in figure.axes[1].texts}
    assert place["rank 6"] == (0.5, 0.5) and place["rank 7"] == (1.5, 0.5) and place["rank 8"] == (0.5, 1.5)
    colours = [to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches]
    assert colours[0] == colours[1] != colours[2]
    assert len(plots.rank_grid(Layout()).axes) == 1
