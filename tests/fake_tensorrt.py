"""A TensorRT runtime that runs no kernel: it takes a plan's tensors from a table, and copies its first input."""

from __future__ import annotations

import ctypes
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from mmdit_lib.config import TORCH_DTYPES
from mmdit_lib.engine import tensorrt_backend
from mmdit_lib.network.trt import trt, trt_dtype

LAYERS = {"transformer_blocks.0.attn/matmul + transformer_blocks.0.attn/softmax": 2.0, "{ForeignNode[proj_out]}": 1.0}
"""Milliseconds that the fake reports for each execution."""


@dataclass
class Plan:
    """What the fake engine has, and what was done with it.

    Attributes:
        tensors: name -> (dtype, shape with -1 for a dynamic size), the inputs and then the output.
        deserialized: the contents of the plans that were deserialized.
        seen: the inputs of the last execution, as read from the addresses that the context was given.
        refitted: the weights that were replaced, by layer.
        missing: layers whose weights the refitter asks for.
        failing: how many of the next refits fail, after they have replaced weights.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    deserialized: list[bytes] = field(default_factory=list)
    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    refitted: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    failing: int = 0

    @property
    def output(self) -> str:
        return list(self.tensors)[-1]


def install(monkeypatch, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Plan:
    """From now on every plan has these tensors and runs on the CPU."""
    plan = Plan(tensors)
    monkeypatch.setattr(trt.package, "Runtime", lambda logger: Runtime(plan))
    monkeypatch.setattr(trt.package, "Refitter", Refitter)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(tensorrt_backend, "plan_runs_here", lambda package, device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return plan


@dataclass
class Runtime:
    plan: Plan

    def deserialize_cuda_engine(self, content):
        self.plan.deserialized.append(bytes(content))
        return Engine(self.plan)


class Engine:
    def __init__(self, plan: Plan):
        self.plan = plan
        self.names = list(plan.tensors)
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, i):
        return self.names[i]

    def get_tensor_mode(self, name):
        return trt.TensorIOMode.OUTPUT if name == self.plan.output else trt.TensorIOMode.INPUT

    def get_tensor_dtype(self, name):
        return trt_dtype(self.plan.tensors[name][0])

    def create_execution_context(self):
        return Context(self.plan)


class Refitter:
    """Reads the weights from their addresses only when the engine is refitted."""

    def __init__(self, engine: Engine, logger):
        self.plan = engine.plan
        self.weights: dict[str, object] = {}

    def set_weights(self, layer, role, weights) -> bool:
        self.weights[layer] = weights
        return role == trt.WeightsRole.CONSTANT

    def get_missing(self):
        missing = [layer for layer in self.plan.missing if layer not in self.weights]
        return missing, [trt.WeightsRole.CONSTANT] * len(missing)

    def refit_cuda_engine(self) -> bool:
        self.plan.refitted |= {layer: torch.tensor(w.numpy()) for layer, w in self.weights.items()}
        self.plan.failing -= 1
        return self.plan.failing < 0 and not self.get_missing()[0]


class Context:
    def __init__(self, plan: Plan):
        self.plan = plan
        self.profiler = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name, shape) -> bool:
        declared = self.plan.tensors[name][1]
        self.shapes[name] = tuple(shape)
        return len(shape) == len(declared) and all(a in (-1, b) for a, b in zip(declared, shape, strict=True))

    def get_tensor_shape(self, name):
        return self.shapes[next(iter(self.plan.tensors))]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream) -> bool:
        self.plan.seen = {name: self.read(name) for name in self.shapes}
        first = next(iter(self.plan.seen.values()))
        ctypes.memmove(self.addresses[self.plan.output], first.data_ptr(), first.nbytes)
        for layer, ms in LAYERS.items() if self.profiler else ():
            self.profiler.report_layer_time(layer, ms)
        return True

    def read(self, name) -> torch.Tensor:
        dtype, shape = TORCH_DTYPES[self.plan.tensors[name][0]], self.shapes[name]
        content = bytearray(ctypes.string_at(self.addresses[name], math.prod(shape) * dtype.itemsize))
        return torch.frombuffer(content, dtype=dtype).reshape(shape)
