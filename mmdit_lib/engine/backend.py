"""The backend interface: running one rank of an engine folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch

from .device import usable_device
from .folder import EngineFolder

Inputs = Mapping[str, torch.Tensor]
BackendName = Literal["auto", "tensorrt", "pytorch"]


@dataclass(frozen=True)
class RunnerOptions:
    """How to open and run an engine folder."""

    checkpoint_dir: str | Path | None = None
    """the converted checkpoint, if it is no longer at its path relative to the engine folder"""
    backend: BackendName = "auto"
    """tensorrt runs the plan, pytorch the graph file with the checkpoint's tensors; auto prefers tensorrt"""
    device: str | torch.device | None = None
    """a CUDA device or cpu; by default CUDA if available"""
    compile: bool = False
    """pytorch backend: compile with `torch.compile`; on a GPU the built-in Triton kernels are faster"""
    cuda_graph: bool = False
    """replay each step as a CUDA graph; graphs are kept for the 8 most recently used sets of input shapes"""
    check_finite: bool = True
    """check every input and output for NaN and infinity; on a GPU, an error may come one step late"""
    verify: bool = True
    """verify the checksums of the files that are read"""
    trust: bool = False
    """tensorrt backend: run a plan even if its checksum is missing or differs; a plan is code"""
    heartbeat_timeout: float | None = None
    """multiple ranks: end all of them if one is frozen or unreachable for so many seconds; 0: never; by default 25"""

    @property
    def torch_device(self) -> torch.device:
        """Raises `ValueError` for a device that is neither a CPU nor a GPU of this machine."""
        return usable_device(self.device)

    def check(self) -> None:
        """Raises `ValueError` if the device cannot be used, or cannot do what the options ask for."""
        if self.torch_device.type != "cuda" and self.cuda_graph:
            raise ValueError(f"cuda_graph needs a CUDA device, but this run uses {self.torch_device}")


class Ranks(Protocol):
    """What a backend needs from the ranks that run an engine folder together (`parallel.Team`)."""

    rank: int
    groups: Mapping[tuple[int, ...], str]
    """Process group names, by ranks."""

    def agree(self, what: str, value: str) -> None:
        """Raises `ValueError` on every rank if the ranks have different values. Every rank must call it."""

    def nccl_communicator(self):
        """The `ncclComm_t` of all ranks as a capsule. Every rank must call it."""


class Backend(Protocol):
    """One rank of an engine folder, ready to run."""

    name: ClassVar[str]
    device: torch.device
    inputs: Collection[str]
    """The names of the engine's inputs."""
    modules: Mapping[str, tuple[str, ...]]
    """The names of the tensors that each module of the network returns, by module path."""

    @staticmethod
    def refusal(folder: EngineFolder, device: torch.device) -> str | None:
        """Why this backend cannot run the folder on `device`, in one line; None if it may work."""

    @classmethod
    def open(cls, folder: EngineFolder, options: RunnerOptions, team: Ranks | None = None) -> Backend:
        """Open this rank's part (`team`'s, or the only one) on `options.torch_device`. Raises `ValueError`."""

    def __call__(self, inputs: Inputs, timesteps: torch.Tensor | None = None) -> torch.Tensor:
        """`inputs` by name, on the device, in the engine's dtypes -> the output.

        `timesteps`: those of all steps, if known; a backend may compute ahead what later steps need.
        """

    def intermediates(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Every named tensor of the network, by name. Raises `ValueError` if the backend does not keep them."""

    def replace_weights(self, names: Collection[str], read: Callable[[str], torch.Tensor]) -> None:
        """Replace checkpoint tensors; later calls use the new values, also with CUDA graphs and compiled code.

        Args:
            names: of the tensors to replace.
            read: this rank's part of a tensor, by name, on the CPU; its memory is reused by the next call.

        Raises:
            ValueError: if the backend cannot replace weights; some may then be replaced already.
        """

    def profile(self, inputs: Inputs, repeats: int) -> dict[str, float]:
        """Milliseconds per call by layer, each named after its module (`module.path/layer`), the mean of `repeats`.

        Raises `ValueError` if the layers cannot be timed one by one.
        """
