"""Refitting: new weights for a plan built with `--refit`. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from ..network.trt import dtype_name, trt, trt_dtype
from .graph import Graph, Layer
from .logger import logger
from .lowering import constant


def refit(engine, graph: Graph, names: Collection[str], read: Callable[[str], torch.Tensor]) -> None:
    """Replace checkpoint tensors in a deserialized plan, which must not be running.

    TensorRT may have combined a weight with others when it built the plan; these are then supplied too.

    Args:
        engine: the `ICudaEngine`.
        graph: the network that the plan was built from; its constants have the names of the plan's.
        names: of the tensors to replace.
        read: as in `Backend.replace_weights`.

    Raises:
        ValueError: if TensorRT rejects the weights; some of them may then be replaced.
    """
    constants = {layer.name: layer for layer in graph.layers if layer.type == "CONSTANT"}
    refitter = trt.Refitter(engine, logger())
    arrays: list[torch.Tensor] = []  # TensorRT reads them by address, until the end of `refit_cuda_engine`

    def supply(layer: Layer) -> None:
        weight = layer.attributes.get("weight")
        array = constant(layer, {weight: read(weight)} if weight else {}).contiguous().clone()
        arrays.append(array)
        weights = trt.Weights(trt_dtype(dtype_name(array.dtype)), array.data_ptr(), array.numel())
        if not refitter.set_weights(layer.name, trt.WeightsRole.CONSTANT, weights):
            raise ValueError(f"TensorRT rejected new weights for '{layer.name}': {logger().last_error()}")

    for layer in constants.values():
        if layer.attributes.get("weight") in names:
            supply(layer)
    missing, _ = refitter.get_missing()
    for name in missing:
        if name not in constants:
            raise ValueError(f"TensorRT asks for the weights of '{name}', which is not in the graph file")
        supply(constants[name])
    if not refitter.refit_cuda_engine():
        raise ValueError(f"TensorRT could not refit the plan: {logger().last_error()}")
