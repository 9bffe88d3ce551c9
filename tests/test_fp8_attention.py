"""Attention in FP8: the network, the plan, the graph file, the passes for a GPU, parity, refusals.

On a GPU, tests/test_kernels.py checks the operators.
"""

import json
import logging
import re
from collections import Counter, defaultdict
from dataclasses import replace
from unittest.mock import patch

import fp8
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from helpers import case, diffusers_output, mmdit, relative_error
from test_fp8 import FLIPPED

from mmdit_lib import Checkpoint, EngineFolder, MMDiTRunner, build, convert, tiny
from mmdit_lib.checkpoint import manifest
from mmdit_lib.config import DTYPES, FP8, Layout, PlanOptions
from mmdit_lib.engine import kernels, torch_ops
from mmdit_lib.engine.build import define
from mmdit_lib.engine.builder_config import builder_config
from mmdit_lib.engine.dry_graph import dry_graph
from mmdit_lib.engine.fp8_passes import FP8_ATTENTION, FP8_EPILOGUES, FP8_GEMMS, FP8_KERNELS, mean_added_activations
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.engine.logger import logger
from mmdit_lib.engine.lowering import lower, value_of
from mmdit_lib.engine.passes import Index, apply, attention_scale
from mmdit_lib.engine.pytorch_backend import GPU_PASSES, PyTorchBackend, default_passes, warn_if_emulated
from mmdit_lib.engine.rehearsal import _check_source as check_source
from mmdit_lib.network import functional as F
from mmdit_lib.network.network import Network
from mmdit_lib.network.trt import dtype_name, trt
from mmdit_lib.reports.parity import all_ok, compare_layers, verdict
from mmdit_lib.reports.reference import load_reference
from mmdit_lib.sd3 import SD3

NORMALIZED = [name for name in fp8.MODELS if name != "sd3-medium"]
WITHOUT = FP8_GEMMS + GPU_PASSES + FP8_KERNELS + FP8_EPILOGUES
ALL = FP8_ATTENTION + WITHOUT


def engine(name: str, dtype: str = "float32", **options):
    return fp8.engine(name, dtype, fp8_attention=True, **options)


def opened(folder) -> MMDiTRunner:
    return MMDiTRunner.from_engine(folder, backend="pytorch", device="cpu")


def attentions(runner: MMDiTRunner) -> int:
    config = runner.folder.model
    return config.num_layers + len(config.dual_attention_layers)


@pytest.mark.parametrize("attention_layer", [True, False], ids=["", "as-products"])
@pytest.mark.parametrize("name", NORMALIZED)
def test_it_is_what_diffusers_computes_in_fp8(name, attention_layer):
    runner = opened(engine(name, attention_layer=attention_layer))
    reference = load_reference(fp8.pipeline(name), SD3, torch.float32)
    rounding = fp8.quantized_reference(reference, fp8.checkpoint(name), attention=True)
    plain = fp8.quantized_reference(reference, fp8.checkpoint(name))
    for seed, tokens in enumerate((77, 333)):
        inputs = sample_inputs(runner.folder, batch=2, text_tokens=tokens, seed=seed)
        found = runner.run(inputs)
        assert relative_error(found, diffusers_output(rounding, inputs)) <= FLIPPED
        assert 5e-3 < relative_error(found, diffusers_output(plain, inputs)) < 0.1, "attention's own error"


@pytest.mark.parametrize("attention_layer", [True, False], ids=["", "as-products"])
def test_parity_rounds_the_same(attention_layer):
    name = "sd3.5-medium"
    folder = engine(name, attention_layer=attention_layer)
    table = compare_layers(fp8.pipeline(name), folder, device="cpu", batch=2, text_tokens=97)
    assert all_ok(table) and table.relative_error.max() <= 5e-6, verdict(table)
    output = table[table.module == "output"].iloc[0]
    without = compare_layers(fp8.pipeline(name), fp8.engine(name), device="cpu", batch=2, text_tokens=97)
    assert output.fp8_error > without[without.module == "output"].iloc[0].fp8_error


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMALIZED)
def test_plans_build_and_the_network_is_what_the_graph_file_says(name, dtype):
    folder = EngineFolder.open(engine(name, dtype, plan=True))
    assert (folder.path / "rank0.engine").stat().st_size > 0
    checkpoint = folder.open_checkpoint()
    weights = checkpoint.weights()
    builder = trt.Builder(logger())
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    alive = define(definition, checkpoint, folder.layout.at(0), folder.build_config)
    graph = folder.graph(0)
    made = {layer.output.name: layer for layer in graph.layers}
    found = 0
    for i in range(definition.num_layers):
        layer = definition.get_layer(i)
        if layer.type.name != "ATTENTION_OUTPUT":
            continue
        found += 1
        said = made[layer.get_output(0).name]
        layer.__class__ = trt.IAttentionOutputLayer
        attention = layer.attention
        q, k, v, mask, of_probabilities = said.inputs
        assert [attention.get_input(n).name for n in range(3)] == [q, k, v] and mask is None
        assert attention.normalization_quantize_scale.name == of_probabilities
        assert dtype_name(attention.normalization_quantize_to_type) == FP8
        assert said.attributes["normalization_quantize_to_type"] == FP8
        assert made[of_probabilities].attributes["values"] == [2**-8]
        scales = {}
        for x, part in (("q", q), ("k", k), ("v", v)):
            dequantize = made[part]
            quantize = made[dequantize.inputs[0]]
            assert (quantize.type, dequantize.type) == ("QUANTIZE", "DEQUANTIZE")
            assert quantize.output.dtype == FP8 and dequantize.output.dtype == dtype
            scales[x] = [value_of(made[one.inputs[1]].attributes, weights).item() for one in (quantize, dequantize)]
        size = folder.model.attention_head_dim
        assert scales["q"] == [1.0, size**-0.5] and scales["k"] == [1.0, 1.0]
        block = re.match(r"transformer_blocks\.\d+\.attn2?", said.name)[0]
        results = [x.item() for n, x in weights.items() if re.fullmatch(rf"{block}\.to_(add_)?out.*\.activation.*", n)]
        assert scales["v"] == [8 * max(results)] * 2
    assert found == folder.model.num_layers + len(folder.model.dual_attention_layers)
    assert alive.weights


@pytest.mark.parametrize("size", [16, 48, 64])
def test_tensorrt_multiplies_in_fp8_without_splitting_attention_up(size):
    """FP8 instructions are in a plan only if probabilities are rounded too."""

    def plan(inputs: bool, probabilities: bool) -> bytes:
        builder = trt.Builder(logger())
        definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        network = Network(definition, weights={}, dtype="bfloat16")
        q, k, v = (network.input(name, "bfloat16", (-1, 6, -1, size)) for name in "qkv")
        scale = network.values([0.25], "bfloat16", ())
        if inputs and not probabilities:
            q, k, v = (F.round_to_fp8(x, scale) for x in (q, k, v))
        network.output(F.attention(q, k, v, scale if probabilities else None), "y")
        last = definition.get_layer(definition.num_layers - 1)
        last.__class__ = trt.IAttentionOutputLayer
        last.attention.decomposable = False
        shapes = {name: [(1, 6, tokens, size) for tokens in (77, 300, 500)] for name in "qkv"}
        config = builder_config(builder, "bfloat16", shapes, (), PlanOptions())
        return bytes(builder.build_serialized_network(definition, config))

    assert b"qmma_e4m3" in plan(True, True)
    assert b"qmma_e4m3" not in plan(True, False)
    assert b"qmma_e4m3" not in plan(False, False)


@pytest.mark.parametrize("name", NORMALIZED)
def test_passes_for_a_gpu(name):
    """All attentions become the kernel's; it rounds probabilities in its own way, so this emulation rounds none."""
    runner = opened(engine(name, "bfloat16"))
    graph, weights = runner.backend.graph, runner.folder.open_checkpoint(verify=False).weights()
    layers = apply(graph, ALL)
    kinds = [layer.type for layer in layers]
    assert kinds.count("PROJECTED_ATTENTION") == attentions(runner)
    assert not {"ATTENTION", "FP8_ATTENTION", "QKV_ATTENTION", "DEQUANTIZE"} & set(kinds)
    made = {layer.output.name: layer for layer in layers}
    for layer in (x for x in layers if x.type == "PROJECTED_ATTENTION"):
        scale = made[layer.inputs[-1]]
        assert scale.output.dtype == "float32" and scale.attributes["times"] == 8.0
        assert layer.attributes["scale"] == runner.folder.model.attention_head_dim**-0.5
    plain = opened(fp8.engine(name, "bfloat16"))
    without = apply(plain.backend.graph, WITHOUT)
    same = [layer.type for layer in without if layer.type != "CONSTANT"]
    results = [layer.output.name for layer in layers if layer.type == "PROJECTED_ATTENTION"]
    items = [layer for layer in layers if layer.type == "ITEM" and made[layer.inputs[0]].type == "PROJECTED_ATTENTION"]
    assert len(items) == 2 * len(results)
    means = [made[layer.inputs[2]] for layer in layers if layer.type == "ADD_MEAN_FP8"]
    assert means and {(x.type, x.attributes["index"]) for x in means} == {("ITEM", 1)}
    sums = [x for x in layers if x.type == "ELEMENTWISE" and made.get(x.inputs[0]) in items]
    assert [x.output.name for x in sums] == [results[-1].removesuffix("/both")], (
        "of the last block's text, which is not used"
    )
    kept = [x for x in layers if x.type != "CONSTANT" and x not in items and x not in sums]
    others = [x.type.replace("ADD_MEAN_FP8", "QUANTIZE") for x in kept]
    assert others == same, "all other operators are as without the option"
    given = sample_inputs(runner.folder, batch=2, text_tokens=97, seed=3)
    inputs, _ = runner.prepare(given)
    emulated, exact = runner.run(given), opened(fp8.engine(name)).run(given)
    found = PyTorchBackend(graph, weights, passes=ALL)(inputs)
    apart = PyTorchBackend(graph, weights, passes=tuple(x for x in ALL if x is not mean_added_activations))(inputs)
    assert torch.equal(found, apart), "the mean is added before or while the result is rounded"
    unrounded = PyTorchBackend(plain.backend.graph, weights, passes=WITHOUT)(inputs)
    assert 0 < relative_error(found, unrounded)
    for x in (found, emulated):
        assert relative_error(x, exact) <= 1.5 * relative_error(unrounded, exact)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_kernel_is_for_bfloat16(dtype):
    layers = apply(opened(engine("sd3.5-medium", dtype)).backend.graph, ALL)
    assert not {"FP8_ATTENTION", "PROJECTED_ATTENTION"} & {layer.type for layer in layers}


@pytest.mark.parametrize("passes", [FP8_ATTENTION, FP8_ATTENTION + GPU_PASSES[:-4]], ids=["alone", "before"])
def test_operators_that_a_gpu_runs_if_not_all_passes_match(passes):
    """The Q/DQ layers are in the operator instead."""
    runner = opened(engine("sd3.5-large", "bfloat16"))
    given = sample_inputs(runner.folder, batch=1, text_tokens=77)
    inputs, _ = runner.prepare(given)
    weights = runner.folder.open_checkpoint(verify=False).weights()
    assert "ATTENTION" not in {layer.type for layer in apply(runner.backend.graph, passes)}
    found = PyTorchBackend(runner.backend.graph, weights, passes=passes + runner.backend._passes)(inputs)
    assert 0 < relative_error(found, runner.run(given)) < 0.06, "probabilities are not rounded"


@pytest.mark.slow
def test_values_of_a_trained_model_are_rounded_better_without_their_mean():
    """It is about as large as their spread, so half of the square of the rounding errors is saved."""
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny.model_path())
    found = defaultdict(list)
    for block in pipe.transformer.transformer_blocks:
        for module in (block.attn.to_v, block.attn.add_v_proj):
            module.register_forward_hook(lambda _, inputs, y, block=block: found[block].append(y))
    seed = torch.Generator().manual_seed(0)
    pipe("a large red ring", num_inference_steps=2, guidance_scale=4.0, generator=seed, output_type="latent")
    one = torch.tensor(1.0)
    for values in found.values():
        v = torch.cat(values[-2:], 1)  # image and text
        spread, mean = torch.std_mean(v, 1)
        assert 0.5 < mean.norm() / spread.norm() < 2
        v = v.unflatten(-1, (-1, 48)).transpose(1, 2)
        q, k = (kernels.through_fp8(torch.randn(v.shape, generator=seed), one) for _ in range(2))
        exact, scale = kernels.attention(q, k, v, 48**-0.5), torch.tensor(2.0**-4)
        without_mean, mean = kernels.fp8_attention(q, k, v, scale, scale=48**-0.5)
        whole = kernels.attention(q, k, kernels.through_fp8(v, scale), 48**-0.5)
        assert relative_error(without_mean + mean, exact) < 0.85 * relative_error(whole, exact)


def test_some_queries_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 16, generator=generator) for tokens in (11, 7, 7))
    options = dict(norm_op="SOFTMAX", causal_kind="NONE", normalization_quantize_to_type=FP8)
    once = torch_ops.attention(q, k, v, None, torch.tensor(2.0**-8), **options)
    monkeypatch.setattr(torch_ops, "SCORES", 2 * 3 * 7 * 4)  # four queries
    assert relative_error(torch_ops.attention(q, k, v, None, torch.tensor(2.0**-8), **options), once) <= 1e-6
    probabilities = (q @ k.transpose(-1, -2)).softmax(-1)
    expected = fp8.rounded(probabilities, torch.tensor(1 / 256)) @ v
    assert relative_error(once, expected) <= 1e-6
    assert relative_error(once, probabilities @ v) > 1e-3


def test_ranks_of_tensor_parallelism_have_the_same_scales():
    one = opened(engine("sd3.5-medium", "bfloat16"))
    folder = EngineFolder.open(engine("sd3.5-medium", "bfloat16", converted=(("tp_size", 2),)))

    def scales(graph):
        return [layer.attributes for layer in graph.layers if "largest" in layer.attributes]

    expected = scales(one.backend.graph)
    assert len(expected) == attentions(one)
    for rank in range(2):
        assert scales(folder.graph(rank)) == expected
        assert [x.type for x in apply(folder.graph(rank), ALL)].count("PROJECTED_ATTENTION") == len(expected)


def test_an_older_reader_refuses_the_folder(monkeypatch):
    folder = engine("sd3.5-medium")
    assert json.loads((folder / "config.json").read_text())["mmdit_lib"]["format_version"] == 3
    assert EngineFolder.open(folder).build_config.fp8_attention
    plain = json.loads((fp8.engine("sd3.5-medium") / "config.json").read_text())
    assert plain["mmdit_lib"]["format_version"] == 2 and plain["build_config"]["fp8_attention"] is False
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 2)
    with pytest.raises(ValueError, match="the folder has format 3; this version reads up to 2"):
        EngineFolder.open(folder)


def test_an_older_folder_has_none(tmp_path):
    """Its config has no such key."""
    folder = fp8.engine("sd3.5-medium")
    config = json.loads((folder / "config.json").read_text())
    del config["build_config"]["fp8_attention"]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert EngineFolder.open(tmp_path).build_config.fp8_attention is False


def test_what_cannot_be_built_is_refused(tmp_path):
    def refused(checkpoint, *words, **options):
        with pytest.raises(ValueError) as error:
            build(checkpoint, tmp_path / "engine", plan=False, progress=False, fp8_attention=True, **options)
        assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
        assert not (tmp_path / "engine").exists()

    refused(case("sd3.5-medium").checkpoint(), "is not in FP8", "--quantization fp8")
    refused(fp8.checkpoint("sd3-medium"), "normalizes queries and keys, as SD3.5 does")
    refused(fp8.checkpoint("sd3.5-medium"), "does not work with context parallelism", cp_size=2)
    refused(fp8.checkpoint("sd3.5-medium"), "fp8_attention: not an option of builder trtllm", builder="trtllm")
    opened = Checkpoint.open(fp8.checkpoint("sd3.5-medium"))
    config = EngineFolder.open(engine("sd3.5-medium")).build_config
    with pytest.raises(ValueError, match="fp8_attention does not work with context parallelism"):
        dry_graph(opened.model, Layout(cp_size=2).at(0), config, "bfloat16", opened.quantization)


def test_a_value_scale_beyond_the_dtype(tmp_path):
    """In float16, 8 times the largest legal scale is infinite."""
    from test_fp8_refusals import rewrite

    folder = tmp_path / "checkpoint"
    convert(fp8.pipeline("sd3.5-large"), folder, dtype="float16", quantization="fp8", calibration_prompts=fp8.PROMPTS,
            progress=False)  # fmt: skip
    name = "transformer_blocks.1.attn.to_out.0.activation_scaling_factor"
    rewrite(folder, lambda tensors: tensors[name].fill_(2.0**15))
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.* is too large for float16"):
        build(folder, tmp_path / "engine", plan=False, progress=False, fp8_attention=True)


def test_a_gpu_without_the_kernel_is_told(monkeypatch, caplog):
    monkeypatch.setattr("mmdit_lib.engine.pytorch_backend.has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("mmdit_lib.engine.pytorch_backend.has_flash_attention_3", lambda device: True)
    cuda = torch.device("cuda")
    assert default_passes(cuda, compiled=False) == ALL
    assert not set(FP8_ATTENTION) & set(default_passes(cuda, compiled=True))
    monkeypatch.setattr("mmdit_lib.engine.pytorch_backend.has_flash_attention_3", lambda device: False)
    assert default_passes(cuda, compiled=False) == WITHOUT
    told = "attention in FP8 is emulated, which is slow"
    cases = [("bfloat16", {}, ALL, False), ("float16", {}, ALL, True), ("bfloat16", {}, WITHOUT, True),
             ("bfloat16", {"attention_layer": False}, ALL, True)]  # fmt: skip
    for dtype, options, passes, expected in cases:
        runner = opened(engine("sd3.5-medium", dtype, **options))
        weights = runner.folder.open_checkpoint(verify=False).weights()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mmdit_lib"):
            warn_if_emulated(lower(runner.backend.graph, weights, passes=passes))
        assert [told in message for message in caplog.messages] == [True] * expected, (dtype, options)


def changed(layers: list, which, **attributes) -> list:
    """Layers of which those that `which` accepts have other attributes."""
    return [replace(x, attributes=x.attributes | attributes) if which(x) else x for x in layers]


def test_other_roundings_are_not_the_kernels():
    """It has scale 1 for queries and keys, and one scale for the values, before and after."""
    graph = opened(engine("sd3.5-large", "bfloat16")).backend.graph
    made = {layer.output.name: layer for layer in graph.layers}
    attention = next(x for x in graph.layers if x.type == "ATTENTION")
    one = made[made[attention.inputs[1]].inputs[1]].output.name
    values = made[attention.inputs[2]]

    def kernels_in(layers) -> int:
        return [x.type for x in apply(replace(graph, layers=tuple(layers)), ALL)].count("PROJECTED_ATTENTION")

    layers = list(graph.layers)
    assert kernels_in(layers) == 4
    assert kernels_in(changed(layers, lambda x: x.output.name == one, values=[2.0])) == 0, "all have the same 1"
    other = [replace(x, inputs=(x.inputs[0], one)) if x is values else x for x in layers]
    assert kernels_in(other) == 3
    exact = [replace(x, inputs=x.inputs[:3], attributes={k: v for k, v in x.attributes.items() if "quant" not in k})
             if x is attention else x for x in layers]  # fmt: skip
    assert kernels_in(exact) == 3, "probabilities are not rounded"


def test_an_input_of_the_network_can_be_what_attention_reads():
    graph = opened(engine("sd3.5-large", "bfloat16")).backend.graph
    attention = next(x for x in graph.layers if x.type == "ATTENTION")
    read = [replace(x, inputs=("hidden_states", *x.inputs[1:])) if x is attention else x for x in graph.layers]
    kinds = [x.type for x in apply(replace(graph, layers=tuple(read)), FP8_ATTENTION)]
    assert kinds.count("FP8_ATTENTION") == 3 and kinds.count("ATTENTION") == 1


def test_a_scaled_attention_keeps_its_rounding():
    graph = opened(engine("sd3.5-large", "bfloat16")).backend.graph
    attention = next(x for x in graph.layers if x.type == "ATTENTION")
    number = next(x for x in graph.layers if x.attributes.get("values") == [2**-8]).output.name
    scaled = replace(attention, type="ELEMENTWISE", name="s", inputs=(attention.inputs[0], number),
                     output=replace(attention.output, name="s"), attributes={"op": "PROD"})  # fmt: skip
    layers = [scaled, replace(attention, inputs=("s", *attention.inputs[1:]))]
    constants = [x for x in graph.layers if x.type == "CONSTANT"]
    found = attention_scale([*constants, *layers])[-1]
    assert found.attributes["scale"] == 2**-8 and found.inputs == attention.inputs


def test_a_projection_that_is_not_quantized(tmp_path):
    from test_fp8_refusals import rewrite

    folder = tmp_path / "checkpoint"
    convert(fp8.pipeline("sd3.5-large"), folder, quantization="fp8", calibration_prompts=fp8.PROMPTS, progress=False)
    module = "transformer_blocks.1.attn.to_out.0"

    def keep(tensors):
        scale = tensors.pop(f"{module}.weights_scaling_factor")
        tensors.pop(f"{module}.activation_scaling_factor")
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].float() * scale

    rewrite(folder, keep)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["exclude_modules"].append(module)
    (folder / "config.json").write_text(json.dumps(config))
    build(folder, tmp_path / "plain", plan=False, progress=False)
    with pytest.raises(ValueError, match=rf"fp8_attention: '{module}' is not in FP8 in this checkpoint"):
        build(folder, tmp_path / "engine", plan=False, progress=False, fp8_attention=True)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"stack": [], "dim": 0}, "no constants of kind stack"),
        ({"largest": [{"values": [1.0], "dtype": "float16", "shape": [1 << 28]}], "times": 8.0}, "something else than"),
        ({"largest": [{"weight": "a", "shape": [4]}], "times": 8.0}, "something else than scales"),
        ({"largest": [{"weight": "a", "shape": []}], "times": float("nan")}, "times nan is not a positive number"),
    ],
)
def test_hostile_constants_are_refused(source, words):
    with pytest.raises(ValueError, match=words):
        check_source(source)


def test_scores_of_a_hostile_file_are_not_computed_one_by_one():
    q, k = (torch.empty(1, 1, tokens, 1, device="meta") for tokens in (1 << 12, 1 << 26))
    options = dict(norm_op="SOFTMAX", causal_kind="NONE", normalization_quantize_to_type=FP8)
    scale = torch.empty((), device="meta")
    with patch.object(torch_ops.kernels, "through_fp8", side_effect=lambda x, scale: x) as rounding:
        torch_ops.attention(q, k, k, None, scale, **options)
    assert rounding.call_count == 1


def test_the_command(tmp_path):
    checkpoint = fp8.checkpoint("sd3.5-medium", "bfloat16")
    sizes = ("--min_resolution", "32", "--opt_resolution", "64", "--max_resolution", "128")
    code, out, err = mmdit("build", "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "engine", *sizes,
                           "--fp8_attention", "--no-plan")  # fmt: skip
    assert code == 0, err
    code, out, _ = mmdit("inspect", tmp_path / "engine")
    assert code == 0 and "FP8 in 41 linear layers and in attention; excluded" in " ".join(out.split())
    code, out, _ = mmdit("parity", "--model_path", fp8.pipeline("sd3.5-medium"), "--engine_dir", tmp_path / "engine")
    assert code == 0 and "all 151 values of 123 modules agree" in " ".join(out.split())


@pytest.mark.parametrize("options", [{}, {"skip_layers": True, "controlnet_residuals": 2}], ids=["", "more inputs"])
@pytest.mark.parametrize("layout", [{}, {"tp_size": 2}, {"cfg_size": 2}], ids=str)
def test_every_mean_is_added_while_the_result_is_rounded(layout, options):
    """On every rank: no QUANTIZE and no SUM of an attention's results is left but the last block's, which is unused."""
    runner = opened(engine("sd3.5-medium", "bfloat16"))
    model, build = runner.folder.model, runner.folder.build_config.model_copy(update=options)
    for mapping in Layout(**layout).ranks():
        graph = dry_graph(model, mapping, build, "bfloat16", runner.folder.quantization)
        kinds = Counter(layer.type for layer in apply(graph, ALL))
        assert kinds["PROJECTED_ATTENTION"] == attentions(runner)
        assert kinds["ADD_MEAN_FP8"] == attentions(runner) + model.num_layers - 1, "image and text, the last only image"
        assert kinds["QUANTIZE"] == 0


def test_other_layers_than_merged_heads_keep_their_sum():
    """The operator adds the same mean to every token, and rounds with one scale."""
    layers = apply(opened(engine("sd3.5-medium", "bfloat16")).backend.graph, ALL[: ALL.index(mean_added_activations)])

    def found(layers) -> int:
        return [x.type for x in mean_added_activations(layers)].count("ADD_MEAN_FP8")

    def with_one(layer, **attributes) -> int:
        return found(changed(layers, lambda x: x is layer, **attributes))

    index = Index.of(layers)
    quantize = next(x for x in layers if x.type == "QUANTIZE" and x.name.startswith("transformer_blocks.0.attn.to_out"))
    merged = index.made_by[quantize.inputs[0]]
    transposed = index.made_by[merged.inputs[0]]
    part = index.made_by[transposed.inputs[0]]
    total = index.made_by[part.inputs[0]]
    items = [index.made_by[name] for name in total.inputs]
    assert [x.type for x in (merged, transposed, part, *items)] == ["SHUFFLE", "SHUFFLE", "SLICE", "ITEM", "ITEM"]
    every = found(layers)
    assert every == 7
    assert with_one(quantize, axis=2) == every - 1
    assert with_one(merged, first_transpose=[1, 0, 2]) == with_one(merged, reshape_dims=[1, -1, 64]) == every - 1
    assert with_one(transposed, first_transpose=[0, 1, 2, 3]) == every - 1
    assert with_one(transposed, reshape_dims=[0, 0, 0, 0]) == every - 1
    assert with_one(part, axes=[1]) == with_one(part, mode="FILL") == every - 1
    assert with_one(total, op="PROD") == with_one(items[0], index=1) == every - 2, "image and text"
    another = [replace(x, inputs=(quantize.inputs[1],)) if x is items[1] else x for x in layers]
    assert found(another) == every - 2
