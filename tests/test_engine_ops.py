"""Every operator of the pytorch backend against a second implementation in NumPy float64.

One list of cases: operator, inputs, attributes, the statement. float32 results may differ from it by a
few units in the last place (eps 1.2e-7) times the length of the sums; float16 (9.8e-4) and bfloat16
(7.8e-3) by one rounding of the result and one of what was rounded on the way.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from mmdit_lib.engine.torch_ops import ACTIVATIONS, ELEMENTWISE, FUSED, OPS, SHAPE_OPS, UNARY, of_patches, patch_linear
from mmdit_lib.network.trt import trt

TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}
DTYPES = {name: getattr(torch, name) for name in TOLERANCE}


@dataclass(frozen=True)
class OpCase:
    op: str
    shapes: tuple
    """Shapes of the inputs; () is a tuple that is passed unchanged (`fixed`)."""
    expected: Any
    attributes: dict = field(default_factory=dict)
    fixed: tuple = ()
    first: tuple = ()
    """As `fixed`, before the inputs."""
    positive: bool = False
    label: str = ""

    def __str__(self):
        return f"{self.op}-{self.label}" if self.label else self.op


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax_attention(q, k, v, scale=1.0):
    scores = scale * np.einsum("bhqd,bhkd->bhqk", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)


def patches(x, kernel, bias):
    """A convolution whose stride is its size: every patch times the kernel."""
    size = kernel.shape[-1]
    b, c, h, w = x.shape
    cut = x.reshape(b, c, h // size, size, w // size, size)
    return np.einsum("bchiwj,ocij->bohw", cut, kernel) + bias[:, None, None]


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def norm_modulate(x, scale, shift):
    return layer_norm(x, 1.0, 0.0) * (scale + 1) + shift


def gated_norm(x, gate, y, scale, shift):
    total = x + gate * y
    return np.stack([total, norm_modulate(total, scale, shift)])


def qkv_attention(*streams):
    """Two heads of 4."""
    parts = [[], [], []]
    for qkv, norm_q, norm_k in (streams[:3], streams[3:]):
        q, k, v = (x.reshape(2, -1, 2, 4).transpose(0, 2, 1, 3) for x in np.split(qkv, 3, -1))
        for part, x in zip(parts, (rms_norm(q, norm_q), rms_norm(k, norm_k), v), strict=True):
            part.append(x)
    return softmax_attention(*(np.concatenate(part, 2) for part in parts), 0.5)


def projected_attention(*inputs):
    """Of streams with a linear layer, and a norm for queries and keys each."""
    streams = [inputs[:5], inputs[5:]]
    return qkv_attention(*(y for x, w, b, q, k in streams for y in (x @ w[0].T + b[0, 0], q, k)))


def e4m3(x):
    """The nearest FP8 value, ties to even: from 2^-6 on, 3 bits of mantissa; below, steps of 2^-9; at most 448."""
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return np.clip(np.round(x / step) * step, -448, 448)


def fill_slice(x):
    """Rows 3 to 8 of five: the last three are zero."""
    return np.concatenate([x[:, 3:5], np.zeros_like(x[:, :3])], 1)


SHUFFLE = dict(first_transpose=None, reshape_dims=None, second_transpose=None, zero_is_placeholder=True)
SLICE = dict(axes=[1], start=None, shape=None, stride=[1], mode="STRICT_BOUNDS")
ATTENTION = dict(norm_op="SOFTMAX", causal_kind="NONE")
QKV = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
FP8 = torch.float8_e4m3fn
CODES = torch.arange(254, dtype=torch.uint8).view(FP8)[[i for i in range(254) if i != 127]]
"""Every FP8 value but NaN."""
QUANTIZE = dict(axis=-1, to_type="float8_e4m3fn")
ROWS = torch.tensor([True, False, True])[:, None]
TWO = {"SUM": np.add, "SUB": np.subtract, "PROD": np.multiply, "FLOOR_DIV": np.floor_divide}
ONE = {"SQRT": np.sqrt, "RECIP": np.reciprocal, "SIN": np.sin, "COS": np.cos}

CASES = [
    OpCase("ACTIVATION", ((3, 7),), sigmoid, dict(kind="SIGMOID"), label="sigmoid"),
    OpCase("ACTIVATION", ((3, 7),), gelu_tanh, dict(kind="GELU_TANH"), label="gelu_tanh"),
    OpCase("ACTIVATION", ((3, 7),), gelu_erf, dict(kind="GELU_ERF"), label="gelu_erf"),
    OpCase(
        "ACTIVATION",
        ((3, 7),),
        lambda x: np.clip(x, -0.5, 0.25),
        dict(kind="CLIP", alpha=-0.5, beta=0.25),
        label="clip",
    ),
    OpCase("ATTENTION", QKV, softmax_attention, ATTENTION, label="unscaled"),
    OpCase(
        "ATTENTION", QKV, lambda q, k, v: softmax_attention(q, k, v, 0.25), dict(ATTENTION, scale=0.25), label="scaled"
    ),
    OpCase("CAST", ((4,),), lambda x: x, dict(to_type="float32")),
    OpCase("CONCATENATION", ((2, 3), (2, 4)), lambda a, b: np.concatenate([a, b], 1), dict(axis=1)),
    OpCase(
        "CONVOLUTION",
        ((2, 4, 6, 9), (5, 4, 3, 3), (5,)),
        patches,
        dict(stride_nd=[3, 3], padding_nd=[0, 0], dilation_nd=[1, 1], num_groups=1),
    ),
    OpCase(
        "DEQUANTIZE",
        (),
        lambda: CODES.double().numpy() / 8,
        dict(axis=-1, to_type="float32"),
        fixed=(CODES, torch.tensor(0.125)),
    ),
    OpCase(
        "DEQUANTIZE",
        (),
        lambda: np.stack([CODES.double().numpy() / 8, CODES.double().numpy() * 2]),
        dict(axis=0, to_type="float32"),
        fixed=(torch.stack([CODES.view(torch.uint8)] * 2).view(FP8), torch.tensor([0.125, 2.0])),
        label="per-channel",
    ),
    *[
        OpCase("ELEMENTWISE", ((2, 3, 4), (1, 1, 4)), f, dict(op=name), positive=name == "FLOOR_DIV", label=name)
        for name, f in TWO.items()
    ],
    OpCase("GATED_NORM", ((2, 3, 8), (2, 1, 8), (2, 3, 8), (2, 1, 8), (2, 1, 8)), gated_norm, dict(eps=1e-6)),
    OpCase("GATED_SUM", ((2, 3, 8), (2, 1, 8), (2, 3, 8)), lambda x, g, y: x + g * y),
    OpCase("ITEM", ((2, 3, 8),), lambda x: x[1], dict(index=1)),
    OpCase("LINEAR_GELU", ((2, 3, 8), (1, 5, 8), (1, 1, 5)), lambda x, w, b: gelu_tanh(x @ w[0].T + b[0, 0])),
    OpCase("MODULATE", ((2, 3, 8), (2, 1, 8), (2, 1, 8)), lambda x, scale, shift: x * (scale + 1) + shift),
    OpCase("RMS_NORM", ((2, 3, 8), (1, 1, 8)), rms_norm, dict(eps=1e-6)),
    OpCase("LINEAR", ((2, 3, 8), (1, 5, 8), (1, 1, 5)), lambda x, w, b: x @ w[0].T + b[0, 0]),
    OpCase(
        "MATRIX_MULTIPLY",
        ((2, 3, 8), (1, 5, 8)),
        lambda a, b: a @ b.transpose(0, 2, 1),
        dict(op0="NONE", op1="TRANSPOSE"),
        label="bt",
    ),
    OpCase("MATRIX_MULTIPLY", ((3, 8), (8, 5)), lambda a, b: a @ b, dict(op0="NONE", op1="NONE"), label="plain"),
    OpCase("NORMALIZATION", ((2, 3, 8), (1, 1, 8), (1, 1, 8)), layer_norm, dict(axes=4, epsilon=1e-6)),
    OpCase("NORM_MODULATE", ((2, 3, 8), (2, 1, 8), (2, 1, 8)), norm_modulate, dict(eps=1e-6)),
    OpCase(
        "PROJECTED_ATTENTION",
        ((2, 3, 8), (1, 24, 8), (1, 1, 24), (4,), (4,), (2, 5, 8), (1, 24, 8), (1, 1, 24), (4,), (4,)),
        projected_attention,
        dict(inputs=3, heads=2, eps=1e-6, scale=0.5),
    ),
    OpCase(
        "QKV_ATTENTION",
        ((2, 3, 24), (4,), (4,), (2, 5, 24), (4,), (4,)),
        qkv_attention,
        dict(heads=2, eps=1e-6, scale=0.5),
    ),
    OpCase("QUANTIZE", ((64, 7),), lambda x: e4m3(x * 128), QUANTIZE, fixed=(torch.tensor(2.0**-7),)),
    OpCase(
        "QUANTIZE",
        ((64, 2),),
        lambda x: e4m3(x * [1024, 4]),
        dict(QUANTIZE, axis=1),
        fixed=(torch.tensor([2.0**-10, 0.25]),),
        label="per-channel",
    ),
    OpCase("REDUCE", ((2, 3, 8),), lambda x: x.mean(2, keepdims=True), dict(op="AVG", axes=4, keep_dims=True)),
    OpCase("SELECT", ((2, 3, 8), (2, 3, 8)), lambda a, b: np.where(ROWS, a, b), first=(ROWS,)),
    OpCase(
        "SHUFFLE",
        ((2, 3, 8),),
        lambda x: x.reshape(2, 3, 2, 4),
        dict(SHUFFLE, reshape_dims=[0, 0, 2, 4]),
        label="zeros",
    ),
    OpCase("SHUFFLE", ((2, 3, 8),), lambda x: x.reshape(6, 8), dict(SHUFFLE, reshape_dims=[-1, 8]), label="rest"),
    OpCase(
        "SHUFFLE",
        ((2, 3, 8),),
        lambda x: x.transpose(2, 0, 1).reshape(8, 6),
        dict(SHUFFLE, first_transpose=[2, 0, 1], reshape_dims=[8, 6]),
        label="transpose",
    ),
    OpCase("SHUFFLE", ((2, 3, 8),), lambda x: x.reshape(3, 16), SHUFFLE, fixed=((3, 16),), label="dynamic"),
    OpCase("SILU", ((3, 7),), lambda x: x * sigmoid(x)),
    OpCase(
        "SLICE",
        ((2, 5, 3),),
        lambda x: x[:, 1:4],
        dict(SLICE, start=[1], shape=[3]),
        fixed=(None, None),
        label="static",
    ),
    OpCase("SLICE", ((2, 5, 3),), lambda x: x[:, 1:4], SLICE, fixed=((1,), (3,)), label="dynamic"),
    OpCase("SLICE", ((2, 5, 3),), fill_slice, dict(SLICE, mode="FILL"), fixed=((3,), (5,)), label="fill"),
    OpCase("SOFTMAX", ((2, 3, 8),), lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True), dict(axes=2)),
    *[
        OpCase("UNARY", ((3, 7),), f, dict(op=name), positive=name in ("SQRT", "RECIP"), label=name)
        for name, f in ONE.items()
    ],
    OpCase("UNBIND", ((2, 12),), lambda x: x.reshape(2, 4, 1, 3).transpose(1, 0, 2, 3), dict(width=3)),
]

FP8_FUSED = {
    "ADD_MEAN_FP8", "FP8_ATTENTION", "FP8_LINEAR", "FP8_LINEAR_GELU", "GATED_NORM_FP8", "GELU_FP8", "NORM_MODULATE_FP8",
}  # fmt: skip
"""test_fp8_passes.py and test_fp8_attention.py compare them with the operators that they replace."""
NEEDS_PROCESSES = {
    "DIST_COLLECTIVE", "GATHERED_ATTENTION", "REDUCED_GATED_NORM", "REDUCED_GATED_NORM_FP8", "REDUCED_GATED_SUM",
    "ULYSSES_ATTENTION",
}  # fmt: skip
"""test_parallel.py compares them with diffusers, test_fp8_parallel.py those in FP8 with one rank."""


OWN_DTYPES = {"CAST": torch.float32, "DEQUANTIZE": torch.float32, "QUANTIZE": FP8}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in case.shapes]
    inputs = [(x.abs() + 0.5 if case.positive else x).to(DTYPES[dtype]) for x in inputs]
    wanted = case.expected(*(x.double().numpy() for x in inputs))
    found = OPS[case.op](*case.first, *inputs, *case.fixed, **case.attributes)
    found = torch.stack(found) if isinstance(found, tuple) else found
    assert found.dtype == OWN_DTYPES.get(case.op, DTYPES[dtype])
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_patches_are_a_linear_layer():
    """What `convolution` calls on a GPU."""
    generator = torch.Generator().manual_seed(0)
    x, kernel, bias = (torch.randn(s, generator=generator).double() for s in ((2, 3, 6, 10), (7, 3, 2, 2), (7,)))
    found = patch_linear(x, kernel, bias)
    torch.testing.assert_close(found, torch.nn.functional.conv2d(x, kernel, bias, 2))
    assert found.permute(0, 2, 3, 1).is_contiguous()


def test_which_convolutions_are_of_patches():
    def which(**changes) -> bool:
        usual = dict(stride_nd=[2, 2], padding_nd=[0, 0], dilation_nd=[1, 1], num_groups=1)
        return of_patches(torch.empty(7, 3, 2, 2), **usual | changes)

    assert which()
    others = dict(stride_nd=[1, 1]), dict(padding_nd=[1, 1]), dict(dilation_nd=[2, 2]), dict(num_groups=3)
    assert not any(which(**other) for other in others)


def test_no_operator_is_without_a_case():
    assert {case.op for case in CASES} | NEEDS_PROCESSES | FP8_FUSED == set(OPS)
    # Older TensorRT has no collectives; an attention is two of its layers, one at each end.
    of_tensorrt = {*trt.LayerType.__members__, "ATTENTION", "DIST_COLLECTIVE"}
    assert set(OPS) & of_tensorrt == set(OPS) - FUSED and FUSED < set(OPS)
    assert {case.attributes["op"] for case in CASES if case.op == "ELEMENTWISE"} == set(ELEMENTWISE)
    assert {case.attributes["op"] for case in CASES if case.op == "UNARY"} == set(UNARY)
    assert {case.attributes["kind"] for case in CASES if case.op == "ACTIVATION"} == {*ACTIVATIONS, "CLIP"}


SHAPE_CASES = [
    ("SHAPE", (torch.zeros(2, 3, 4),), {}, (2, 3, 4)),
    ("SLICE", ((2, 3, 4),), dict(axes=[0], start=[1], shape=[2], stride=[1], mode="STRICT_BOUNDS"), (3, 4)),
    ("CONCATENATION", ((2,), (3, 4)), dict(axis=0), (2, 3, 4)),
    ("ELEMENTWISE", ((7, 9), (2,)), dict(op="FLOOR_DIV"), (3, 4)),
    ("ELEMENTWISE", ((7,), (2, 3)), dict(op="SUB"), (5, 4)),
]


@pytest.mark.parametrize(("op", "inputs", "attributes", "wanted"), SHAPE_CASES)
def test_shape_operator(op, inputs, attributes, wanted):
    found = SHAPE_OPS[op](*inputs, **attributes)
    assert found == wanted and all(type(n) is int for n in found)
    assert {case[0] for case in SHAPE_CASES} == set(SHAPE_OPS)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("ATTENTION", [torch.zeros(1, 1, 2, 2)] * 3, dict(norm_op="SOFTMAX", causal_kind="LOWER_RIGHT")),
        ("MATRIX_MULTIPLY", [torch.zeros(2, 2)] * 2, dict(op0="TRANSPOSE", op1="NONE")),
        ("NORMALIZATION", [torch.zeros(2, 3)] * 3, dict(axes=1, epsilon=1e-6)),
        ("REDUCE", [torch.zeros(2, 3)], dict(op="SUM", axes=2, keep_dims=True)),
        ("SHUFFLE", [torch.zeros(2, 3)], dict(SHUFFLE, second_transpose=[1, 0])),
        ("SLICE", [torch.zeros(4), None, None], dict(axes=[0], start=[0], shape=[2], stride=[2], mode="STRICT_BOUNDS")),
    ],
)
def test_what_no_network_of_ours_contains_is_not_guessed(op, inputs, attributes):
    with pytest.raises(AssertionError):
        OPS[op](*inputs, **attributes)
