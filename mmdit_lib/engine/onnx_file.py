"""`export_onnx`: a graph file and its weights as ONNX, for Netron, Polygraphy, trtexec or ONNX Runtime.

One short function per layer type adds its ONNX nodes; the last node computes the layer's output and has its name.
Weights are external data in one file, since a protobuf holds at most 2 GB.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import FP8, TORCH_DTYPES
from ..files import complete_folder, require_space, write_synced
from .folder import EngineFolder, graph_file
from .graph import Graph, Layer, Value
from .lowering import constant
from .rehearsal import rehearse

OPSET, IR_VERSION = 22, 10
"""The first opset whose convolution has bfloat16, and its file format."""
TYPES = {
    "float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", FP8: "FLOAT8E4M3FN", "int64": "INT64",
    "bool": "BOOL",
}  # fmt: skip
"""Members of `onnx.TensorProto`, by our names of data types."""
MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
ALIGNMENT = 4096
"""Offset of each weight in its file, in bytes: a memory page, so that it can be mapped."""


def export_onnx(
    engine_dir: str | Path = "engine_outputs",
    output_dir: str | Path = "onnx",
    *,
    checkpoint_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Write the network of an engine folder as ONNX: `model.onnx`, and its weights in `model.onnx.data`.

    Names, dtypes and dynamic sizes are those of the network that TensorRT builds. Attention becomes two
    matrix multiplies with a softmax between them.

    Args:
        engine_dir: an engine folder of `build`, for one rank.
        output_dir: the folder to write.
        checkpoint_dir: the converted checkpoint, if it is no longer at its path relative to the engine folder.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: if the engine is for several ranks (ONNX has no collectives), a file is missing or damaged,
            `onnx` is not installed, or the disk is full; no partial output remains.
    """
    folder = EngineFolder.open(engine_dir)
    if folder.layout.world_size > 1:
        raise ValueError(
            f"{engine_dir} is for {folder.layout}, and ONNX has no collectives: build it for one rank (tp, cp, cfg 1)"
        )
    with complete_folder(Path(output_dir).expanduser(), "exported ONNX model", _is_export) as partial:
        graph, weights = folder.graph(0), folder.open_checkpoint(checkpoint_dir).weights()
        rehearse(folder, graph, weights, folder.layout.at(0), folder.path / graph_file(0))
        writer = OnnxWriter(graph, weights)
        require_space(partial, writer.nbytes)
        writer.write_weights(partial / WEIGHTS, progress)
        write_synced(partial / MODEL, writer.model(folder).SerializeToString())
    return Path(output_dir).expanduser()


def _is_export(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} == {MODEL, WEIGHTS}


class OnnxWriter:
    """Translates a graph.

    Attributes:
        nbytes: size of the weights' file.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, torch.Tensor]):
        try:
            import onnx
        except ImportError:
            raise ValueError("ONNX files need the package onnx: pip install 'mmdit_lib[onnx]'") from None
        self.onnx, self.graph, self.weights = onnx, graph, weights
        self.nodes, self.initializers = [], []
        self.external: list[tuple[int, Layer]] = []
        self.nbytes = 0
        self.values = {value.name: value for value in [*graph.inputs, *(x.output for x in graph.layers)]}
        for layer in graph.layers:
            if layer.type == "CONSTANT":
                self._constant(layer)
            else:
                self._translate(layer)

    def _translate(self, layer: Layer) -> None:
        if layer.type not in NODES:
            raise ValueError(f"layer '{layer.name}': no ONNX nodes are defined for layers of type {layer.type}")
        self.output, before = layer.output, len(self.nodes)
        NODES[layer.type](self, *layer.inputs, **layer.attributes)
        assert len(self.nodes) > before, layer
        self.nodes[-1].output[0] = self.nodes[-1].name = layer.output.name

    def _constant(self, layer: Layer) -> None:
        code = getattr(self.onnx.TensorProto, TYPES[layer.output.dtype])
        tensor = self.onnx.TensorProto(name=layer.output.name, data_type=code, dims=layer.output.shape)
        if "weight" in layer.attributes:
            self.nbytes += -self.nbytes % ALIGNMENT
            nbytes = math.prod(layer.output.shape) * TORCH_DTYPES[layer.output.dtype].itemsize
            tensor.data_location = self.onnx.TensorProto.EXTERNAL
            for key, value in {"location": WEIGHTS, "offset": self.nbytes, "length": nbytes}.items():
                tensor.external_data.add(key=key, value=str(value))
            self.external.append((self.nbytes, layer))
            self.nbytes += nbytes
        else:
            tensor.raw_data = _bytes(constant(layer, self.weights)).tobytes()
        self.initializers.append(tensor)

    def node(self, op: str, *inputs: str, **attributes) -> str:
        """Add a node; returns the name of its output, which is changed to the layer's if no other node follows."""
        name = f"{self.output.name}/{op}{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def vector(self, values, dtype: str = "int64", shape: tuple[int, ...] | None = None) -> str:
        """A small constant: int64 sizes or axes, or a scalar if `shape` is ()."""
        shape = (len(values),) if shape is None else shape
        name = f"{self.output.name}/constant{len(self.initializers)}"
        code = getattr(self.onnx.TensorProto, TYPES[dtype])
        self.initializers.append(self.onnx.helper.make_tensor(name, code, shape, values))
        return name

    def write_weights(self, path: Path, progress: bool) -> None:
        with (
            open(path, "wb") as file,
            tqdm(total=self.nbytes, unit="B", unit_scale=True, desc="onnx", disable=not progress) as bar,
        ):
            for offset, layer in self.external:
                file.seek(offset)
                bar.update(file.write(_bytes(constant(layer, self.weights))))
            file.flush()
            os.fsync(file.fileno())

    def model(self, folder: EngineFolder):
        """The `onnx.ModelProto`; dynamic sizes have the names of the folder's input table."""
        helper, architecture = self.onnx.helper, folder.architecture
        sizes = {x.name: x.shape for x in (*folder.inputs, architecture.output)}

        def declared(value: Value):
            shape = [name if size == -1 else size for name, size in zip(sizes[value.name], value.shape, strict=True)]
            return helper.make_tensor_value_info(value.name, getattr(self.onnx.TensorProto, TYPES[value.dtype]), shape)

        outputs = [self.values[name] for name in self.graph.outputs]
        graph = helper.make_graph(
            self.nodes, architecture.name, [*map(declared, self.graph.inputs)], [*map(declared, outputs)],
            self.initializers,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, producer_name="mmdit_lib", opset_imports=opsets, ir_version=IR_VERSION)


def _bytes(tensor: torch.Tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


# Layers ----------------------------------------------------------------------------------------------


def activation(o: OnnxWriter, x, *, kind, alpha=0.0, beta=0.0):
    if kind == "CLIP":
        o.node("Clip", x, *(o.vector([bound], o.output.dtype, ()) for bound in (alpha, beta)))
    else:
        op, attributes = {"SIGMOID": ("Sigmoid", {}), "GELU_TANH": ("Gelu", {"approximate": "tanh"})}[kind]
        o.node(op, x, **attributes)


def attention(
    o: OnnxWriter, q, k, v, mask=None, scale=None, *, norm_op, causal_kind, normalization_quantize_to_type=None
):
    assert (norm_op, causal_kind, mask) == ("SOFTMAX", "NONE", None), (norm_op, causal_kind, mask)
    probabilities = o.node("Softmax", o.node("MatMul", q, o.node("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    if scale:
        code = getattr(o.onnx.TensorProto, TYPES[normalization_quantize_to_type])
        rounded = o.node("QuantizeLinear", probabilities, scale, axis=0, output_dtype=code)
        probabilities = o.node("DequantizeLinear", rounded, scale, axis=0)
    o.node("MatMul", probabilities, v)


def cast(o: OnnxWriter, x, *, to_type):
    o.node("Cast", x, to=getattr(o.onnx.TensorProto, TYPES[to_type]))


def convolution(o: OnnxWriter, x, kernel, bias, *, stride_nd, padding_nd, dilation_nd, num_groups):
    o.node("Conv", x, kernel, bias, strides=stride_nd, pads=padding_nd * 2, dilations=dilation_nd, group=num_groups)


def quantize(o: OnnxWriter, x, scale, *, axis, to_type):
    o.node("QuantizeLinear", x, scale, axis=max(axis, 0), output_dtype=getattr(o.onnx.TensorProto, TYPES[to_type]))


def dequantize(o: OnnxWriter, x, scale, *, axis, to_type):
    assert to_type == o.values[scale].dtype, to_type
    o.node("DequantizeLinear", x, scale, axis=max(axis, 0))


def elementwise(o: OnnxWriter, a, b, *, op):
    # FLOOR_DIV divides sizes, which are not negative, so ONNX's truncation is the same.
    o.node({"SUM": "Add", "SUB": "Sub", "PROD": "Mul", "FLOOR_DIV": "Div"}[op], a, b)


def matrix_multiply(o: OnnxWriter, a, b, *, op0, op1):
    assert op0 == "NONE", op0
    *others, rows, columns = range(len(o.values[b].shape))
    o.node("MatMul", a, o.node("Transpose", b, perm=[*others, columns, rows]) if op1 == "TRANSPOSE" else b)


def normalization(o: OnnxWriter, x, scale, bias, *, axes, epsilon):
    assert axes == 1 << (len(o.output.shape) - 1), "only the last dimension is normalized"
    flat = o.vector([-1])
    o.node("LayerNormalization", x, o.node("Reshape", scale, flat), o.node("Reshape", bias, flat), epsilon=epsilon)


def reduce(o: OnnxWriter, x, *, op, axes, keep_dims):
    assert op == "AVG", op
    dims = [dim for dim in range(len(o.values[x].shape)) if axes >> dim & 1]
    o.node("ReduceMean", x, o.vector(dims), keepdims=int(keep_dims))


def shuffle(o: OnnxWriter, x, shape=None, *, first_transpose, reshape_dims, second_transpose, zero_is_placeholder):
    assert second_transpose is None and zero_is_placeholder
    if first_transpose:
        x = o.node("Transpose", x, perm=first_transpose)
    if reshape_dims is not None:
        shape = o.vector(reshape_dims)
    if shape is not None:
        o.node("Reshape", x, shape)


def slice_(o: OnnxWriter, x, starts=None, sizes=None, *, axes, start, shape, stride, mode):
    assert set(stride) == {1} and mode != "FILL", (stride, mode)
    if starts is None:
        starts, ends = o.vector(start), o.vector([first + size for first, size in zip(start, shape, strict=True)])
    else:
        ends = o.node("Add", starts, sizes)
    o.node("Slice", x, starts, ends, o.vector(axes))


def unary(o: OnnxWriter, x, *, op):
    o.node({"SQRT": "Sqrt", "RECIP": "Reciprocal", "SIN": "Sin", "COS": "Cos"}[op], x)


NODES: dict[str, Callable] = {
    "ACTIVATION": activation,
    "ATTENTION": attention,
    "CAST": cast,
    "CONCATENATION": lambda o, *parts, axis: o.node("Concat", *parts, axis=axis),
    "CONVOLUTION": convolution,
    "DEQUANTIZE": dequantize,
    "ELEMENTWISE": elementwise,
    "MATRIX_MULTIPLY": matrix_multiply,
    "NORMALIZATION": normalization,
    "QUANTIZE": quantize,
    "REDUCE": reduce,
    "SELECT": lambda o, condition, a, b: o.node("Where", condition, a, b),
    "SHAPE": lambda o, x: o.node("Shape", x),
    "SHUFFLE": shuffle,
    "SLICE": slice_,
    "SOFTMAX": lambda o, x, *, axes: o.node("Softmax", x, axis=axes.bit_length() - 1),
    "UNARY": unary,
}
