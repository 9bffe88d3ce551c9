"""Passes for FP8 tensor cores: what is left of a network, and that on a CPU it computes what the Q/DQ layers say.

On FP8 tensor cores, tests/test_kernels.py checks the operators. Where torch has `_scaled_mm` on a CPU, its call is
checked with it.
"""

from collections import Counter
from dataclasses import replace

import fp8
import pytest
import torch
from helpers import relative_error

from mmdit_lib import Checkpoint, MMDiTRunner
from mmdit_lib.checkpoint.quantization import rounded
from mmdit_lib.engine import kernels
from mmdit_lib.engine.capability import has_fp8
from mmdit_lib.engine.fp8_passes import FP8_EPILOGUES, FP8_GEMMS, FP8_KERNELS, fp8_linear_gelu
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.engine.kernel_passes import KERNELS
from mmdit_lib.engine.linears import fp8_gemm, fp8_linear
from mmdit_lib.engine.lowering import _rescaled, lower, placed_weights, value_of
from mmdit_lib.engine.outline import outline_blocks
from mmdit_lib.engine.passes import NUMERICS, SPEED, apply
from mmdit_lib.engine.pytorch_backend import GPU_PASSES, PyTorchBackend, default_passes

KERNELS_ONLY = FP8_GEMMS + GPU_PASSES + FP8_KERNELS
ALL = KERNELS_ONLY + FP8_EPILOGUES
STAGES = {
    "gemms": FP8_GEMMS + NUMERICS,
    "merged": FP8_GEMMS + NUMERICS + SPEED,
    "kernels": FP8_GEMMS + NUMERICS + SPEED + KERNELS,
    "all kernels": KERNELS_ONLY,
    "all": ALL,
}


def opened(name: str, dtype: str):
    runner = MMDiTRunner.from_engine(fp8.engine(name, dtype), backend="pytorch", device="cpu")
    return runner, runner.folder.open_checkpoint(verify=False).weights()


@pytest.mark.parametrize("name", fp8.MODELS)
def test_what_is_left_of_a_network(name):
    runner, _ = opened(name, "bfloat16")
    config = runner.folder.model
    blocks, dual = config.num_layers, len(config.dual_attention_layers)
    layers = apply(runner.backend.graph, ALL)
    found = Counter(layer.type for layer in layers)
    # Per block: Q, K, V together, output, two of the MLP, for image and text; the last text is only attended to.
    # Those of Q, K, V are in PROJECTED_ATTENTION.
    assert found["FP8_LINEAR"] + found["FP8_LINEAR_GELU"] == 6 * blocks - 3 + dual
    assert found["DEQUANTIZE"] == found["MATRIX_MULTIPLY"] == 0
    # Attention's output is quantized by a kernel of its own, everything else where it is computed.
    assert found["QUANTIZE"] == 2 * blocks - 1 + dual
    assert found["FP8_LINEAR_GELU"] == 2 * blocks - 1 and found["PROJECTED_ATTENTION"] == blocks + dual
    assert found["GELU_FP8"] == 0
    assert found["NORM_MODULATE_FP8"] + found["GATED_NORM_FP8"] == 4 * blocks - 1 + dual
    made = [layer.output.name for layer in layers]
    assert len(set(made)) == len(made)
    known: set = {value.name for value in runner.backend.graph.inputs} | {None}
    for layer in layers:
        assert known.issuperset(layer.inputs), layer
        known.add(layer.output.name)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", fp8.MODELS)
def test_every_pass_keeps_the_numbers(name, stage):
    """The network in bfloat16 is as close to the float32 network in FP8 as without the passes.

    Both round differently, and a value that is rounded differently may get the next FP8 value: no closer bound holds.
    """
    runner, weights = opened(name, "bfloat16")
    exact, _ = opened(name, "float32")
    inputs = sample_inputs(exact.folder, batch=2, text_tokens=97, seed=3)
    expected = exact.run(inputs)
    backend = PyTorchBackend(runner.backend.graph, weights, passes=STAGES[stage])
    prepared, _ = runner.prepare(inputs)
    found, plain = relative_error(backend(prepared), expected), relative_error(runner.run(inputs), expected)
    assert found <= 1.15 * plain


def test_one_layer_at_a_time():
    """Fused operators against those that they replace, on the same inputs: bit for bit, but for sums."""
    generator, scale = torch.Generator().manual_seed(0), torch.tensor(2.0**-5)
    x, y = (torch.randn(2, 7, 64, generator=generator).bfloat16() for _ in range(2))
    gate, a, b = (torch.randn(2, 1, 64, generator=generator).bfloat16() for _ in range(3))
    quantized = rounded(kernels.norm_modulate(x, a, b, eps=1e-6), scale)
    assert torch.equal(kernels.norm_modulate_fp8(x, a, b, scale, eps=1e-6).float(), quantized.float())
    total, normed = kernels.gated_norm_fp8(x, gate, y, a, b, scale, eps=1e-6)
    expected = kernels.gated_norm(x, gate, y, a, b, eps=1e-6)
    assert torch.equal(total, expected[0])
    assert torch.equal(normed.float(), rounded(expected[1], scale).float())
    gelu = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.equal(kernels.gelu_fp8(x, scale).float(), rounded(gelu, scale).float())
    weight, bias = torch.randn(48, 64, generator=generator).mul(50).to(torch.float8_e4m3fn), y[0, 0, :48]
    found = fp8_linear(quantized, weight[None], scale, scale / 4, bias[None, None], to_type="bfloat16")
    wide = quantized.double() @ weight.double().T * 2.0**-12 + bias.double()
    assert relative_error(found, wide) <= 3e-3, "one rounding to bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gelu_in_the_gemm(dtype):
    """On a CPU it is computed in the same steps: bit for bit."""
    runner, weights = opened("sd3.5-medium", dtype)
    graph, (inputs, _) = runner.backend.graph, runner.prepare(sample_inputs(runner.folder, batch=2, text_tokens=97))
    apart, together = (PyTorchBackend(graph, weights, passes=passes)(inputs) for passes in (KERNELS_ONLY, ALL))
    assert torch.equal(together, apart)
    layers = {layer.output.name: layer for layer in apply(graph, ALL)}
    for layer in layers.values():
        if layer.type == "FP8_LINEAR_GELU":
            scale, inverse = (value_of(layers[name].attributes, weights) for name in layer.inputs[-2:])
            assert inverse.dtype == torch.float32 and scale.float() * inverse == 1 and inverse.shape == ()
            assert layer.attributes == {"to_type": dtype}


def test_gelu_in_the_gemm_only_if_nothing_else_reads_the_sum():
    layers = apply(opened("sd3.5-medium", "bfloat16")[0].backend.graph, KERNELS_ONLY)
    gelu = [layer for layer in layers if layer.type == "GELU_FP8"]
    made = {layer.output.name: layer for layer in layers}
    product = made[gelu[0].inputs[0]]

    def left(given) -> int:
        return sum(layer.type == "GELU_FP8" for layer in fp8_linear_gelu(given))

    assert left(layers) == 0
    reader = replace(gelu[0], type="SILU", output=replace(gelu[0].output, name="another"), inputs=gelu[0].inputs[:1])
    assert left([*layers, reader]) == 1
    assert left([replace(x, inputs=(*x.inputs[:-1], None)) if x is product else x for x in layers]) == 1, "no bias"


def test_the_order_in_memory_is_kept():
    generator, scale = torch.Generator().manual_seed(0), torch.tensor(2.0**-5)
    x, weight = (torch.randn(*s, generator=generator).to(torch.float8_e4m3fn) for s in ((7, 2, 64), (1, 48, 64)))
    rest = (weight, scale, scale, torch.randn(1, 1, 48, generator=generator).bfloat16(), scale, 1 / scale)
    found = kernels.fp8_linear_gelu(x.transpose(0, 1), *rest, to_type="bfloat16")
    assert found.shape == (2, 7, 48) and found.transpose(0, 1).is_contiguous()
    expected = kernels.fp8_linear_gelu(x.transpose(0, 1).contiguous(), *rest, to_type="bfloat16")
    assert expected.is_contiguous() and torch.equal(found.float(), expected.float())


def test_the_call_of_the_gemm_on_tensor_cores():
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 64, generator=generator).to(torch.float8_e4m3fn) for n in (14, 48))
    bias = torch.randn(48, generator=generator).bfloat16()
    scales = torch.tensor(2.0**-5), torch.tensor(2.0**-7)
    for given in (bias, None):
        try:
            found = fp8_gemm(rows, weight, *scales, given, torch.bfloat16)
        except RuntimeError as error:
            pytest.skip(f"this torch has no FP8 product on a CPU: {error}")
        expected = fp8_linear(rows[None], weight[None], *scales, given, to_type="bfloat16")[0]
        assert found.dtype == torch.bfloat16 and relative_error(found, expected) <= 4e-3


def test_weights_of_different_scales_are_merged():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(16, 16, generator=generator).mul(60).to(torch.float8_e4m3fn) for _ in range(2))
    weights = {"q": q, "k": k, "qs": torch.tensor([0.5]), "ks": torch.tensor([0.125])}
    parts = [{"weight": name, "shape": [1, 16, 16]} for name in "qk"]
    scales = [{"weight": f"{name}s", "shape": [], "dtype": "float32"} for name in "qk"]
    merged = value_of({"stack": parts, "dim": -2, "scales": scales}, weights)
    assert merged.dtype == torch.float8_e4m3fn and merged.shape == (1, 32, 16)
    one = value_of({"largest": scales}, weights)
    assert one == 0.5
    assert torch.equal(merged[0, :16].float(), q.float())
    difference = (merged[0, 16:].float() * one - k.float() * 0.125).abs()
    assert difference.max() <= 2.0**-10 * one, "half a step of the smallest values"
    large = k.float().abs() >= 2.0**-4
    assert difference[large].max() == 0 and large.float().mean() > 0.9
    assert _rescaled(k, torch.tensor(0.125), torch.tensor(0.125)) is k


@pytest.mark.parametrize("name", fp8.MODELS)
def test_blocks_stay_equal_and_values_can_be_seen(name):
    runner, weights = opened(name, "bfloat16")
    graph = runner.backend.graph

    def kinds(passes) -> int:
        return len(list(outline_blocks(lower(graph, weights, passes=passes), "transformer_blocks").children()))

    assert kinds(FP8_GEMMS + NUMERICS + SPEED) <= kinds(NUMERICS)
    inputs = sample_inputs(runner.folder, batch=2, text_tokens=77, seed=1)
    plain = runner.intermediates(inputs)
    backend = PyTorchBackend(graph, weights, passes=ALL)
    runner.backend = backend
    found = runner.intermediates(inputs)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], value) for name, value in plain.items() if name != "output")
    assert not {n for n in placed_weights(backend.module) if n.endswith("to_q.weight")}, "rescaled when merged"


def test_when_they_apply(monkeypatch):
    graph, _ = opened("sd3.5-medium", "float32")
    kept = Counter(layer.type for layer in apply(graph.backend.graph, FP8_GEMMS + NUMERICS))
    assert kept["FP8_LINEAR"] == 0, "in float32 there is no such GEMM with a bias"
    cuda = torch.device("cuda")
    assert not has_fp8(torch.device("cpu"))
    monkeypatch.setattr("mmdit_lib.engine.pytorch_backend.has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in {(8, 6): False, (8, 9): True, (9, 0): True, (12, 0): True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert has_fp8(cuda) is expected
        assert (default_passes(cuda, compiled=False) == ALL) is expected
        assert (default_passes(cuda, compiled=True) == FP8_GEMMS + NUMERICS + SPEED) is expected


def test_the_speed_benchmark_has_what_a_checkpoint_has(tmp_path, monkeypatch):
    """Its graph, made without weights, and its weights: as far as a CPU goes."""
    from argparse import Namespace

    from benchmarks import fp8_speed
    from benchmarks.common import draw_weights, inputs_on
    from mmdit_lib.config import Resolution
    from mmdit_lib.engine.graph import Graph

    model = Checkpoint.open(fp8.checkpoint("sd3.5-medium")).model
    monkeypatch.setitem(fp8_speed.MODELS, "small", model)
    small = {name: Resolution.read(128) for name in ("min_resolution", "opt_resolution", "max_resolution")}
    monkeypatch.setattr(fp8_speed, "PROFILE", fp8_speed.PROFILE.model_copy(update=small))
    fp8_speed.write_graphs(Namespace(folder=tmp_path, models=["small"]))
    cpu = torch.device("cpu")
    weights = draw_weights(model, cpu)
    inputs = inputs_on(cpu, model, Resolution.read(64))
    graphs = {kind: Graph.load(tmp_path / f"small.{kind}.graph.json") for kind in fp8_speed.GRAPHS}
    exact, quantized = PyTorchBackend(graphs["bf16"], weights)(inputs), fp8_speed.in_fp8(weights, model)
    for kind, passes in fp8_speed.STAGES.values():
        found = PyTorchBackend(graphs[kind], quantized, passes=passes)(inputs)
        assert 5e-3 < relative_error(found, exact) < 0.2
