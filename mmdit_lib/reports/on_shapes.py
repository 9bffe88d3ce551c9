"""Running a lowered graph on shapes alone: on `meta` tensors, which have shapes but no data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from ..architecture import ModelConfig
from ..config import TORCH_DTYPES, BuildConfig, Dtype, Sizes
from ..engine.graph import Graph
from ..engine.inputs import input_dtype, shape_of
from ..engine.lowering import lowered
from ..engine.passes import NUMERICS, Pass
from ..models import architecture_of


class OnShapes(fx.Interpreter):
    """Blocks repeat: each operator runs once for the same shapes, strides and attributes of its inputs."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        *,
        passes: tuple[Pass, ...] = NUMERICS,
        groups: Mapping[tuple[int, ...], str] | None = None,
    ):
        root, lines = lowered(graph, weights, device="meta", groups=groups, passes=passes)
        super().__init__(root, graph=lines)
        self._known: dict[str, tuple[Any, dict[int, int | None]]] = {}

    def call_function(self, target, args, kwargs) -> Any:
        given: list[Any] = []

        def described(x: Any) -> Any:
            """All that the shape of a result depends on in this input."""
            given.append(x)
            return (x.shape, x.stride(), x.storage_offset(), x.dtype) if isinstance(x, torch.Tensor) else x

        key = repr((target, map_aggregate((args, kwargs), described)))
        if key not in self._known:
            result = super().call_function(target, args, kwargs)
            self._known[key] = result, {id(x): viewed(x, given) for x in tensors(result)}
        result, bases = self._known[key]
        made: dict[int, torch.Tensor] = {}

        def again(x: Any) -> Any:
            """The same in memory of its own, or in that of the input that it looks at."""
            if not isinstance(x, torch.Tensor):
                return x
            if (index := bases[id(x)]) is not None:
                memory = given[index]
            else:
                elements = x.untyped_storage().nbytes() // x.itemsize
                memory = made.setdefault(address(x), torch.empty(elements, dtype=x.dtype, device="meta"))
            return memory.as_strided(x.shape, x.stride(), x.storage_offset())

        return map_aggregate(result, again)


def tensors(result: Any) -> list[torch.Tensor]:
    """Those among the results of an operator."""
    return [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]


def viewed(result: torch.Tensor, given: Iterable[Any]) -> int | None:
    """Which of its inputs an operator only looked at in another way."""
    return next((i for i, x in enumerate(given) if isinstance(x, torch.Tensor) and address(x) == address(result)), None)


def address(x: torch.Tensor) -> int:
    """Equal for tensors that share memory."""
    return x.untyped_storage()._cdata


def inputs_on_meta(model: ModelConfig, dtype: Dtype, sizes: Sizes, build: BuildConfig) -> list[torch.Tensor]:
    """The network's inputs at these sizes."""
    architecture = architecture_of(model)
    return [
        torch.empty(
            shape_of(x, model, sizes, build.vae_scale_factor),
            dtype=TORCH_DTYPES[input_dtype(x, dtype)], device="meta",
        )
        for x in architecture.inputs_of(model, build)
    ]  # fmt: skip
