"""The `pytorch` backend: runs the network that was defined for TensorRT in PyTorch, without TensorRT."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import fx

from . import torch_ops, warm_up
from .ahead import VALUE, Ahead, split_ahead
from .attention import has_flash_attention_3
from .backend import Inputs, Ranks, RunnerOptions
from .capability import has_fp8
from .cuda_graph import GraphedStep
from .device import current, numbered
from .folder import EngineFolder, graph_file
from .fp8_passes import FP8_ATTENTION, FP8_EPILOGUES, FP8_GEMMS, FP8_KERNELS
from .graph import Graph
from .host_memory import return_freed_memory
from .inputs import draw_inputs
from .kernel_passes import KERNELS, SUMS
from .kernels import has_triton
from .lowering import lower, placed_parts, placed_weights
from .outline import outline_blocks
from .passes import NUMERICS, SPEED, Pass
from .precision import without_tf32
from .profile import layer_times
from .rank_passes import RANKS
from .rehearsal import rehearse
from .two_streams import on_one_stream_again, two_streams

log = logging.getLogger("mmdit_lib")

GPU_PASSES = NUMERICS + SPEED + KERNELS + RANKS + SUMS
"""All but those of FP8."""


class PyTorchBackend:
    """Runs one rank's graph on a CPU or a CUDA device.

    Args:
        graph: the network, as read back from TensorRT.
        weights: this rank's checkpoint tensors; on a CPU they stay memory-mapped.
        groups: process group names, by ranks, for a graph with collectives.
        compile_blocks: path of the module list whose blocks are compiled with `torch.compile`; None: no compilation.
        cuda_graph: capture and replay a CUDA graph per set of input shapes; the last 8 sets are kept.
        passes: those of `default_passes` if not given.
        conditioning: names of the inputs from which to compute for several steps at once what depends on them alone:
            the timestep, and inputs that stay the same for an image.
    """

    name = "pytorch"

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        groups: Mapping[tuple[int, ...], str] | None = None,
        compile_blocks: str | None = None,
        cuda_graph: bool = False,
        passes: tuple[Pass, ...] | None = None,
        conditioning: Sequence[str] = (),
    ):
        self.graph = graph
        self.modules = graph.modules
        self.device = numbered(device)
        self.inputs = {value.name: value for value in graph.inputs}
        if passes is None:
            passes = default_passes(self.device, compiled=compile_blocks is not None)
        self._weights, self._groups, self._passes = weights, groups, passes
        self._last_shapes: dict[str, torch.Size] = {}
        self.module = lower(graph, weights, device=self.device, groups=groups, passes=passes)
        self._module = outline_blocks(self.module, compile_blocks, torch.compile) if compile_blocks else self.module
        self._step = self._graphed(self._module) if cuda_graph else self._run
        self._ahead = None
        if parts := split_ahead(self.module, conditioning) if conditioning and compile_blocks is None else None:
            first, self._rest = parts
            # No CUDA graph, which would hold another copy of the rows.
            self._ahead = Ahead(partial(self._call, first), *conditioning)
            self._later_step = self._graphed(self._rest) if cuda_graph else partial(self._call, self._rest)

    @staticmethod
    def refusal(folder: EngineFolder, device: torch.device) -> str | None:
        return "trtllm-build wrote the folder, so it has no graph file" if folder.builder == "trtllm" else None

    @classmethod
    def open(cls, folder: EngineFolder, options: RunnerOptions, team: Ranks | None = None) -> PyTorchBackend:
        mapping = folder.layout.at(team.rank if team else 0)
        checkpoint = folder.open_checkpoint(options.checkpoint_dir, verify=options.verify, tp_rank=mapping.tp_rank)
        graph, weights = folder.graph(mapping.rank, verify=options.verify), checkpoint.weights(mapping.tp_rank)
        rehearse(folder, graph, weights, mapping, folder.path / graph_file(mapping.rank))
        if folder.dtype == "bfloat16":  # a package that does not load is refused here, not in the first step
            has_flash_attention_3(options.torch_device)
        opened = cls(
            graph,
            weights,
            device=options.torch_device,
            groups=team.groups if team else None,
            compile_blocks=folder.architecture.blocks if options.compile else None,
            cuda_graph=options.cuda_graph,
            passes=default_passes(options.torch_device, compiled=options.compile),
            conditioning=folder.architecture.conditioning if options.torch_device.type == "cuda" else (),
        )
        if opened.device.type == "cuda" and folder.build_config.fp8_attention:
            warn_if_emulated(opened.module)
        if opened.device.type == "cuda" and not options.compile and not team:
            sizes, scale = folder.build_config.sizes(1)[0], folder.build_config.vae_scale_factor
            opened.warm_up(
                draw_inputs(folder.architecture, folder.model, sizes, folder.dtype, scale, build=folder.build_config)
            )
        return opened

    def warm_up(self, inputs: Inputs) -> None:
        """Run a step in another thread, which compiles the kernels; the result is dropped."""
        warm_up.start(partial(self._warm_up, inputs))

    @torch.inference_mode()
    def _warm_up(self, inputs: Inputs) -> None:
        given = {name: value.to(self.device) for name, value in inputs.items()}
        with current(self.device):  # and TF32 as it is: its switches are the whole program's
            _run(self._module, given)

    @torch.inference_mode()
    def __call__(self, inputs: Inputs, timesteps: torch.Tensor | None = None) -> torch.Tensor:
        warm_up.wait()
        shapes = {name: value.shape for name, value in inputs.items()}
        if self.device.type == "cpu" and shapes != self._last_shapes:
            return_freed_memory()
            self._last_shapes = shapes
        if self._ahead and timesteps is not None:
            rows = self._ahead.rows(inputs, timesteps)
            if rows is not None:
                return self._later_step({**inputs, VALUE: rows})
        return self._step(inputs)

    def _run(self, inputs: Inputs) -> torch.Tensor:
        return self._call(self._module, inputs)

    def _graphed(self, module: fx.GraphModule) -> GraphedStep:
        changed = two_streams(module)

        def step(inputs: Inputs) -> torch.Tensor:
            with on_one_stream_again(self.device):
                return self._call(changed, inputs)

        return GraphedStep(partial(self._call, module) if changed is module else step)

    def _call(self, module: fx.GraphModule, inputs: Inputs) -> torch.Tensor:
        with current(self.device), without_tf32():
            return _run(module, inputs)

    @torch.inference_mode()
    def intermediates(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Every named tensor of the network, by its TensorRT name (values inside a fused operator are left out).

        The passes for speed remove many of them, so the values come from the same weights without these passes,
        and the output from the network as it runs.
        """
        warm_up.wait()
        with current(self.device), without_tf32():
            recorder = Recorder(self._plain)
            recorder.run(*(inputs[name] for name in self.inputs))
        if self._plain is not self.module:
            recorder.found |= dict.fromkeys(self.graph.outputs, self(inputs))
        return recorder.found

    @torch.inference_mode()
    def replace_weights(self, names: Collection[str], read: Callable[[str], torch.Tensor]) -> None:
        """As `Backend.replace_weights`, by copying into the memory that the operators read, merged weights included.

        Weights that are memory-mapped are private to this process: the checkpoint's files do not change.
        """
        warm_up.wait()
        for name, placed in placed_parts(self.module):
            if name in names:
                placed.copy_(read(name).reshape(placed.shape))
        if self._ahead:
            self._ahead.forget()

    @torch.inference_mode()
    def profile(self, inputs: Inputs, repeats: int) -> dict[str, float]:
        """As `Backend.profile`. On a GPU these are times of kernels, on a CPU of calls, both without graph replay."""
        if self._module is not self.module:
            raise ValueError("profile: compiled blocks have no layers that could be timed; leave out compile")
        warm_up.wait()
        arguments = [inputs[name] for name in self.inputs]
        with current(self.device), without_tf32():
            return layer_times(self.module, arguments, self.device, repeats)

    @cached_property
    def _plain(self) -> fx.GraphModule:
        if self._passes == NUMERICS:
            return self.module
        weights = {**self._weights, **placed_weights(self.module)}
        return lower(self.graph, weights, device=self.device, groups=self._groups)


def _run(module: fx.GraphModule, inputs: Inputs) -> torch.Tensor:
    return module(*(inputs[node.target] for node in module.graph.find_nodes(op="placeholder")))


def warn_if_emulated(module: fx.GraphModule) -> None:
    """Of an engine with attention in FP8: kernels in FP8 replace these operators."""
    if any(node.target in (torch_ops.attention, torch_ops.softmax) for node in module.graph.nodes):
        log.warning(
            "attention in FP8 is emulated, which is slow: the pytorch backend has a kernel for it on Hopper GPUs, with "
            "fa3-fwd and Triton, for engines in bfloat16 with heads of a multiple of 16 channels, without compile"
        )


def default_passes(device: torch.device, *, compiled: bool) -> tuple[Pass, ...]:
    """On a GPU the passes for speed too; without `torch.compile`, Triton kernels do the fusing."""
    if device.type != "cuda":
        return NUMERICS
    first, last = (FP8_GEMMS, FP8_KERNELS + FP8_EPILOGUES) if has_fp8(device) else ((), ())
    if compiled or not has_triton():
        return first + NUMERICS + SPEED
    return (FP8_ATTENTION if first and has_flash_attention_3(device) else ()) + first + GPU_PASSES + last


class Recorder(fx.Interpreter):
    """Runs a lowered graph and keeps each tensor that it computes."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.found: dict[str, torch.Tensor] = {}

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if isinstance(value, torch.Tensor) and node.op == "call_function":
            self.found[node.meta["tensor"]] = value
        return value
