"""What TensorRT 10 has: attention as matrix product, softmax, matrix product; no collectives.

Tolerances as in test_network: float32 5e-6 of the norm.
"""

import pytest
from helpers import MODELS, Case, case, diffusers_output, relative_error

from mmdit_lib import MMDiTRunner, build
from mmdit_lib.engine import build as build_module
from mmdit_lib.engine.folder import plan_file
from mmdit_lib.network.trt import Features, installed_features
from mmdit_lib.reports.parity import all_ok, compare, verdict

FLOAT32_LIMIT, HALF_RATIO = 5e-6, 1.1
TENSORRT_10 = Features(attention=False, collectives=False, normalization_v2=False)


def without_layer(c: Case, output, dtype: str = "float32", **options) -> MMDiTRunner:
    sizes = dict(min_resolution=str(2 * c.step), opt_resolution=str(8 * c.step), max_resolution=str(20 * c.step))
    options = dict(max_batch_size=3, attention_layer=False, plan=False, progress=False) | sizes | options
    return MMDiTRunner.from_engine(build(c.checkpoint(dtype), output, **options), backend="pytorch", device="cpu")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "sd3.5-medium" else []) for name in MODELS]
)
def test_float32_parity(name, tmp_path):
    c = case(name)
    runner = without_layer(c, tmp_path / "engine")
    with_layer, kinds = c.runner().backend.graph, [layer.type for layer in runner.backend.graph.layers]
    attentions = sum(layer.type == "ATTENTION" for layer in with_layer.layers)
    assert kinds.count("SOFTMAX") == attentions and "ATTENTION" not in kinds
    for patches, batch, tokens in (((8, 8), 1, 154), ((3, 17), 2, 333), ((20, 2), 3, 589)):
        inputs = c.inputs(patches=patches, batch=batch, tokens=tokens)
        assert relative_error(runner.run(inputs), diffusers_output(c.reference, inputs)) <= FLOAT32_LIMIT
    table = compare(c.reference, runner, inputs, tolerance=FLOAT32_LIMIT)
    assert all_ok(table), verdict(table)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_no_further_from_float32_than_diffusers(dtype, tmp_path):
    """Although the scores are rounded: as in test_network, both are measured against diffusers in float32."""
    c = case("sd3.5-medium")
    runner = without_layer(c, tmp_path / "engine", dtype)
    ours, theirs = [], []
    for seed in range(3):
        inputs = c.inputs(seed=seed, tokens=333, dtype=dtype)
        exact = diffusers_output(c.reference, {key: value.float() for key, value in inputs.items()})
        ours.append(relative_error(runner.run(inputs), exact))
        theirs.append(relative_error(diffusers_output(c.reference_in(dtype), inputs), exact))
    assert sum(ours) <= HALF_RATIO * sum(theirs), (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_plan_is_built(dtype, tmp_path):
    c = case("sd3.5-medium")
    folder = without_layer(c, tmp_path / "engine", dtype, plan=True).folder
    weights = sum(t.numel() * t.element_size() for t in folder.open_checkpoint().weights().values())
    assert folder.files[plan_file(0)].nbytes > 0.3 * weights


@pytest.mark.slow
def test_the_default_is_what_tensorrt_has(tmp_path, monkeypatch):
    assert installed_features() == Features(attention=True, collectives=True, normalization_v2=True)  # of TensorRT-RTX
    monkeypatch.setattr(build_module, "installed_features", lambda: TENSORRT_10)
    c = case("sd3.5-medium")
    runner = without_layer(c, tmp_path / "engine", attention_layer=True, plan=True)
    assert "ATTENTION" not in {layer.type for layer in runner.backend.graph.layers}
    inputs = c.inputs()
    assert relative_error(runner.run(inputs), diffusers_output(c.reference, inputs)) <= FLOAT32_LIMIT


@pytest.mark.parametrize(
    ("layout", "ranks"), [(dict(cp_size=2), 2), (dict(cp_size=2, cfg_size=2, max_batch_size=4), 4)]
)
def test_several_ranks_need_collectives(tmp_path, monkeypatch, layout, ranks):
    monkeypatch.setattr(build_module, "installed_features", lambda: TENSORRT_10)
    with pytest.raises(ValueError) as error:
        without_layer(case("sd3.5-medium"), tmp_path / "engine", **layout)
    said = f"has no collectives, which {ranks} ranks need: pip install 'tensorrt>=11', or tensorrt-rtx-cu13"
    assert said in str(error.value) and "\n" not in str(error.value)
