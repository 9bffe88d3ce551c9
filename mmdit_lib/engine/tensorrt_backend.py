"""The `tensorrt` backend: runs a plan. Written against TensorRT 11's API; not yet run on a GPU."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.manifest import CONFIG_FILE
from ..config import TORCH_DTYPES
from ..network.trt import dtype_name, installed, trt
from . import trtllm
from .backend import Inputs, Ranks, RunnerOptions
from .capability import plan_runs_here, refused_fp8
from .cuda_graph import GraphedStep
from .device import current, numbered
from .folder import TRTLLM, EngineFolder, graph_file, plan_file
from .graph import Graph
from .logger import layer_timer, logger
from .refit import refit
from .rehearsal import meta_weights, rehearse


class TensorRTBackend:
    """Deserializes one rank's plan and runs it on torch's current stream.

    Args:
        plan: the `rank{r}.engine` file.
        device: the CUDA device to run on.
        communicator: the `ncclComm_t` of all ranks as a capsule, for a plan with collectives. Setting
            it is collective: every rank must construct its backend at the same time.
        cuda_graph: capture one CUDA graph per set of input shapes and replay it; the last 8 sets are kept.
        graph: reads the network that the plan was built from; None if the plan cannot be refitted.

    Raises:
        ValueError: in one line, if TensorRT cannot deserialize the plan.
    """

    name = "tensorrt"
    modules: Mapping[str, tuple[str, ...]] = {}

    def __init__(
        self,
        plan: Path,
        *,
        device: torch.device | str = "cuda",
        communicator=None,
        cuda_graph: bool = False,
        graph: Callable[[], Graph] | None = None,
    ):
        self.device = numbered(device)
        self._buffers: dict[tuple, dict[str, torch.Tensor]] = {}
        self._contexts: dict[tuple | None, object] = {}
        self._communicator = communicator
        self._graphed = cuda_graph
        self._graph = graph
        self._start_steps()
        with current(self.device):
            self.engine = self._deserialize(plan)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        (self.output,) = set(names) - set(self.inputs)
        self.dtypes = {name: TORCH_DTYPES[dtype_name(self.engine.get_tensor_dtype(name))] for name in names}

    @staticmethod
    def refusal(folder: EngineFolder, device: torch.device) -> str | None:
        if folder.plan_options.strip_plan:
            return "the plan was built with strip_plan and has no weights: refit it first, or build again"
        return refusal(folder.tensorrt, device) or without_fp8(folder, device)

    @classmethod
    def open(cls, folder: EngineFolder, options: RunnerOptions, team: Ranks | None = None) -> TensorRTBackend:
        plan = plan_file(team.rank if team else 0)
        why_not = cls.refusal(folder, options.torch_device)
        if why_not:
            raise ValueError(f"{plan} cannot run here: {why_not}")
        if options.compile:
            raise ValueError(
                "compile is an option of the pytorch backend: use --backend pytorch (backend='pytorch' in Python)"
            )
        if not options.trust:
            check_trust(folder, plan)
        own_communicators = folder.builder == "trtllm"
        if own_communicators:
            trtllm.load_plugins()
        return cls(
            folder.path / plan,
            device=options.torch_device,
            communicator=team.nccl_communicator() if team and not own_communicators else None,
            cuda_graph=options.cuda_graph,
            graph=partial(_graph, folder, team.rank if team else 0, options.verify) if refittable(folder) else None,
        )

    def _start_steps(self) -> None:
        """Start without contexts, buffers and captured CUDA graphs."""
        self._contexts.clear()
        self._buffers.clear()
        self._step = GraphedStep(self._run, forget=self._forget) if self._graphed else self._run

    def _deserialize(self, plan: Path):
        self.runtime = trt.Runtime(logger())
        with open(plan, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self.runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise ValueError(f"{plan.name} cannot run here: {logger().last_error()}")
        return engine

    def __call__(self, inputs: Inputs, timesteps: torch.Tensor | None = None) -> torch.Tensor:
        with current(self.device):
            return self._step(inputs)

    def intermediates(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        raise ValueError("intermediates: the tensorrt backend keeps none; open the engine with backend='pytorch'")

    def replace_weights(self, names: Collection[str], read: Callable[[str], torch.Tensor]) -> None:
        """As `Backend.replace_weights`, by refitting the plan; CUDA graphs are captured again."""
        if self._graph is None:
            raise ValueError(
                "the plan's weights cannot be replaced, because it was built without --refit: build it again with "
                "--refit, or use the pytorch backend"
            )
        with current(self.device):
            torch.cuda.synchronize(self.device)
            try:
                refit(self.engine, self._graph(), names, read)
            finally:
                self._start_steps()

    def profile(self, inputs: Inputs, repeats: int) -> dict[str, float]:
        """As `Backend.profile`; TensorRT names a fused layer after the layers that it consists of."""
        with current(self.device):
            timer, context = layer_timer(), self._new_context()
            self._execute(context, inputs)  # warm-up
            context.profiler = timer
            for _ in range(repeats):
                self._execute(context, inputs)
        return {name: ms / repeats for name, ms in timer.ms.items()}

    def _new_context(self):
        context = self.engine.create_execution_context()
        if context is None:
            raise ValueError(f"no execution context: {logger().last_error()}")
        if self._communicator is not None:
            context.set_communicator(self._communicator)
        return context

    def _context(self, shapes: tuple):
        """One context for all shapes, or one per set of shapes if CUDA graphs are captured.

        A CUDA graph keeps using the memory and state of the context that it was captured from, so that
        context must not be used with other shapes.
        """
        key = shapes if self._graphed else None
        if key not in self._contexts:
            self._contexts[key] = self._new_context()
        return self._contexts[key]

    def _run(self, inputs: Inputs) -> torch.Tensor:
        return self._execute(self._context(self._shapes(inputs)), inputs)

    def _shapes(self, inputs: Inputs) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(inputs[name].shape) for name in self.inputs)

    def _execute(self, context, inputs: Inputs) -> torch.Tensor:
        """One execution on the current stream, in this backend's own buffers."""
        shapes = self._shapes(inputs)
        for name, shape in zip(self.inputs, shapes, strict=True):
            if not context.set_input_shape(name, shape):
                raise ValueError(f"{name} {shape} is outside the profile: {logger().last_error()}")
        if shapes not in self._buffers:
            if not self._graphed:
                self._buffers.clear()
            self._buffers[shapes] = self._allocate(context, inputs)
        buffers = self._buffers[shapes]
        for name in self.inputs:
            buffers[name].copy_(inputs[name])  # a copy: diffusers' timestep has stride 0
        for name, buffer in buffers.items():
            context.set_tensor_address(name, buffer.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise RuntimeError(f"TensorRT failed to run the plan: {logger().last_error()}")
        return buffers[self.output].clone()

    def _forget(self, inputs: Inputs) -> None:
        """Drop the context and the buffers of a CUDA graph that is no longer kept."""
        shapes = self._shapes(inputs)
        del self._contexts[shapes], self._buffers[shapes]

    def _allocate(self, context, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Buffers for inputs of these shapes and for the output, whose shape the context infers."""
        shapes = {name: tuple(inputs[name].shape) for name in self.inputs}
        shapes[self.output] = tuple(context.get_tensor_shape(self.output))
        return {name: torch.empty(s, dtype=self.dtypes[name], device=self.device) for name, s in shapes.items()}


def refusal(built_with: str | None, device: torch.device | str = "cuda") -> str | None:
    """Why a plan built with `built_with` cannot run in this process on `device`; None if it may work."""
    if built_with is None:
        return "the engine folder contains no plan: it was built with --no-plan"
    by_trtllm = built_with.startswith(TRTLLM)
    here = trtllm.installed() if by_trtllm else installed()
    if here is None and by_trtllm:
        return f"the plan was built with {built_with}, which is not installed: {trtllm.HOW_TO_INSTALL}"
    if here is None:
        return f"the plan was built with {built_with}, and no TensorRT is installed"
    if here != built_with:
        return f"the plan was built with {built_with}, and {here} is installed: build again, or install that version"
    return plan_runs_here(here.split()[0], device)


def without_fp8(folder: EngineFolder, device: torch.device) -> str | None:
    """Why the GPU cannot run a quantized plan; None if it can, or the plan is not quantized."""
    if folder.quantization.quant_algo is None:
        return None
    return refused_fp8(torch.cuda.get_device_capability(device))


def refittable(folder: EngineFolder) -> bool:
    return folder.builder == "tensorrt" and folder.plan_options.refit


def _graph(folder: EngineFolder, rank: int, verify: bool) -> Graph:
    """One rank's graph file, checked as before it is run. Raises `ValueError`."""
    graph = folder.graph(rank, verify=verify)
    weights = meta_weights(folder.architecture, folder.model, folder.layout, folder.dtype, folder.quantization)
    rehearse(folder, graph, weights, folder.layout.at(rank), folder.path / graph_file(rank))
    return graph


def check_trust(folder: EngineFolder, plan: str) -> None:
    """A plan contains code that runs when it is deserialized. Raises `ValueError` if it may not be what was built.

    It is trusted if this library wrote the folder's manifest as this user (or as root), and the plan has the checksum
    recorded there.
    """
    config = folder.path / CONFIG_FILE
    why_not = None
    if plan not in folder.files:
        why_not = f"{config} has no checksum of {plan}"
    elif config.stat().st_uid not in (os.geteuid(), 0):
        why_not = f"{config} belongs to another user"
    else:
        try:
            folder.verify(plan)
        except ValueError as error:
            why_not = str(error)
    if why_not:
        raise ValueError(f"{why_not}; a plan is code: --trust runs it anyway")
