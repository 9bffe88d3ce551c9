"""The record through which checkpoint, engine, runner and parallel see a model. They know no other fact about it.

A model is a package (`sd3`) that fills in one `Architecture`, and a line in `models.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .config import BuildConfig, Config, Layout, TpLayout
from .network.module import Module
from .network.network import Tensor
from .network.tensor_parallel import Sharding

Shapes = Mapping[str, tuple[int, ...]]


class ModelConfig(Config, ABC):
    """The fields of a transformer's diffusers config; a subclass lists them."""

    @classmethod
    @abstractmethod
    def from_diffusers(cls, config: dict[str, Any]) -> ModelConfig:
        """From a transformer's `config.json`. Raises `ValueError`, in one line."""

    @abstractmethod
    def to_diffusers(self) -> dict[str, Any]: ...

    @abstractmethod
    def to_trtllm(self, model_path: str) -> dict[str, Any]:
        """The model's keys of TensorRT-LLM's `config.json`, in its order."""

    @abstractmethod
    def summary(self) -> str:
        """The model in a few words."""

    @abstractmethod
    def check_layout(self, layout: Layout) -> None:
        """Raises `ValueError`, naming the legal sizes, if the model cannot be spread this way."""

    @abstractmethod
    def default_side(self, vae_scale_factor: int) -> int:
        """Image pixels of the side that the model was made for."""

    @abstractmethod
    def pixel_step(self, vae_scale_factor: int) -> int:
        """What the sides of an image, in pixels, must be multiples of."""

    @abstractmethod
    def max_side(self, vae_scale_factor: int) -> int:
        """The longest side, in image pixels, that the model can take."""


@dataclass(frozen=True)
class Input:
    """A tensor that enters an engine, or leaves it.

    Attributes:
        shape: one size per dimension: a name, or a name divided by another ('height/vae_scale_factor'). Names are
            those of `config.Sizes` (dynamic) and of the model config's fields (static).
        dtype: None for the network's.
        uniform: sample values are uniform in [0, `uniform`); None for a unit normal.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str | None = None
    uniform: float | None = None


class SingleFile(NamedTuple):
    """A model's original single-file checkpoint."""

    prefix: str
    """Of the transformer's tensors."""
    marker: str
    """Tensor names that begin so, after the prefix, identify the layout."""
    to_diffusers: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    """diffusers' conversion; it must move whole rows only, and pop what it uses."""


class Keys(Protocol):
    """The two-way table between diffusers' tensor and module names and ours. Both raise `ValueError`."""

    def from_diffusers(self, name: str) -> str: ...
    def to_diffusers(self, name: str) -> str: ...


class Reference(Protocol):
    """diffusers' transformer, to compare with."""

    def load(
        self, path: str, dtype: torch.dtype, *, variant: str | None, revision: str | None, config: ModelConfig | None
    ) -> torch.nn.Module:
        """`path`: a folder, a hub id, or, with `config`, a single file."""

    def outputs(
        self, reference: torch.nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[dict[str, list[torch.Tensor]], dict[str, str]]:
        """Every module's outputs by our path, in the order in which the modules finish; what is left out, and why."""


class Pipelines(Protocol):
    """What is special about the model's diffusers pipelines."""

    TEXT_ENCODERS: tuple[str, ...]
    """Components of the pipeline."""
    ENCODER_OPTIONS: tuple[str, ...]
    """Options of a pipeline's call that belong to its text encoders."""

    def default_class(self) -> type: ...
    def adapt(self, pipe, config: ModelConfig) -> None:
        """Give a pipeline that was loaded without a transformer what it would have read from one."""

    def check_arguments(self, arguments: dict[str, Any]) -> None:
        """Raises `ValueError`, by name, for an argument of the transformer that an engine does not support."""

    def encode(self, pipe, prompt, *, generator, latents, options: dict, encoding: dict) -> dict[str, torch.Tensor]:
        """Run the text encoders and draw the noise: arguments of the pipeline's call."""

    def decode(self, pipe, latents: torch.Tensor) -> list:
        """Latents -> PIL images."""


@dataclass(frozen=True)
class Architecture:
    """A model.

    Attributes:
        name: diffusers' class; `architecture` in TensorRT-LLM's config.json.
        config: the class of its config.
        known_models: configs of published models, by the last part of their hub id.
        module: the root of its module tree.
        define: adds the whole network: config, inputs by name, build options -> output.
        inputs: of the network, in the order of the transformer's arguments.
        output: of the network.
        shardings: its tensor-parallel tables.
        keys: names of tensors and modules.
        infer_config: the config that tensor shapes imply; what no tensor shows is taken from the second argument.
            Raises `ValueError`.
        single_file: the layout of its original checkpoints.
        blocks: path of the list of repeated blocks.
        vae_scale_factor: image pixels per latent pixel of the published models.
    """

    name: str
    config: type[ModelConfig]
    known_models: Mapping[str, ModelConfig]
    module: Callable[[ModelConfig], Module]
    define: Callable[[ModelConfig, dict[str, Tensor], BuildConfig], Tensor]
    inputs: tuple[Input, ...]
    output: Input
    shardings: Mapping[TpLayout, Sharding]
    keys: Keys
    infer_config: Callable[[Shapes, ModelConfig | None], ModelConfig]
    single_file: SingleFile
    reference: Reference
    pipelines: Pipelines
    blocks: str
    vae_scale_factor: int

    def parameters(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name and full shape of every checkpoint tensor, in the order of definition."""
        return self.module(config).named_parameters()

    def local_parameters(self, config: ModelConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in one tp rank's file."""
        return self.shardings[layout.tp_layout].local_shapes(self.parameters(config), layout.tp_size)
