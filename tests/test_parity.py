"""`compare_layers` covers every module of diffusers, reports ok if it is, and otherwise names the first wrong one."""

import io
from copy import deepcopy
from dataclasses import replace

import helpers
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Case, original_layout
from rich.console import Console
from safetensors.torch import save_file

from mmdit_lib.config import Layout
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.parity import (
    TOLERANCES,
    align,
    all_ok,
    compare,
    compare_layers,
    first_bad,
    parity_report,
    verdict,
)
from mmdit_lib.reports.reference import load_reference
from mmdit_lib.sd3 import SD3
from mmdit_lib.sd3.transformer import MMDiT


@pytest.fixture(scope="module")
def case() -> Case:
    return helpers.case("sd3.5-medium")


@pytest.fixture(scope="module")
def table(case) -> pd.DataFrame:
    return compare_layers(
        case.transformer, case.engine(plan=False), resolution="128x192", text_tokens=154, batch=2, device="cpu"
    )


def test_the_reference_is_found_in_all_that_convert_takes(case, tmp_path):
    """A folder, its shards by their index, and single files of both layouts, with and without a config next to them."""
    case.reference.save_pretrained(tmp_path / "shards", max_shard_size="100KB", variant="half")
    save_file(case.reference.state_dict(), tmp_path / "alone.safetensors")
    save_file(original_layout(case.reference), tmp_path / "original.safetensors")
    wanted = case.reference.state_dict()
    for where in (
        case.transformer,
        case.transformer / "diffusion_pytorch_model.safetensors",
        tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.half.json",
        tmp_path / "alone.safetensors",
        tmp_path / "original.safetensors",
    ):
        found = load_reference(where, SD3, torch.float32).state_dict()
        assert found.keys() == wanted.keys(), where
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), where


def test_inputs_on_which_diffusers_itself_overflows(case):
    inputs = case.inputs(dtype="float16") | {"encoder_hidden_states": torch.full((2, 154, 40), 6e4).half()}
    found = compare(case.reference_in("float16"), case.open("float16", check_finite=False), inputs)
    assert not all_ok(found) and "diffusers' own value is not finite" in verdict(found)


def test_no_pickle_is_loaded(case, tmp_path):
    case.reference.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises((OSError, ValueError), match="safetensors"):
        load_reference(tmp_path, SD3, torch.float32)


def text_of(renderable, width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return " ".join(console.export_text().split())  # independent of line wrapping


def test_every_module_that_calculates_is_there(table, case):
    assert all_ok(table) and verdict(table).startswith(
        f"all {len(table)} values of {table.module.nunique()} modules agree"
    )
    ours = {path for path, _ in MMDiT(case.config).named_modules() if path}
    called = {path for path in ours if not path.endswith((".net", ".to_out", "transformer_blocks"))}
    assert set(table.module) == called | {"output"}
    reasons, values = table.attrs["left_out"], len(table)
    skipped = f"{len(reasons)} more (lists, dropouts, unused outputs) do not exist in the engine and were skipped."
    text = text_of(parity_report(table))
    assert f"Shown: the largest error in each block, of {values} values compared. {skipped}" in text
    assert f"Shown: all {values} values compared. {skipped}" in text_of(parity_report(table, full=True))
    left = {name for name, _ in case.reference.named_modules()} - {"", *(p.replace(".net.1", ".net.2") for p in called)}
    assert set(reasons) == left | {"transformer_blocks.2.attn:1"}
    # Several outputs have a row each: x, four vectors; then the second x and its gate.
    assert list(table[table.module == "transformer_blocks.0.norm1"].output) == list(range(7))
    assert table.attrs["inputs"]["hidden_states"] == (2, 16, 16, 24)


def test_depth_is_the_order_of_execution(table):
    depth = table.set_index("module").depth.groupby(level=0).first()
    order = ["pos_embed.proj", "context_embedder", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn",
             "transformer_blocks.0", "transformer_blocks.1.norm1.linear", "proj_out", "output"]  # fmt: skip
    assert list(depth[order]) == sorted(depth[order])


def test_errors_are_those_of_numpy(case):
    inputs = case.inputs()
    table = compare(case.reference, case.runner(), inputs)
    row = table[table.module == "output"].iloc[0]
    with torch.inference_mode():
        expected = case.reference(**inputs).sample.double().numpy()
    ours = case.runner().run(inputs).double().numpy()
    assert row.max_abs_error == np.abs(ours - expected).max() > 0
    assert row.relative_error == pytest.approx(np.linalg.norm(ours - expected) / np.linalg.norm(expected), rel=1e-9)


def runner_with(case: Case, weights: dict, graph=None):
    runner = case.runner()
    backend = PyTorchBackend(graph or runner.backend.graph, weights)
    return type(runner)(runner.folder, backend, "changed")


def test_float32_functions_that_differ_between_devices(case):
    """Some frequencies off by a unit in the last place, as another device's exp may give them: float64 decides."""
    runner = case.runner()
    graph, weights = runner.backend.graph, dict(runner.folder.open_checkpoint().weights())
    inputs = case.inputs() | {"timestep": torch.tensor([999.3, 870.1])}

    def shifted(units: int):
        def shift(layer):
            values = torch.tensor(layer.attributes.get("values", []))
            if len(values) < 100:
                return layer
            for _ in range(units):
                values[3::8] = torch.nextafter(values[3::8], torch.tensor(2.0))
            return replace(layer, attributes=layer.attributes | {"values": values.tolist()})

        changed = replace(graph, layers=tuple(map(shift, graph.layers)))
        return compare(case.reference, runner_with(case, weights, changed), inputs)

    table = shifted(units=1)
    row = table[table.module == "time_text_embed.time_proj"].iloc[0]
    assert row.relative_error > row.tolerance and row.note.startswith("from float64: ours ")
    assert all_ok(table), verdict(table)
    assert "; float64 decided on time_text_embed.time_proj, " in verdict(table)
    assert case.reference.dtype == torch.float32
    assert first_bad(shifted(units=20)).module == "time_text_embed.time_proj"


def test_swapped_weights_are_the_first_bad_module(case):
    weights = dict(case.runner().folder.open_checkpoint().weights())
    block = "transformer_blocks.1.attn"
    weights[f"{block}.to_q.weight"], weights[f"{block}.to_k.weight"] = (
        weights[f"{block}.to_k.weight"],
        weights[f"{block}.to_q.weight"],
    )
    table = compare(case.reference, runner_with(case, weights), case.inputs())
    assert not all_ok(table)
    assert first_bad(table).module == f"{block}.to_q"
    assert not (table[table.module.str.startswith("transformer_blocks.0")].status != "ok").any()
    assert f"The first in order of execution is {block}.to_q (mismatch" in verdict(table)
    report = text_of(parity_report(table))
    assert (
        f"{block}.to_k" in report and "look there first" in report and "transformer_blocks.0.norm1.linear" not in report
    )
    assert "transformer_blocks.0.norm1.linear" in text_of(parity_report(table, full=True))


@pytest.mark.parametrize(
    "name", ["transformer_blocks.0.norm1_context.linear.bias", "pos_embed.pos_embed", "norm_out.linear.weight"]
)
def test_a_single_changed_tensor_is_found(case, name):
    weights = dict(case.runner().folder.open_checkpoint().weights())
    weights[name] = weights[name] * 1.001
    table = compare(case.reference, runner_with(case, weights), case.inputs())
    assert first_bad(table).module == name.rpartition(".")[0]


def test_shape_missing_and_nan(case):
    runner = case.runner()
    graph, weights = runner.backend.graph, runner.folder.open_checkpoint().weights()
    modules = dict(graph.modules)
    del modules["context_embedder"]
    modules["transformer_blocks.0.attn.to_v"] = modules["transformer_blocks.0.attn.add_v_proj"]
    modules["transformer_blocks.0.norm1"] = modules["transformer_blocks.0.norm1"][:-1]
    modules["of_our_own"] = modules["norm_out"]
    table = compare(case.reference, runner_with(case, weights, replace(graph, modules=modules)), case.inputs())
    status = table.set_index(["module", "output"]).status
    assert status[("context_embedder", 0)] == "missing" and status[("of_our_own", 0)] == "missing"
    assert status[("transformer_blocks.0.attn.to_v", 0)] == "shape"
    assert status[("transformer_blocks.0.norm1", 6)] == "missing"
    assert (table.status != "ok").sum() == 4 and first_bad(table).module == "context_embedder"
    text, values = text_of(parity_report(table)), len(table)
    assert "diffusers has (2, 64, 64)" in text
    assert f"Shown: the largest error in each block and the failures, of {values} values compared. " in text

    table.attrs["left_out"] = {}
    table.status = "missing"
    text = text_of(parity_report(table))
    assert f"Shown: the largest error in each block and the first 20 failures, of {values} values compared." in text
    assert "skipped" not in text

    weights["proj_out.bias"] = weights["proj_out.bias"] * float("nan")
    table = compare(case.reference, runner_with(case, weights), case.inputs())
    assert list(table[table.status != "ok"].module) == ["proj_out", "output"]


def test_tolerance_is_that_of_the_coarser_dtype(case):
    inputs = case.inputs(dtype="float16")
    assert set(compare(case.reference, case.runner("float16"), inputs).tolerance) == {TOLERANCES["float16"]}
    exact = compare(case.reference, case.runner("float16"), inputs, tolerance=TOLERANCES["float32"])
    assert not all_ok(exact) and exact.attrs["reference_dtype"] == "float32"
    assert not all_ok(exact.iloc[:0]), "an empty table proves nothing"


def test_a_float64_reference_needs_a_tolerance(case):
    """Even a float32 engine is further from it than from float32: both round the angles of the timestep's sinusoid."""
    reference, inputs = deepcopy(case.reference).double(), case.inputs()
    with pytest.raises(ValueError, match="a reference in float64 needs `tolerance`: only float32, float16 or bfloat16"):
        compare(reference, case.runner(), inputs)
    assert all_ok(compare(reference, case.runner(), inputs, tolerance=4 * TOLERANCES["float32"]))


def test_other_models_and_sizes_are_refused(case):
    with pytest.raises(ValueError, match="do not match: num_layers 4 and 3; attention_head_dim 24 and 16"):
        compare_layers(helpers.case("sd3.5-large").transformer, case.engine(plan=False), device="cpu")
    with pytest.raises(ValueError, match="resolution 100x100: height and width must be multiples of 16 pixels"):
        compare_layers(case.transformer, case.engine(plan=False), resolution=100, device="cpu")
    with pytest.raises(ValueError, match="9 is outside the engine's 1 to 3"):
        compare_layers(case.transformer, case.engine(plan=False), batch=9, device="cpu")


LAYOUT = Layout(tp_size=2, cp_size=3, cfg_size=2)


@pytest.mark.parametrize("rank", range(12))
def test_align_takes_the_part_that_a_rank_holds(rank):
    """The same in NumPy: cfg splits the batch, cp the tokens (10 in parts of 4), tp the features or heads."""
    mapping = LAYOUT.at(rank)
    rng = np.random.default_rng(0)
    tokens = slice(4 * mapping.cp_rank, 4 * mapping.cp_rank + 4)
    rows = slice(2 * mapping.cfg_rank, 2 * mapping.cfg_rank + 2)
    tp = mapping.tp_rank

    def check(whole: np.ndarray, shape: tuple, part: np.ndarray | None):
        found = align(torch.from_numpy(whole), shape, mapping)
        assert (found is None) if part is None else np.array_equal(found.numpy(), part)

    stream = rng.normal(size=(4, 10, 6))
    check(stream, (2, 4, 6), stream[rows, tokens])  # a stream's rows; the last cp rank has 2 of 4
    check(stream, (2, 4, 3), stream[rows, tokens, 3 * tp : 3 * tp + 3])  # a colwise layer's output
    check(stream, (4, 10, 6), stream)  # gathered
    heads = rng.normal(size=(4, 8, 10, 5))
    check(heads, (2, 4, 4, 5), heads[rows, 4 * tp : 4 * tp + 4, tokens])
    vectors = rng.normal(size=(4, 6))
    check(vectors, (2, 1, 6), vectors[rows, None])  # a gate, which diffusers returns without the token dim
    check(vectors, (2, 6), vectors[rows])
    check(vectors, (2, 3), vectors[rows, 3 * tp : 3 * tp + 3])
    check(stream, (2, 5, 6), None)
    check(stream, (2, 4, 5), None)
    check(stream, (2, 4, 6, 1), None)


def test_align_on_a_rank_without_rows():
    mapping = Layout(cp_size=4).at(3)  # 5 tokens in parts of 2: the last rank has none
    assert align(torch.zeros(1, 5, 3), (1, 2, 3), mapping).shape == (1, 0, 3)
