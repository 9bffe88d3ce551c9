"""The traffic table, against counts and bytes calculated by hand."""

import pytest

from mmdit_lib.config import Layout, Resolution
from mmdit_lib.reports.traffic import TWO_RANKS, Collective, count_traffic, possible, print_traffic
from mmdit_lib.sd3 import KNOWN_MODELS

SIZE = dict(resolution=Resolution(height=1024, width=1024), text_tokens=333, batch=2)


def totals(found) -> dict[str, int]:
    counts: dict[str, int] = {}
    for collective, times in found.items():
        counts[collective.operation] = counts.get(collective.operation, 0) + times
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, reduces, gathers",
    [
        ("stable-diffusion-3-medium", 49, 120),
        ("stable-diffusion-3.5-medium", 62, 120),
        ("stable-diffusion-3.5-large", 77, 190),
    ],
)
def test_the_originals_collectives(model, reduces, gathers):
    """Sharded as in TensorRT-LLM, the network has the same collectives as TensorRT-LLM's."""
    found = count_traffic(KNOWN_MODELS[model], TWO_RANKS["tp 2 trtllm"], **SIZE)
    assert totals(found) == {"ALL_REDUCE": reduces, "ALL_GATHER": gathers}


@pytest.mark.slow
def test_bytes_of_sd35_medium():
    model = KNOWN_MODELS["stable-diffusion-3.5-medium"]
    image, text = 2 * 4096 * 1536 * 2, 2 * 333 * 1536 * 2  # bytes of a stream: batch, tokens, width, bf16
    found = count_traffic(model, TWO_RANKS["tp 2 megatron"], **SIZE)
    # Attention, second attention and MLP of the image; attention and MLP of the text, except in the last block.
    assert found == {
        Collective("ALL_REDUCE", (0, 1), image): 24 + 13 + 24,
        Collective("ALL_REDUCE", (0, 1), text): 23 + 23,
    }
    rows, output = 2048 + 167, 2 * 2048 * 64 * 2
    found = count_traffic(model, TWO_RANKS["cp 2 allgather"], **SIZE)
    assert found == {
        Collective("ALL_GATHER", (0, 1), 2 * 2 * rows * 1536 * 2): 24,  # keys and values, batch, tokens, width, bf16
        Collective("ALL_GATHER", (0, 1), 2 * 2 * 2048 * 1536 * 2): 13,
        Collective("ALL_GATHER", (0, 1), output): 1,
    }
    found = count_traffic(model, TWO_RANKS["cfg 2"], **SIZE)
    assert found == {Collective("ALL_GATHER", (0, 1), 4096 * 64 * 2): 1}


def test_what_leaves_a_rank():
    assert Collective("ALL_REDUCE", (0, 1), 100).sent == 100
    assert Collective("ALL_REDUCE", (0, 1, 2, 3), 100).sent == 150
    assert Collective("ALL_GATHER", (0, 1, 2), 100).sent == 200
    assert Collective("ALL_TO_ALL", (0, 1, 2, 3), 100).sent == 75


def test_impossible_layouts_are_left_out():
    assert not possible(KNOWN_MODELS["stable-diffusion-3.5-large"], Layout(tp_size=4))
    assert all(possible(model, layout) for layout in TWO_RANKS.values() for model in KNOWN_MODELS.values())


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(batch=1), "--batch 1 must be a positive even number"),
        (dict(batch=0), "--batch 0 must be a positive even number"),
        (dict(text_tokens=0), "--text_tokens 0 must be 1 or more"),
        (dict(resolution=Resolution.read(4096)), "the position table covers at most 3072 pixels"),
        (dict(resolution=Resolution.read(1000)), "must be multiples of 16 pixels"),
    ],
)
def test_refused_before_anything_is_printed(capsys, options, said):
    with pytest.raises(ValueError, match=said) as error:
        print_traffic(**options)
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_table(monkeypatch, capsys):
    one = {"two layers": KNOWN_MODELS["stable-diffusion-3-medium"].model_copy(update={"num_layers": 2})}
    monkeypatch.setattr("mmdit_lib.reports.traffic.KNOWN_MODELS", one)
    monkeypatch.setenv("COLUMNS", "150")
    print_traffic(resolution=Resolution.read(512), text_tokens=154, batch=2)
    shown = " ".join(capsys.readouterr().out.split())
    assert "512x512, batch 2, 154 text tokens, bfloat16" in shown and "49 to 77 all-reduces" in shown
    assert all(layout in shown for layout in TWO_RANKS)
