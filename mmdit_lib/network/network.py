"""A network under construction: TensorRT's `INetworkDefinition`, its names and its weights.

There is no ambient default network: a `Tensor` knows the network it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..config import TORCH_DTYPES, RankMapping
from .tensor_parallel import WHOLE, Sharding
from .trt import Features, dtype_name, installed_features, trt, trt_dtype

Shape = tuple[int, ...]


class Parameter:
    """A checkpoint tensor.

    Attributes:
        shape: the full shape, before tensor parallelism shards it.
        name: in the checkpoint; set by `Module.assign_paths`.
    """

    name: str = ""

    def __init__(self, *shape: int):
        self.shape = shape


class Tensor:
    """A value in the network: an `ITensor` and the `Network` it belongs to. -1 marks a dynamic size."""

    def __init__(self, network: Network, itensor):
        self.network = network
        self.itensor = itensor

    @property
    def shape(self) -> Shape:
        return tuple(self.itensor.shape)

    @property
    def dtype(self) -> str:
        return dtype_name(self.itensor.dtype)

    def __add__(self, other):
        return self.network.elementwise(self, other, trt.ElementWiseOperation.SUM)

    def __sub__(self, other):
        return self.network.elementwise(self, other, trt.ElementWiseOperation.SUB)

    def __mul__(self, other):
        return self.network.elementwise(self, other, trt.ElementWiseOperation.PROD)

    def __floordiv__(self, other):
        return self.network.elementwise(self, other, trt.ElementWiseOperation.FLOOR_DIV)

    def __rsub__(self, other):
        return self.network.constant(other, self) - self

    __radd__ = __add__
    __rmul__ = __mul__


class Network:
    """Defines one rank's network.

    Args:
        definition: an empty, strongly typed `INetworkDefinition`.
        weights: this rank's checkpoint tensors by name. They are handed to TensorRT by address, so
            this object must outlive the build.
        dtype: 'float32', 'float16' or 'bfloat16'.
        mapping: the rank and the parallel sizes.
        sharding: how the model's weights are sharded over the tp ranks.
        features: the layers that it can use; by default those of the installed TensorRT.
        fp8_attention: whether attention is in FP8.
    """

    def __init__(
        self,
        definition,
        *,
        weights: Mapping[str, torch.Tensor],
        dtype: str,
        mapping: RankMapping | None = None,
        sharding: Sharding = WHOLE,
        features: Features | None = None,
        fp8_attention: bool = False,
    ):
        self.definition = definition
        self.weights = weights
        self.dtype = dtype
        self.mapping = mapping or RankMapping()
        self.sharding = sharding
        self.features = features or installed_features()
        self.fp8_attention = fp8_attention
        self.modules: dict[str, list[Tensor]] = {}
        self._arrays: list[torch.Tensor] = []  # what TensorRT reads by address
        self._scopes: list[str] = []
        self._names: set[str] = set()
        self._constants: dict[str, Tensor] = {}
        self.rounded: dict[tuple[str, float], Tensor] = {}
        """Activations rounded to FP8, by the tensor's name and the scale: several layers may read one tensor."""

    # Names ---------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, path: str):
        """Layers added inside are named after the module at `path`."""
        self._scopes.append(path)
        try:
            yield
        finally:
            self._scopes.pop()

    def unique_name(self, suffix: str) -> str:
        """'transformer_blocks.0.attn/concat', with a number if the module has several."""
        path = self._scopes[-1] if self._scopes else ""
        stem = name = f"{path}/{suffix}" if path else suffix
        count = 1
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name

    def name_outputs(self, path: str, outputs) -> None:
        """Record what the module at `path` returned, and name each tensor after the innermost module."""
        tensors = list(flatten(outputs))
        self.modules[path] = tensors
        for i, tensor in enumerate(tensors):
            if path and tensor.itensor.name in self._names and not tensor.itensor.is_network_input:
                tensor.itensor.name = path if len(tensors) == 1 else f"{path}:{i}"

    def module_outputs(self) -> dict[str, list[str]]:
        """The names of the tensors that each module returned, by module path."""
        return {path: [x.itensor.name for x in tensors] for path, tensors in self.modules.items() if path}

    # Layers --------------------------------------------------------------------------------------

    def add(self, layer, suffix: str) -> Tensor:
        """Name a new layer and its output; returns the output."""
        if layer is None:
            raise ValueError(f"TensorRT rejected layer '{self.unique_name(suffix)}'; see its log")
        layer.name = self.unique_name(suffix)
        output = layer.get_output(0)
        output.name = layer.name
        return Tensor(self, output)

    def input(self, name: str, dtype: str, shape: Shape) -> Tensor:
        self._names.add(name)
        return Tensor(self, self.definition.add_input(name, trt_dtype(dtype), shape))

    def output(self, tensor: Tensor, name: str) -> None:
        tensor.itensor.name = name
        self.definition.mark_output(tensor.itensor)

    def weight(
        self, parameter: Parameter, shape: Shape | None = None, crop: dict[int, tuple[int, int]] | None = None
    ) -> Tensor:
        """This rank's part of a checkpoint tensor as a constant.

        `shape` reshapes it (for instance with leading 1s, to broadcast); `crop` then keeps `(start, size)` of
        some dimensions. The graph file stores both, and the checkpoint tensor's name.
        """
        array = self.weights[parameter.name]
        shape = tuple(shape or array.shape)
        source: dict[str, Any] = {"weight": parameter.name, "shape": shape}
        array = array.reshape(shape)
        for dim, (start, size) in (crop or {}).items():
            array = array.narrow(dim, start, size)
        if crop:
            source["crop"] = {str(dim): span for dim, span in crop.items()}
        layer = self.definition.add_constant(tuple(array.shape), self.by_address(array))
        layer.metadata = json.dumps(source)
        return self.add(layer, parameter.name.rpartition(".")[2])

    def scale(self, name: str) -> Tensor:
        """A quantization scale of the checkpoint, a power of two, as a scalar in the network's dtype."""
        array = self.weights[name].reshape(()).to(TORCH_DTYPES[self.dtype])
        layer = self.definition.add_constant((), self.by_address(array))
        layer.metadata = json.dumps({"weight": name, "shape": (), "dtype": self.dtype})
        return self.add(layer, name.rpartition(".")[2])

    def largest_scale(self, names: Sequence[str], times: float) -> Tensor:
        """As `scale`: the largest of several scales of the checkpoint, multiplied by a power of two."""
        source = {"largest": [{"weight": name, "shape": ()} for name in names], "times": times, "dtype": self.dtype}
        if missing := [name for name in names if name not in self.weights]:
            raise ValueError(f"fp8_attention: '{missing[0].rpartition('.')[0]}' is not in FP8 in this checkpoint")
        value = torch.tensor(max(self.weights[name].item() for name in names) * times, dtype=TORCH_DTYPES[self.dtype])
        if not value.isfinite():
            raise ValueError(
                f"{times} times the largest of the scales {', '.join(names)} is too large for {self.dtype}"
            )
        layer = self.definition.add_constant((), self.by_address(value))
        layer.metadata = json.dumps(source)
        return self.add(layer, "value_scale")

    def by_address(self, array: torch.Tensor):
        """`trt.Weights` that point to the array's memory without a copy; the array is kept alive for the build."""
        array = array.contiguous()
        self._arrays.append(array)
        return trt.Weights(trt_dtype(dtype_name(array.dtype)), array.data_ptr(), array.numel())

    def values(self, values: list, dtype: str, shape: Shape) -> Tensor:
        """A small constant that is not a checkpoint tensor; the graph file stores its values."""
        key = json.dumps([values, dtype, shape])
        if key not in self._constants:
            array = torch.tensor(values if shape else values[0], dtype=TORCH_DTYPES[dtype]).expand(shape).contiguous()
            layer = self.definition.add_constant(shape, self.by_address(array))
            layer.metadata = json.dumps({"values": values, "dtype": dtype, "shape": shape})
            with self.scope("constants"):
                self._constants[key] = self.add(layer, "value")
        return self._constants[key]

    def constant(self, value: float | int, like: Tensor) -> Tensor:
        """A scalar that broadcasts against `like`."""
        return self.values([value], like.dtype, (1,) * len(like.shape))

    def elementwise(self, a: Tensor, b: Tensor | float | int, op) -> Tensor:
        b = b if isinstance(b, Tensor) else self.constant(b, a)
        return self.add(self.definition.add_elementwise(a.itensor, b.itensor, op), op.name.lower())


def flatten(outputs) -> Iterator[Tensor]:
    """The tensors in a module's result, which may be a tensor or nested (named) tuples; None is skipped."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, tuple):
        for output in outputs:
            yield from flatten(output)
