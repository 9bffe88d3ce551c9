"""Fused operators and the passes that introduce them: what is left of a network, its numbers, and the Triton kernels.

Tolerances as in test_network: float32 5e-6 of the norm; in float16 ten units in the last place (9.8e-4). The Triton
kernels round once: half a unit in the last place of the dtype, 3e-8, 4.9e-4 and 3.9e-3, and float32's own rounding.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import MODELS, case, relative_error

from mmdit_lib.checkpoint.quantization import rounded
from mmdit_lib.config import FP8
from mmdit_lib.engine import cublaslt, kernels, torch_ops
from mmdit_lib.engine.attention import has_flash_attention_3
from mmdit_lib.engine.capability import has_fp8
from mmdit_lib.engine.kernel_passes import KERNELS, SUMS, projected_attention, qkv_attention, unbind
from mmdit_lib.engine.linears import fp8_linear
from mmdit_lib.engine.passes import NUMERICS, SPEED, apply
from mmdit_lib.engine.precision import without_tf32
from mmdit_lib.engine.pytorch_backend import GPU_PASSES, PyTorchBackend, default_passes
from mmdit_lib.engine.torch_ops import gelu_tanh

PASSES = NUMERICS + SPEED + KERNELS + SUMS


@pytest.mark.parametrize("dtype", {"float32": 5e-6, "float16": 1e-2}.items(), ids=lambda item: item[0])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_kept(name, dtype):
    dtype, limit = dtype
    c = case(name)
    runner, inputs = c.runner(dtype), c.inputs(dtype=dtype, patches=(5, 7), tokens=97)
    weights = runner.folder.open_checkpoint(verify=False).weights()
    for count in range(1, len(KERNELS + SUMS) + 1):
        passes = NUMERICS + SPEED + (KERNELS + SUMS)[:count]
        backend = PyTorchBackend(runner.backend.graph, weights, passes=passes)
        assert relative_error(backend(inputs), runner.run(inputs)) <= limit, (KERNELS + SUMS)[count - 1].__name__


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_between_gemms_and_attention(name):
    config = MODELS[name]
    layers = apply(case(name).runner().backend.graph, PASSES)
    found = Counter(layer.type for layer in layers)
    blocks, dual = config.num_layers, len(config.dual_attention_layers)
    assert found["PROJECTED_ATTENTION"] == blocks + dual and found["ATTENTION"] == 0
    assert not any(found[kind] for kind in ("NORMALIZATION", "MODULATE", "RMS_NORM"))
    joined = [layer for layer in layers if layer.type == "CONCATENATION" and "block" in layer.output.name]
    assert not joined, "queries, keys and values are still joined one by one"
    # Per block: the sums after attention and MLP, of image and text (not of the last text). Dual attention's sums
    # become part of those after them.
    assert found["GATED_SUM"] + found["GATED_NORM"] == 2 * blocks + 2 * (blocks - 1)
    assert sum(layer.type == "GATED_NORM" and len(layer.inputs) == 7 for layer in layers) == dual
    assert len({layer.output.name for layer in layers}) == len(layers), "two layers have the same name"


@pytest.mark.parametrize("name", MODELS)
def test_the_modulations_are_unbound_once(name):
    graph, config = case(name).runner().backend.graph, MODELS[name]
    before, after = apply(graph, NUMERICS + SPEED + KERNELS[:-1]), apply(graph, PASSES)
    wide = [layer for layer in after if layer.type == "UNBIND"]
    rows = sum(layer.type == "ITEM" and layer.inputs[0] == wide[0].output.name for layer in after)
    # Image and text 6 each, dual attention 3 more; the last text block and the output 2, those of a scale and a shift.
    blocks, dual = config.num_layers, len(config.dual_attention_layers)
    assert len(wide) == 1 and rows == wide[0].output.shape[0] == 12 * blocks + 3 * dual - 4 + 2
    views = [sum(layer.type in ("SLICE", "SHUFFLE") for layer in layers) for layers in (before, after)]
    assert views[0] - views[1] == rows + 2 * (2 * blocks + 1), "a slice and a view of each norm, a slice of each row"


def test_slices_that_are_no_rows_are_left_alone():
    layers = apply(case("sd3.5-medium").runner().backend.graph, NUMERICS + SPEED + KERNELS[:-1])
    merged = next(layer.inputs[0] for layer in unbind(layers) if layer.type == "UNBIND")
    part = next(layer for layer in layers if layer.type == "SLICE" and layer.inputs[0] == merged)

    def rows(instead) -> int:
        found = unbind([instead if layer is part else layer for layer in layers])
        return sum(layer.type == "ITEM" and layer.inputs[0] == f"{merged}/rows" for layer in found)

    computed = replace(part, inputs=(merged, "constants/value", "constants/value"))
    assert rows(part) - rows(computed) == 9, "of a block with dual attention"
    assert rows(replace(part, attributes={**part.attributes, "start": [1]})) == 0, "rows that overlap"
    assert rows(replace(part, attributes={**part.attributes, "mode": "FILL"})) == rows(computed), "rows beyond the end"
    wider = [
        replace(x, output=replace(x.output, shape=(-1, x.output.shape[-1] + 1))) for x in layers if x.name == merged
    ]
    given = [wider[0] if layer.name == merged else layer for layer in layers]
    assert "UNBIND" not in {layer.type for layer in unbind(given)}, "more than whole rows"
    given = [layer for layer in layers if layer.output.name != merged]
    assert "UNBIND" not in {layer.type for layer in unbind(given)}, "rows of an input of the network"


def test_attention_that_communicates_is_left_alone():
    """Between slices and attention of a context-parallel network there are collectives."""
    from mmdit_lib.config import BuildConfig, Layout, Resolution
    from mmdit_lib.engine.dry_graph import dry_graph

    config = BuildConfig.one_size(Resolution.read(128), 2, 77)
    for method in ("allgather", "ulysses"):
        layout = Layout(cp_size=2, cp_method=method)
        layers = apply(dry_graph(MODELS["sd3.5-medium"], layout.at(0), config, "float32"), NUMERICS + SPEED)
        assert [x.type for x in qkv_attention(layers)] == [x.type for x in layers]


def test_streams_of_two_kinds_are_left_alone():
    """The kernel has one form for all streams: with norms of queries and keys, or without."""
    layers = apply(case("sd3.5-medium").runner().backend.graph, NUMERICS + SPEED + KERNELS[:3])
    joint = [layer for layer in layers if layer.type == "QKV_ATTENTION" and len(layer.inputs) == 6]
    mixed = [replace(x, inputs=(*x.inputs[:4], None, None)) if x is joint[0] else x for x in layers]
    for given, left in ((layers, 0), (mixed, 1)):
        assert sum(layer.type == "QKV_ATTENTION" for layer in projected_attention(given)) == left


def test_they_are_for_gpus_without_a_compiler(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("mmdit_lib.engine.pytorch_backend.has_triton", lambda: True)
    assert default_passes(cpu, compiled=False) == NUMERICS
    assert default_passes(cuda, compiled=False) == GPU_PASSES
    assert default_passes(cuda, compiled=True) == NUMERICS + SPEED
    monkeypatch.setattr("mmdit_lib.engine.pytorch_backend.has_triton", lambda: False)
    assert default_passes(cuda, compiled=False) == NUMERICS + SPEED


def tensors(dtype: torch.dtype, batch: int, tokens: int, heads: int, size: int):
    """x, y (tokens first), gate, scale, shift and the parts of two streams."""
    width, generator = heads * size, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, y = draw(batch, tokens, width), draw(tokens, batch, width).transpose(0, 1)
    gate, scale, shift = draw(batch, 6, width)[:, ::2].split(1, 1)
    streams = [[draw(batch, n, 3 * width), draw(size), draw(size)] for n in (tokens, 77)]
    return x, y, gate, scale, shift, streams


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", {"float32": 5e-7, "float16": 5e-4, "bfloat16": 4e-3}.items(), ids=lambda x: x[0])
@pytest.mark.parametrize("shape", [(2, 4096, 24, 64), (1, 333, 38, 64), (3, 50, 3, 8)], ids=str)
def test_triton(shape, dtype):
    dtype, limit = dtype
    x, y, gate, scale, shift, streams = tensors(getattr(torch, dtype), *shape)

    def check(function, *arguments, **options):
        exact = function(*(a if a is None else a.double() for a in arguments), **options)
        found = function(*(a if a is None else a.cuda() for a in arguments), **options)
        if isinstance(exact, tuple):
            exact, found = torch.stack(exact), torch.stack(found)
        assert found.dtype == x.dtype and relative_error(found.cpu(), exact) <= limit, function.__name__

    check(kernels.gated_sum, x, gate, y)
    check(kernels.norm_modulate, x, scale, shift, eps=1e-6)
    check(kernels.gated_norm, x, gate, y, scale, shift, eps=1e-6)
    check(kernels.gated_norm, x, gate, y, scale, shift, shift, x, eps=1e-6)
    both, one = [*streams[0], *streams[1]], streams[0]
    unnormed = [part if i % 3 == 0 else None for i, part in enumerate(both)]
    for parts in (both, one, unnormed):
        gpu = [part if part is None else part.cuda() for part in parts]
        split = kernels.split_heads(*gpu, heads=shape[2], eps=1e-6)
        exact = kernels.split_heads(*(p if p is None else p.double() for p in parts), heads=shape[2], eps=1e-6)
        for found, expected in zip(split, exact, strict=True):
            assert relative_error(found.cpu(), expected) <= limit


PROJECTED = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Of half a unit in the last place, four roundings in a row: of q and k, of their norms, of the probabilities, and of
the result; in float32 also the rounding of sums of 96 and of 377 products."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", PROJECTED)
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("normed", [True, False])
def test_projected_attention(dtype, streams, normed):
    heads, size, width = 6, 64, 96
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    parts = []
    for tokens in (300, 77)[:streams]:
        x = draw(tokens, 2, width).transpose(0, 1)  # as norms write it
        norms = (draw(size), draw(size)) if normed else (None, None)
        parts += [x, draw(1, 3 * heads * size, width) / 10, draw(1, 1, 3 * heads * size), *norms]
    options = dict(inputs=3, heads=heads, eps=1e-6, scale=size**-0.5)
    exact = kernels.projected_attention(*(p if p is None else p.double() for p in parts), **options)
    with without_tf32():
        found = kernels.projected_attention(*(p if p is None else p.cuda() for p in parts), **options)
    assert found.dtype == parts[0].dtype and found.shape == exact.shape
    assert relative_error(found.cpu(), exact) <= PROJECTED[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(torch.device("cuda")), reason="needs FP8 tensor cores")
@pytest.mark.parametrize("in_fp8", [False, True])
def test_projected_attention_in_fp8(in_fp8):
    """FP8 linear layers; with `in_fp8`, FlashAttention-3 on FP8, which also rounds probabilities to 4 bits."""
    if in_fp8 and not has_flash_attention_3(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU and fa3-fwd")
    heads, size, width = 6, 64, 96
    generator = torch.Generator().manual_seed(0)
    parts, one = [], torch.tensor(1.0)
    for tokens in (300, 77):
        x, weight = (
            torch.randn(shape, generator=generator) for shape in ((tokens, 2, width), (1, 3 * heads * size, width))
        )
        x, bias = x.to(torch.float8_e4m3fn).transpose(0, 1), torch.randn(1, 1, 3 * heads * size, generator=generator)
        bias, norms = bias.bfloat16(), [1 + torch.randn(size, generator=generator).bfloat16() / 10 for _ in range(2)]
        parts += [x, weight.mul(16).to(torch.float8_e4m3fn), one, torch.tensor(2.0**-7), bias, *norms]
    options = dict(inputs=5, heads=heads, eps=1e-6, scale=size**-0.5, to_type="bfloat16")
    exact = kernels.projected_attention(*parts, **options)
    v_scale = [torch.tensor(2.0**-4)] if in_fp8 else []
    found = kernels.projected_attention(*(p.cuda() for p in (*parts, *v_scale)), **options)
    if in_fp8:
        _, mean = kernels.projected_attention(*parts, *v_scale, **options)
        assert relative_error(found[1].cpu(), mean) <= PROJECTED["bfloat16"]
        found = found[0] + found[1]
    assert relative_error(found.cpu(), exact) <= (0.1 if in_fp8 else PROJECTED["bfloat16"])


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(torch.device("cuda")), reason="needs FP8 tensor cores")
def test_attention_in_fp8():
    """Against the Q/DQ layers' definition. FlashAttention-3 rounds probabilities before it divides by their sum."""
    if not has_flash_attention_3(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU and fa3-fwd")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 64, generator=generator).bfloat16() for tokens in (300, 377, 377))
    scale, v_scale = 64**-0.5, torch.tensor(2.0**-4)
    found = sum(kernels.fp8_attention(q.cuda(), k.cuda(), v.cuda(), v_scale.cuda(), scale=scale))
    one, mean = torch.tensor(1.0), v.mean(2, keepdim=True)
    q, k, v = (kernels.through_fp8(x, s) for x, s in ((q, one), (k, one), (v - mean, v_scale)))
    options = dict(norm_op="SOFTMAX", causal_kind="NONE", normalization_quantize_to_type=FP8)
    expected = torch_ops.attention(q * scale, k, v, None, torch.tensor(2.0**-8), **options) + mean
    without = kernels.attention(q, k, v, scale) + mean
    assert found.dtype == torch.bfloat16
    assert relative_error(found.cpu(), expected) <= 2 * relative_error(without, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(torch.device("cuda")), reason="needs FP8 tensor cores")
def test_attention_in_fp8_of_many_tokens_whose_values_have_a_mean():
    """Tensor cores add FP8 products with few bits. Without the mean's removal, the error here is 7 %."""
    if not has_flash_attention_3(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU and fa3-fwd")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 4, 4429, 64, device="cuda", generator=generator).bfloat16() for _ in range(3))
    v += torch.randn(1, 4, 1, 64, device="cuda", generator=generator).bfloat16()
    found = sum(kernels.fp8_attention(q, k, v, torch.tensor(2.0**-6, device="cuda"), scale=0.125))
    q, k, v = (x.double() for x in (q, k, v))
    assert relative_error(found, (q @ k.mT * 0.125).softmax(-1) @ v) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 4429])
def test_mean_over_tokens(tokens):
    from mmdit_lib.engine.triton_attention import mean_over_tokens

    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(tokens, 2, 3, 5, 48, device="cuda", generator=generator).bfloat16() + 1
    found, expected = mean_over_tokens(qkv[:, :, 2]), qkv[:, :, 2].double().mean(0)[:, :, None]
    assert found.shape == (2, 5, 1, 48) and found.is_contiguous()
    assert relative_error(found, expected) <= 2.0**-8, "rounded once"
    assert torch.equal(found[1:], mean_over_tokens(qkv[:, 1:, 2])), "a row has the same bits alone"


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(torch.device("cuda")), reason="needs FP8 tensor cores")
def test_add_mean_fp8():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 2, 96, generator=generator).bfloat16().transpose(0, 1)
    mean, scale = torch.randn(2, 6, 1, 16, generator=generator).bfloat16(), torch.tensor(2.0**-5)
    found = kernels.add_mean_fp8(x.cuda(), scale.cuda(), mean.cuda())
    assert torch.equal(found.cpu().float(), kernels.add_mean_fp8(x, scale, mean).float())


def test_values_of_attention_in_fp8_are_emulated():
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    weight, bias, norm, scale = (
        torch.eye(32).repeat(3, 1)[None],
        torch.zeros(1, 1, 96),
        torch.ones(16),
        torch.tensor(0.5),
    )
    options = dict(inputs=3, heads=2, eps=1e-6, scale=0.25)
    found, mean = kernels.projected_attention(x, weight, bias, norm, norm, scale, **options)
    q, k, v = kernels.split_heads(x.repeat(1, 1, 3), norm, norm, heads=2, eps=1e-6)
    assert relative_error(mean, v.mean(2, keepdim=True)) <= 1e-6
    q, k = (y.to(torch.float8_e4m3fn).float() for y in (q, k))
    v = ((v - v.mean(2, keepdim=True)) / 0.5).to(torch.float8_e4m3fn).float() * 0.5
    expected = (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v
    assert relative_error(found, expected) <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(torch.device("cuda")), reason="needs FP8 tensor cores")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4096, 24, 64), (1, 333, 38, 64), (3, 50, 2, 8)], ids=str)
def test_triton_fp8(shape, dtype):
    """Against float64, rounded to the dtype and then to FP8. Sums in float32 move few values over a boundary."""
    x, y, gate, scale, shift, _ = tensors(dtype, *shape)
    fp8_scale = torch.tensor(2.0**-6)

    def check(found: torch.Tensor, exact: torch.Tensor, allowed: float = 1e-3):
        expected = rounded(exact.to(dtype), fp8_scale)
        assert found.dtype == expected.dtype
        found, expected = found.cpu().float(), expected.float()
        assert (found != expected).float().mean() <= allowed
        torch.testing.assert_close(found, expected, rtol=0.13, atol=2.0**-9)  # the next FP8 value

    def on_gpu(function, *arguments, **options):
        return function(*(a.cuda() for a in arguments), **options)

    check(on_gpu(kernels.quantize, x, fp8_scale), x, 0)
    check(on_gpu(kernels.quantize, y, fp8_scale), y, 0)
    check(on_gpu(kernels.gelu_fp8, x, fp8_scale), gelu_tanh(x.double()))
    check(
        on_gpu(kernels.norm_modulate_fp8, x, scale, shift, fp8_scale, eps=1e-6),
        kernels.norm_modulate(x.double(), scale.double(), shift.double(), eps=1e-6),
    )
    total, normed = on_gpu(kernels.gated_norm_fp8, x, gate, y, scale, shift, fp8_scale, eps=1e-6)
    assert relative_error(total.cpu(), kernels.gated_sum(x.double(), gate.double(), y.double())) <= 4e-3
    # The kernel normalizes the sum as it was rounded to the dtype.
    check(normed, kernels.norm_modulate(total.cpu().double(), scale.double(), shift.double(), eps=1e-6))
    large = torch.tensor([[[1e4, -1e4, 449.0, 0.0] * 4]], dtype=dtype)
    one = torch.tensor(1.0)
    assert torch.equal(on_gpu(kernels.quantize, large, one).cpu().float(), rounded(large, one).float())


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(torch.device("cuda")), reason="needs FP8 tensor cores")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fp8_gemm(dtype):
    """`use_fast_accum` adds products with fewer bits, hence the bound above the dtype's rounding."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 1536, generator=generator).to(torch.float8_e4m3fn) for n in (333, 256))
    bias, scales = torch.randn(256, generator=generator).to(getattr(torch, dtype)), torch.tensor([2.0**-5, 2.0**-7])
    given = (x[None], weight[None], *scales, bias)
    expected = fp8_linear(*given, to_type=dtype)
    assert relative_error(fp8_linear(*(a.cuda() for a in given), to_type=dtype).cpu(), expected) <= 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(torch.device("cuda")), reason="needs FP8 tensor cores")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 4096), (2, 333), (1, 333), (1, 16)], ids=str)
def test_gelu_in_the_fp8_gemm(shape, dtype):
    """Against float64, rounded to FP8 once: the same value or the next one, in a CUDA graph too.

    Near zero FP8's steps are smaller than the error of sums with `use_fast_accum` and of the GPU's tanh, in units of
    the result's scale at most 0.1: 8 steps that each lose 2^-13 of a sum of about 16, times 2, and 7e-4 times 32.
    """
    (batch, tokens), generator = shape, torch.Generator().manual_seed(0)
    x = (
        torch.randn(tokens, batch, 256, generator=generator).to(torch.float8_e4m3fn).transpose(0, 1)
    )  # as norms write it
    weight = torch.randn(1, 384, 256, generator=generator).to(torch.float8_e4m3fn)
    bias = torch.randn(384, generator=generator).to(getattr(torch, dtype))
    bias[0], bias[1], scale, one = 1e4, -1e4, torch.tensor(2.0**-5), torch.tensor(1.0)
    given = [t.cuda() for t in (x, weight, torch.tensor(2.0**-4), one, bias, scale, 1 / scale)]
    exact = gelu_tanh(x.double() @ weight[0].double().T / 16 + bias.double())

    def check(found: torch.Tensor, exact: torch.Tensor):
        expected, found = rounded(exact, scale).float(), found.cpu().float()
        assert (found[..., 0] == 448).all() and (found[..., 1] == 0).all(), "it saturates"
        torch.testing.assert_close(found, expected, rtol=0.13, atol=0.1)
        found, expected, exact = (t[..., 2:] for t in (found, expected, exact / scale))
        assert relative_error(found, exact) <= relative_error(expected, exact) + 1e-2

    rows = given[0].transpose(0, 1).reshape(-1, 256)
    assert cublaslt.fp8_linear_gelu(rows, given[1][0], *given[2:5], given[6]) is not None, "two kernels instead of one"
    found = kernels.fp8_linear_gelu(*given, to_type=dtype)
    assert found.dtype == torch.float8_e4m3fn and found.transpose(0, 1).is_contiguous()
    check(found, exact)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.fp8_linear_gelu(*given, to_type=dtype)
    given[0].copy_(x.float().flip(1).to(x.dtype))
    graph.replay()
    check(found, exact.flip(1))
