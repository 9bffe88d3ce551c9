"""Quantized checkpoints and engines: what they contain, that they are what diffusers computes in FP8, refusals."""

import json

import fp8
import pytest
import torch
from helpers import diffusers_output, relative_error

from mmdit_lib import Checkpoint, EngineFolder, MMDiTRunner, convert
from mmdit_lib.config import DTYPES, FP8
from mmdit_lib.engine.build import define
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.engine.logger import logger
from mmdit_lib.network.trt import dtype_name, trt
from mmdit_lib.reports.inspection import inspect
from mmdit_lib.reports.reference import load_reference
from mmdit_lib.sd3 import SD3

FLIPPED = 2e-2
"""Bound of the difference between two float32 results whose inputs are rounded to FP8, relative to the norm.

Sums in another order differ by about 1e-7. Where such a difference moves an activation across the middle of two FP8
values, one of the two results has the next value: a step of 1/16 to 1/8 of it. Of n values about n * 1e-6 are that
close, so most results agree within 3e-7. One flipped value changes its token's sums over 64 inputs by up to
1/8 / sqrt(64) = 1.6e-2, and less of the whole; with the models and inputs of the tests, 5e-3 was the most that was
seen. More is possible, as later layers can turn one value into an avalanche (6e-2 with the tiny model, notebook 08).
A wrong scale changes everything by a factor of two.
"""


@pytest.mark.parametrize("name", fp8.MODELS)
def test_what_a_checkpoint_contains(name):
    folder = fp8.checkpoint(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == "FP8" and config["dtype"] == "float32"
    assert config["quantization"]["exclude_modules"] == [kept.pattern for kept in SD3.full_precision]
    own = config["mmdit_lib"]
    assert own["format_version"] == 2 and own["calibration"] == {"prompts": 2, "steps": 10, "margin": 4.0}
    checkpoint = Checkpoint.open(folder, verify=True)
    modules, weights = checkpoint.quantization.modules(SD3, checkpoint.model), checkpoint.weights()
    reference = load_reference(fp8.pipeline(name), SD3, torch.float32).state_dict()
    blocks = checkpoint.model.num_layers
    # Image: q, k, v, out and two of the MLP; text likewise, in the last block only q, k, v; second attention.
    assert len(modules) == 12 * blocks - 3 + 4 * len(checkpoint.model.dual_attention_layers)
    assert {n.rpartition(".")[0] for n, x in weights.items() if x.dtype == torch.float8_e4m3fn} == set(modules)
    for module in modules:
        scale, stored = weights[f"{module}.weights_scaling_factor"], weights[f"{module}.weight"]
        exact = reference[SD3.keys.to_diffusers(f"{module}.weight")]
        assert scale.shape == weights[f"{module}.activation_scaling_factor"].shape == (1,)
        assert 224 < exact.abs().max() / scale <= 448
        assert torch.equal(stored.float() * scale, fp8.rounded(exact, scale))
    assert all(x.dtype == torch.float32 for n, x in weights.items() if n.rpartition(".")[0] not in modules)
    assert inspect(folder).parameters == sum(x.numel() for x in reference.values()), "scales are not parameters"


def test_a_pipeline_in_the_home_folder(tmp_path, monkeypatch):
    source = fp8.pipeline("sd3-medium")
    monkeypatch.setenv("HOME", str(source.parent))
    options = dict(quantization="fp8", calibration_prompts=fp8.PROMPTS, progress=False)
    folder = convert(f"~/{source.name}", tmp_path / "checkpoint", **options)
    expected = fp8.checkpoint("sd3-medium") / "rank0.safetensors"
    assert (folder / "rank0.safetensors").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("name", fp8.MODELS)
def test_it_is_what_diffusers_computes_in_fp8(name):
    runner = MMDiTRunner.from_engine(fp8.engine(name), backend="pytorch", device="cpu")
    reference = load_reference(fp8.pipeline(name), SD3, torch.float32)
    rounding = fp8.quantized_reference(reference, fp8.checkpoint(name))
    for seed, tokens in enumerate((77, 333)):
        inputs = sample_inputs(runner.folder, batch=2, text_tokens=tokens, seed=seed)
        found, expected = runner.run(inputs), diffusers_output(rounding, inputs)
        assert relative_error(found, expected) <= FLIPPED
        plain = relative_error(found, diffusers_output(reference, inputs))
        assert 1e-2 < plain < 0.2, "FP8's own error"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", fp8.MODELS)
def test_plans_build_and_the_network_is_what_the_graph_file_says(name, dtype):
    folder = EngineFolder.open(fp8.engine(name, dtype, plan=True))
    assert (folder.path / "rank0.engine").stat().st_size > 0 and folder.quantization.quant_algo == "FP8"
    checkpoint = folder.open_checkpoint()
    builder = trt.Builder(logger())
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    alive = define(definition, checkpoint, folder.layout.at(0), folder.build_config)
    graph = {layer.output.name: layer for layer in folder.graph(0).layers}
    modules = checkpoint.quantization.modules(SD3, checkpoint.model)
    rounded, stored = set(), {}
    for i in range(definition.num_layers):
        layer = definition.get_layer(i)
        kind, output = layer.type.name, layer.get_output(0)
        if kind not in ("QUANTIZE", "DEQUANTIZE"):
            continue
        layer.__class__ = trt.IQuantizeLayer if kind == "QUANTIZE" else trt.IDequantizeLayer
        said = graph[output.name]
        x, scale = (layer.get_input(n) for n in range(2))
        assert said.type == kind and said.inputs == (x.name, scale.name) and layer.num_inputs == 2
        assert said.attributes == {"axis": layer.axis, "to_type": dtype_name(layer.to_type)} and layer.axis == -1
        assert said.output.dtype == dtype_name(output.dtype) == (FP8 if kind == "QUANTIZE" else dtype)
        assert dtype_name(scale.dtype) == dtype and tuple(scale.shape) == ()
        source = graph[scale.name].attributes["weight"]
        if kind == "QUANTIZE":
            assert source.endswith(".activation_scaling_factor")
            rounded.add(x.name)
        elif graph[x.name].type == "CONSTANT":
            stored[graph[x.name].attributes["weight"]] = source
    assert stored == {f"{m}.weight": f"{m}.weights_scaling_factor" for m in modules}
    # Q, K and V of a stream read one tensor, which is rounded once.
    blocks, dual = checkpoint.model.num_layers, len(checkpoint.model.dual_attention_layers)
    assert len(rounded) == sum(x.type == "QUANTIZE" for x in graph.values()) == 8 * blocks - 3 + 2 * dual
    assert alive.weights


def test_unquantized_files_are_as_before(tmp_path):
    from helpers import case, quiet

    opened = quiet(case("sd3.5-medium").transformer, tmp_path / "plain")
    config = json.loads((opened.path / "config.json").read_text())
    assert config["mmdit_lib"]["format_version"] == 1 and "calibration" not in config["mmdit_lib"]
    assert config["quantization"]["quant_algo"] is config["quantization"]["exclude_modules"] is None
    graph = EngineFolder.open(case("sd3.5-medium").engine(plan=False))
    assert json.loads((graph.path / "config.json").read_text())["mmdit_lib"]["format_version"] == 1
    assert not {"QUANTIZE", "DEQUANTIZE"} & {layer.type for layer in graph.graph(0).layers}
