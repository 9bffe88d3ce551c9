"""The figures match the data: labels, numbers and colors are read from the drawn figure."""

import io
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import MODELS
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mmdit_lib import plots
from mmdit_lib.config import Layout
from mmdit_lib.engine.graph import Graph, Layer, Value
from mmdit_lib.sd3 import KNOWN_MODELS, SD3

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


def test_image_grid_places_each_image():
    images = {(row, column): np.full((8, 8, 3), 10 * row + column, np.uint8) for row in (1, 2) for column in (4, 5, 6)}
    figure = plots.image_grid(images, rows="guidance", columns="steps")
    assert [axes.images[0].get_array().max() for axes in figure.axes] == [14, 15, 16, 24, 25, 26]
    assert [axes.get_title() for axes in figure.axes] == ["steps 4", "steps 5", "steps 6", "", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes][::3] == ["guidance 1", "guidance 2"]


def test_roofline_places_each_part_below_its_limit():
    parts = {"slow": (1e12, 1e12, 2000.0), "fast": (1e12, 1e9, 2.0), "unmeasured": (1e12, 1e12, None)}
    figure = plots.roofline(parts, flops=1e15, bandwidth=1e12)
    points = {line.get_label(): line.get_xydata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"}
    assert points == {
        "slow\n2000.0 ms, 50% of its limit": pytest.approx([1, 5e11]),
        "fast\n2.0 ms, 50% of its limit": pytest.approx([1000, 5e14]),
        "unmeasured\nlimit only": pytest.approx([1, 1e12]),
    }
    assert "limited by memory" in texts(figure) and "1000 TFLOP/s" in texts(figure)


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


def boxes(figure: Figure) -> list[Rectangle]:
    return [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and p.get_fill()]


def areas(figure: Figure, ranks: int) -> list[float]:
    """The area of each rank's color."""
    found = [(to_hex(p.get_facecolor()), p.get_width() * p.get_height()) for p in boxes(figure)]
    return [sum(area for colour, area in found if colour == mine) for mine in plots.figure.COLOURS[:ranks]]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_shard_map_gives_every_rank_its_share_to_scale(tp_size):
    figure = plots.shard_map(MEDIUM, tp_size)
    said = texts(figure)
    for label in (
        "attn.\nto_q\ncolwise\n1536 to 1536",
        "ff.\nnet.1\nrowwise\n6144 to 1536",
        "norm1.linear\nreplicated\n1536 to 13824",
        f"rank {tp_size - 1}",
        "inputs",
        "101.4 million weights",
    ):
        assert label in said, label
    shapes = SD3.parameters(MEDIUM)
    block = {
        n: s for n, s in shapes.items() if n.startswith("transformer_blocks.0.") and n.endswith("weight") and s[1:]
    }
    sharded = {n: s for n, s in block.items() if ".norm" not in n}
    wanted, whole = (sum(map(math.prod, s.values())) / MEDIUM.hidden_size**2 for s in (sharded, block))
    assert areas(figure, tp_size) == pytest.approx([wanted / tp_size] * tp_size)
    grey = sum(p.get_width() * p.get_height() for p in boxes(figure) if p.get_hatch())
    assert grey == pytest.approx(whole - wanted)


def test_shard_map_refuses_and_knows_both_layouts():
    assert "colwise_gather" in texts(plots.shard_map(MEDIUM, 2, tp_layout="trtllm"))
    with pytest.raises(ValueError, match="38 heads are not divisible by tp_size=4; use 1, 2, 19 or 38"):
        plots.shard_map(KNOWN_MODELS["stable-diffusion-3.5-large"], 4)


@pytest.mark.parametrize("tp_size", [2, 3])
def test_sharded_mlp_is_to_scale(tp_size):
    figure = plots.sharded_mlp(384, 1536, tp_size)
    said = texts(figure)
    assert "1536 x 384\nevery rank" in said and "384 x 1536\ncolwise" in said and "1536 x 384\nrowwise" in said
    assert said.count("partial sum") == tp_size and "all-reduce" in said
    up = down = 4
    hidden, y = 4 * 1536 / 384, 1536 / 384
    assert areas(figure, tp_size) == pytest.approx([(up + hidden + down) / tp_size + y] * tp_size)


@pytest.mark.parametrize("lengths", [(6, 3), (4, 4), (7, 2)])
@pytest.mark.parametrize(("method", "ranks"), [("allgather", 2), ("ulysses", 2), ("allgather", 3), ("ulysses", 4)])
def test_attention_grids(method, ranks, lengths):
    figure = plots.attention_grids(method, lengths=lengths, heads=4, ranks=ranks)
    said = texts(figure)
    padded = sum(-(-n // ranks) * ranks for n in lengths)
    squares = (2 / 1 if method == "allgather" else 3 / ranks) * padded * 4 * (ranks - 1) / ranks
    assert f"receives {squares:g} squares" in said and f"rank {ranks - 1}" in said
    real = 4 * sum(lengths)  # of one tensor
    kept = {"allgather": 3 + (1 + 2 * ranks) + 1, "ulysses": 3 + 3 + 1 + 1}[method]
    assert sum(areas(figure, ranks)) == kept * real
    hatched = {"allgather": 5, "ulysses": 4}[method] * 4 * (padded - sum(lengths))
    assert sum(p.get_hatch() is not None for p in boxes(figure)) == hatched


def test_gathered_rows():
    figure = plots.gathered_rows((5, 3), 2)
    said = [t.get_text() for t in figure.axes[0].texts]
    assert " ".join(said[:11]) == "gathered i0 i1 i2 t0 t1 i3 i4 pad t2 pad"
    assert " ".join(said[11:]) == "attended to i0 i1 i2 i3 i4 t0 t1 t2"
    assert areas(figure, 2) == [2 * 5, 2 * 3]


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
    assert "310 MB\n" in said and "775 MB, 2.5 times the smallest" in said
    assert "2,610 MB" in texts(plots.traffic_bars({"trtllm": 2.6082e9}))


def test_bars_are_of_one_colour():
    bars = plots.time_bars({"a": 1.0, "b": 2.0, "c": 3.0}).axes[0].patches
    assert len(bars) == 3 and len({to_hex(bar.get_facecolor()) for bar in bars}) == 1


def layer(name, type_, inputs=(), dtype="float32", **attributes) -> Layer:
    return Layer(name, type_, tuple(inputs), Value(name, dtype, (-1, 4)), attributes)


def small_graph() -> Graph:
    """block.ff(x) + 2 times x, and a size that nothing shows."""
    layers = (
        layer("size", "SHAPE", ["x"], dtype="int64"),
        layer("block.ff.proj/weight", "CONSTANT", weight="block.ff.proj.weight"),
        layer("block.ff.proj/matmul", "MATRIX_MULTIPLY", ["x", "block.ff.proj/weight"]),
        layer("block.ff/gelu_tanh", "ACTIVATION", ["block.ff.proj/matmul"], kind="GELU_TANH"),
        layer("two", "CONSTANT", values=[2.0]),
        layer("block/prod", "ELEMENTWISE", ["x", "two"], op="PROD"),
        layer("block/sum", "ELEMENTWISE", ["block/prod", "block.ff/gelu_tanh"], op="SUM"),
    )
    return Graph(inputs=(Value("x", "float32", (-1, 4)),), outputs=("block/sum",), layers=layers, modules={})


def test_network_diagram_shows_every_layer():
    said = texts(plots.network_diagram(small_graph())).split("\n")
    assert [said.count(word) for word in ("MATRIX_MULTIPLY", "GELU_TANH", "CONSTANT", "×", "+", "SHAPE")] == [
        1,
        1,
        2,
        1,
        1,
        0,
    ]
    assert "ff.proj.weight" in said and "2" in said


def test_network_diagram_counts_the_layers_of_each_child():
    said = texts(plots.network_diagram(small_graph(), module="block", title="a block"))
    assert "ff\n3 layers" in said and "× 2" in said and "CONSTANT" not in said and "a block" in said


def test_parameters_by_part_knows_every_parameter():
    figure = plots.parameters_by_part({"medium": MEDIUM, "small": MODELS["sd3-medium"]})
    bars = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(200)
    said = texts(figure)
    assert "position table" in said and "2.47 billion parameters" in "".join(
        label.get_text() for label in figure.axes[0].get_yticklabels()
    )


def test_position_maps_mark_the_center():
    table = torch.arange(36.0).reshape(1, 36, 1) / 36
    figure = plots.position_maps(table, [0], {"two": 2, "four": 4})
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (6, 6) and shown[1, 0] == 6 / 36
    frames = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert [(p.get_x(), p.get_width()) for p in frames] == [(1.5, 2), (0.5, 4)]
    assert "two\nfour" in texts(figure)


def test_rounding_costs():
    assert plots.rounding_error(torch.tensor([1.0, 0.5]), torch.float16) == 0
    assert plots.rounding_error(torch.tensor([1 + 2**-9]), torch.bfloat16) == pytest.approx(2**-9, rel=0.01)
    figure = plots.rounding_costs({"a": torch.randn(999), "b": torch.ones(9)}, torch.bfloat16)
    (_, wide), (_, same) = figure.axes[0].collections[0].get_offsets()
    assert 1e-3 < wide < 3e-3 and same == plots.rounding.EXACT
    assert "2 tensors in bfloat16" in texts(figure) and "exactly 0" in texts(figure)


def test_memory_over_time_labels_the_peak():
    figure = plots.memory_over_time({"a": [(0.0, 0.0), (0.1, 42.4)], "b": [(0.0, 1.0)]}, {"a": 40.0})
    said = texts(figure)
    assert "a: peak 42 MB" in said and "predicted 40 MB" in said and "b: peak 1 MB" in said


def test_film_strip_has_a_row_per_label_and_a_column_per_step():
    image = Image.new("RGB", (16, 16), (200, 30, 30))
    figure = plots.film_strip({"noisy": [image] * 3, "predicted": [image] * 3}, ["t = 1", "t = 0.5", "t = 0"])
    assert len(figure.axes) == 6 and figure.axes[3].get_ylabel() == "predicted"
    assert [axes.get_title() for axes in figure.axes[:3]] == ["t = 1", "t = 0.5", "t = 0"]
    assert "a red one" in texts(plots.film_strip({"noisy": [image]}, ["t"], title="a red one"))
    with pytest.raises(ValueError, match="row 'noisy' has 2 images for 3 columns"):
        plots.film_strip({"noisy": [image] * 2}, list("abc"))


def test_attention_quadrants_add_up():
    weights = np.zeros((10, 10))
    weights[:4, :4], weights[:4, 4:] = 0.75 / 4, 0.25 / 6  # image queries
    weights[4:, :4], weights[4:, 4:] = 0.1 / 4, 0.9 / 6
    figure = plots.attention_quadrants(weights, 4, {"words": 2, "padding": 4}, title="block 0")
    said = texts(figure)
    for share in ("image → image 75%", "image → text 25%", "text → image 10%", "text → text 90%", "block 0"):
        assert share in said, share
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["image (4)", "words (2)", "padding (4)"]
    with pytest.raises(ValueError, match="are not 10 tokens"):
        plots.attention_quadrants(weights, 4, {"words": 5})


def test_word_maps_cover_the_image():
    weights = np.array([[0.0, 0.25], [0.5, 0.25]])
    figure = plots.word_maps(Image.new("RGB", (32, 16)), {"red": weights, "circle": weights / 2}, title="head 3")
    said = texts(figure)
    assert "red\nat most 50.0%" in said and "circle\nat most 25.0%" in said and "head 3" in said
    picture, heat = figure.axes[1].images
    assert tuple(heat.get_extent()) == tuple(picture.get_extent()) == (-0.5, 31.5, 15.5, -0.5)
    assert (np.asarray(heat.get_array()) == weights).all()


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


def test_number_grids():
    numbers = plots.grids.positive_numbers(torch.float8_e4m3fn)
    assert len(numbers) == 126 and numbers[[0, -1]].tolist() == [2.0**-9, 448.0], "without zero and NaN"
    assert plots.grids.positive_numbers(torch.bfloat16)[-1] == torch.finfo(torch.bfloat16).max
    figure = plots.number_grids(("float8_e4m3fn", "bfloat16"))
    ranges, grid = figure.axes
    assert [t.get_text() for t in ranges.get_yticklabels()] == ["float8_e4m3fn", "bfloat16"]
    assert [len(c.get_segments()) for c in grid.collections] == [17] and len(grid.patches) == 1
    said = texts(figure)
    assert "0.002 to 448" in said and "8 in each\ndoubling" in said and "128 in each" in said


def test_error_and_work():
    layers = pd.DataFrame(
        dict(error=[0.03, 0.02, 0.0], work=[1e-4, 0.1, 0.1], kept=[True, False, False]),
        index=["transformer_blocks.0.norm1.linear", "transformer_blocks.0.ff.net.2", "unused"],
    )
    figure = plots.error_and_work(layers)
    said = texts(figure)
    assert "0.norm1.linear" in said and "unused" not in said and "transformer_blocks" not in said
    rounded, kept = (c.get_offsets().tolist() for c in figure.axes[0].collections)
    assert rounded == [[0.1, 0.02]] and kept == [[1e-4, 0.03]]
