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


def test_error_of_fp8():
    compared = table([1e-7, 1e-7, 1e-7]).assign(fp8_error=[0.03, 0.05, np.nan], dtype_error=[1e-3, 2e-3, 3e-3])
    compared.attrs["dtype"] = "bfloat16"
    figure = plots.error_of_fp8(compared)
    (axes,) = figure.axes
    said = texts(figure)
    assert axes.get_yscale() == "log" and "FP8 and bfloat16" in said and "bfloat16 alone" in said
    assert [len(c.get_offsets()) for c in axes.collections] == [2, 3]
    assert [line.get_ydata()[-1] for line in axes.lines[:2]] == [0.04, 2e-3], "the median of neighbors"
    exact = compared.assign(dtype_error=0.0)
    exact.attrs["dtype"] = "float32"
    assert "alone" not in texts(plots.error_of_fp8(exact))


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
