"""FP8 in a network: Q/DQ layers that TensorRT builds without a GPU, and their definition, bit for bit."""

import pytest
import torch

from mmdit_lib.config import DTYPES, FP8
from mmdit_lib.engine.builder_config import builder_config
from mmdit_lib.engine.logger import logger
from mmdit_lib.engine.lowering import lower
from mmdit_lib.engine.read_network import read_network
from mmdit_lib.engine.torch_ops import dequantize, quantize
from mmdit_lib.network import functional as F
from mmdit_lib.network.network import Network, Parameter
from mmdit_lib.network.trt import trt

SINGLE = dict(axis=-1, to_type=FP8)


def parameter(name: str, *shape: int) -> Parameter:
    found = Parameter(*shape)
    found.name = name
    return found


def linear_network(dtype: str, per_channel: bool):
    """x W^T with W [48, 32] in FP8 and a static scale for x; returns builder, definition, weights."""
    torch.manual_seed(0)
    builder = trt.Builder(logger())
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    scales = torch.tensor([2.0**-7, 2.0**-8]).repeat(24) if per_channel else torch.tensor(2.0**-7)
    weights = {
        "weight": torch.randn(48, 32).mul(64).to(torch.float8_e4m3fn),
        "weight_scale": scales.to(DTYPES[dtype].torch),
        "scale": torch.tensor(2.0**-5, dtype=DTYPES[dtype].torch),
    }
    network = Network(definition, weights=weights, dtype=dtype)
    x, scale = network.input("x", dtype, (-1, -1, 32)), network.weight(parameter("scale"), ())
    stored = network.weight(parameter("weight", 48, 32), (1, 48, 32))
    weight = F.dequantize(stored, network.weight(parameter("weight_scale")), 1 if per_channel else None)
    y = F.matmul(F.dequantize(F.quantize(x, scale), scale), weight, transpose_b=True)
    network.output(y, "y")
    return builder, definition, weights, network


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("capability", [(), ("8.9",)], ids=["default GPUs", "8.9"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorrt_builds_it_with_dynamic_sizes(dtype, per_channel, capability):
    builder, definition, weights, _alive = linear_network(dtype, per_channel)
    shapes = {"x": [(1, 8, 32), (2, 100, 32), (4, 500, 32)]}
    plan = builder.build_serialized_network(definition, builder_config(builder, dtype, shapes, capability))
    assert plan is not None, logger().last_error()
    graph = read_network(definition, {})
    found = {layer.name: (layer.type, layer.output.dtype, layer.attributes) for layer in graph.layers}
    assert found["quantize"] == ("QUANTIZE", FP8, {"axis": -1, "to_type": FP8})
    assert found["dequantize_2"] == ("DEQUANTIZE", dtype, {"axis": -1, "to_type": dtype})
    assert found["dequantize"] == ("DEQUANTIZE", dtype, {"axis": 1 if per_channel else -1, "to_type": dtype})
    x = torch.randn(2, 7, 32).to(DTYPES[dtype].torch) * 3
    scales = weights["weight_scale"].reshape(-1, 1).double() if per_channel else weights["weight_scale"].double()
    rounded = (x.double() * 32).to(torch.float8_e4m3fn).double() / 32
    exact = rounded @ (weights["weight"].double() * scales).T
    error = (lower(graph, weights)(x).double() - exact).norm() / exact.norm()
    assert error <= {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]


def test_every_fp8_value_survives():
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)
    for dtype in DTYPES:
        for exponent in (-14, -3, 0, 5):
            scale = torch.tensor(2.0**exponent, dtype=DTYPES[dtype].torch)
            wide = dequantize(values, scale, axis=-1, to_type=dtype)
            assert torch.equal(wide.double(), values.double() * 2.0**exponent), "a product with a power of two is exact"
            again = quantize(wide, scale, **SINGLE)
            assert torch.equal(again.view(torch.uint8), values.view(torch.uint8)), (dtype, exponent)


def test_rounding_and_saturation():
    """To the nearest value, ties to even; past the largest value, that value; NaN stays NaN."""
    found = {
        x: quantize(torch.tensor([x]), torch.tensor(1.0), **SINGLE).item()
        for x in (1.0625, 1.1875, 1.07, 447.0, 460.0, 1e9, float("-inf"), 2.0**-10, 3 * 2.0**-10, 2.0**-11)
    }
    assert found == {
        1.0625: 1.0, 1.1875: 1.25, 1.07: 1.125, 447.0: 448.0, 460.0: 448.0, 1e9: 448.0, float("-inf"): -448.0,
        2.0**-10: 0.0, 3 * 2.0**-10: 2.0**-8, 2.0**-11: 0.0,
    }  # fmt: skip
    assert quantize(torch.tensor([float("nan")]), torch.tensor(1.0), **SINGLE).isnan().all()


def test_onnx_defines_it_the_same_way():
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    from mmdit_lib.engine.onnx_file import IR_VERSION, OPSET, OnnxWriter

    _, definition, weights, _alive = linear_network("float32", False)
    writer = OnnxWriter(read_network(definition, {}), weights)
    for tensor, name in zip(writer.initializers, ("scale", "weight", "weight_scale"), strict=True):
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = weights[name].view(-1).view(torch.uint8).numpy().tobytes()
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(n, kind, ["b", "n", size]) for n, size in (("x", 32), ("y", 48)))
    graph = helper.make_graph(writer.nodes, "linear", [x], [y], writer.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = torch.randn(2, 7, 32) * 5
    (found,) = session.run(["y"], {"x": given.numpy()})
    expected = lower(read_network(definition, {}), weights)(given)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-6, atol=1e-6)
