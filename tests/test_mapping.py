"""The ranks and groups of layouts, and invalid layouts."""

import pytest
from helpers import model_config

from mmdit_lib.config import BuildConfig, Layout, RankMapping, Resolution
from mmdit_lib.parallel.launch import check_launch
from mmdit_lib.parallel.team import order_of_hosts
from mmdit_lib.sd3 import KNOWN_MODELS

LARGE = KNOWN_MODELS["stable-diffusion-3.5-large"]
MEDIUM = KNOWN_MODELS["stable-diffusion-3.5-medium"]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("cfg", [1, 2])
def test_ranks_as_in_tensorrt_llm(tp, cp, cfg):
    ranks = Layout(tp_size=tp, cp_size=cp, cfg_size=cfg).ranks()
    assert [m.rank for m in ranks] == list(range(tp * cp * cfg))
    for m in ranks:
        # The contract's formulas; its world is one half of ours with CFG parallelism.
        assert m.tp_rank == m.rank % tp
        assert m.cp_rank == m.rank % (tp * cp) // tp
        assert m.cfg_rank == m.rank // (tp * cp)
        assert m.tp_group == tuple(range(m.rank - m.tp_rank, m.rank - m.tp_rank + tp)), "contiguous"
        assert [b - a for a, b in zip(m.cp_group, m.cp_group[1:], strict=False)] == [tp] * (cp - 1), "strided by tp"
        for group, place in ((m.tp_group, m.tp_rank), (m.cp_group, m.cp_rank)):
            assert group[place] == m.rank
        assert m.output_group[m.cfg_rank * cp + m.cp_rank] == m.rank
    for groups in ({m.tp_group for m in ranks}, {m.cp_group for m in ranks}, {m.output_group for m in ranks}):
        assert sorted(rank for group in groups for rank in group) == list(range(tp * cp * cfg)), "each rank once"


def test_eight_ranks_written_out():
    ranks = Layout(tp_size=2, cp_size=2, cfg_size=2).ranks()
    assert [m.tp_group for m in ranks[::2]] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [m.cp_group for m in ranks] == [(0, 2), (1, 3), (0, 2), (1, 3), (4, 6), (5, 7), (4, 6), (5, 7)]
    assert [m.output_group for m in ranks[:2]] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert [m.cfg_rank for m in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert ranks[0].largest_group == 4


@pytest.mark.parametrize(
    "model, sizes, options, said",
    [
        (LARGE, dict(tp_size=4), {}, "38 heads are not divisible by tp_size=4; use 1, 2, 19 or 38"),
        (LARGE, dict(tp_size=4), dict(tp_layout="trtllm"), "38 heads are not divisible by tp_size=4; use 1 or 2"),
        (LARGE, dict(tp_size=19), dict(tp_layout="trtllm"),
         "64 rows of proj_out are not divisible by tp_size=19; use 1 or 2"),
        (MEDIUM, dict(tp_size=16), dict(tp_layout="trtllm"),
         "24 heads are not divisible by tp_size=16; use 1, 2, 4 or 8"),
        (MEDIUM, dict(tp_size=5), {}, "24 heads are not divisible by tp_size=5; use 1, 2, 3, 4, 6, 8, 12 or 24"),
        (MEDIUM, dict(cp_size=5), dict(cp_method="ulysses"),
         "cp_method ulysses scatters heads, and the 24 heads of a tp rank are not divisible by cp_size=5; "
         "use 1, 2, 3, 4, 6, 8, 12 or 24, or cp_method allgather"),
        (MEDIUM, dict(tp_size=8, cp_size=2), dict(cp_method="ulysses"),
         "cp_method ulysses scatters heads, and the 3 heads of a tp rank are not divisible by cp_size=2; "
         "use 1 or 3, or cp_method allgather"),
    ],
)  # fmt: skip
def test_refusals_name_the_legal_sizes(model, sizes, options, said):
    with pytest.raises(ValueError) as error:
        model.check_layout(Layout(**sizes, **options))
    assert str(error.value) == said


def test_any_cp_size_gathers():
    for cp in range(1, 9):
        LARGE.check_layout(Layout(cp_size=cp))
        model_config(heads=3).check_layout(Layout(cp_size=cp))


@pytest.mark.parametrize(
    "values", [dict(cfg_size=3), dict(tp_size=0), dict(cp_size=-1), dict(tp_layout="rows"), dict(cp_method="ring")]
)
def test_illegal_layouts(values):
    with pytest.raises(ValueError, match=r"^layout: [^\n]+$"):
        Layout.parse(values, "layout")


def test_a_validators_sentence_stands_as_it_is():
    with pytest.raises(ValueError) as error:
        RankMapping.parse(dict(layout=Layout(tp_size=2), rank=2), "layout")
    assert str(error.value) == "layout: rank 2 is out of range for world_size=2"


@pytest.mark.parametrize("text", [0, "0", "0x512", "512x0", "-512", "", "x", "1x2x3", "512.0", "²"])
def test_sizes_that_are_no_resolution(text):
    with pytest.raises(ValueError) as error:
        Resolution.read(text)
    assert str(error.value) == (
        f"resolution '{text}': give HEIGHTxWIDTH in pixels, for instance 768x1344, or one number"
    )


@pytest.mark.parametrize("rows", range(1, 13))
@pytest.mark.parametrize("cfg", [1, 2])
def test_batches_of_a_profile(rows, cfg):
    square = Resolution.read(64)
    config = BuildConfig(max_batch_size=rows * cfg, min_resolution=square, opt_resolution=square, max_resolution=square)
    low, middle, high = config.batches(cfg)
    assert (low, high) == (cfg, rows * cfg)
    assert middle % cfg == 0 and high <= 2 * middle <= high + 2 * cfg and middle <= high


def test_the_batch_to_optimize_for():
    sizes = dict.fromkeys(("min_resolution", "opt_resolution", "max_resolution"), Resolution.read(64))
    assert BuildConfig(max_batch_size=8, opt_batch_size=2, **sizes).batches(1) == (1, 2, 8)
    with pytest.raises(ValueError, match="opt_batch_size 4 must not exceed max_batch_size 2"):
        BuildConfig(max_batch_size=2, opt_batch_size=4, **sizes)


def test_number_of_processes():
    check_launch(Layout(tp_size=2, cfg_size=2), 4)
    with pytest.raises(
        ValueError, match=r"is for tp 2 x cfg 2, 4 ranks, and 3 ranks are running: start it with mpirun -n 4$"
    ):
        check_launch(Layout(tp_size=2, cfg_size=2), 3)
    with pytest.raises(ValueError, match=r"is for cp 3, 3 ranks, and 1 rank is running: start it with mpirun -n 3$"):
        check_launch(Layout(cp_size=3), 1)


def test_ranks_that_alternate_between_hosts():
    assert order_of_hosts(["a", "a", "b", "b"]) is None and order_of_hosts(["b", "a"]) is None
    assert "(a, b, a, b)" in order_of_hosts(["a", "b", "a", "b"])


def test_a_changed_copy_of_a_profile_has_its_own_resolutions():
    config, small = BuildConfig.one_size(Resolution.read(128), 2, 77), Resolution.read(96)
    assert small not in config.resolutions
    smaller = dict.fromkeys(("min_resolution", "opt_resolution", "max_resolution"), small)
    assert config.model_copy(update=smaller).resolutions == (small, small, small)
