"""Layer parity of quantized engines: exact in float32 on one rank, what FP8 adds, and a wrong weight is still found."""

import fp8
import pytest
import torch
from helpers import mmdit

from mmdit_lib import MMDiTRunner
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.plots import error_of_fp8
from mmdit_lib.reports import fp8_parity
from mmdit_lib.reports.parity import all_ok, compare, compare_layers, parity_report, verdict
from mmdit_lib.reports.reference import load_reference
from mmdit_lib.sd3 import SD3


@pytest.mark.parametrize("name", fp8.MODELS)
def test_in_float32_only_the_known_rounding_differs(name):
    table = compare_layers(fp8.pipeline(name), fp8.engine(name), device="cpu", batch=2, text_tokens=97)
    assert all_ok(table) and table.tolerance.max() == fp8_parity.TOLERANCES["float32"]
    assert table.relative_error.max() <= 5e-6, verdict(table)
    assert table.dtype_error.max() == 0.0, "diffusers in the network's dtype is the reference itself"
    inside = table.module.str.endswith(("to_q", "to_out.0", "net.1"))
    assert table.fp8_error[inside].between(1e-2, 0.3).all()
    assert table.fp8_error[table.module.str.startswith("time_text_embed")].max() <= 5e-6, "kept in full precision"


def test_in_bfloat16_it_says_what_fp8_adds():
    table = compare_layers(fp8.pipeline("sd3.5-medium"), fp8.engine("sd3.5-medium", "bfloat16"), device="cpu", batch=2)
    assert all_ok(table) and table.attrs["reference_dtype"] == "float32"
    last = table[table.module == "output"].iloc[0]
    assert 2e-3 < last.dtype_error < 2e-2 < last.fp8_error < 0.1
    said = fp8_parity.summary(table)
    assert f"{last.fp8_error:.2g} in output" in said and f"bfloat16 by {last.dtype_error:.2g}" in said
    assert "\n" not in said and "with the same rounding to FP8" in parity_report(table).renderables[0].title
    figure = error_of_fp8(table)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "FP8 and bfloat16",
        "bfloat16 alone",
    ]


def test_a_wrong_weight_is_found():
    reference = load_reference(fp8.pipeline("sd3-medium"), SD3, torch.float32)
    runner = MMDiTRunner.from_engine(fp8.engine("sd3-medium"), backend="pytorch", device="cpu")
    before = {name: x.clone() for name, x in reference.state_dict().items()}
    inputs = sample_inputs(runner.folder, batch=2, text_tokens=77)
    assert all_ok(compare(reference, runner, inputs))
    assert all(torch.equal(x, before[name]) for name, x in reference.state_dict().items()), "nothing stays rounded"
    block = reference.transformer_blocks[1].attn
    block.to_k.weight.data, block.to_v.weight.data = block.to_v.weight.data, block.to_k.weight.data
    table = compare(reference, runner, inputs)
    assert "transformer_blocks.1.attn.to_k (mismatch" in verdict(table)


def test_the_command(tmp_path):
    name, plot = "sd3-medium", tmp_path / "plot.png"
    arguments = ["parity", "--model_path", fp8.pipeline(name), "--engine_dir", fp8.engine(name), "--plot", plot]
    code, out, _ = mmdit(*arguments)
    assert code == 0 and "FP8 engine in float32" in " ".join(out.split()) and plot.stat().st_size > 1000
    assert "without rounding to FP8, diffusers in float32 differs by" in " ".join(out.split())
