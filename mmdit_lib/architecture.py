"""The record that describes a model to the rest of the library, which knows nothing else about it.

A model is a package (`sd3`) that defines one `Architecture`, and a line in `models.py`.
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
Weights = Callable[[], Mapping[str, torch.Tensor]]
"""Reads a checkpoint's tensors, by name."""


class ModelConfig(Config, ABC):
    """A transformer's diffusers config; subclasses declare the fields."""

    @classmethod
    @abstractmethod
    def from_diffusers(cls, config: dict[str, Any]) -> ModelConfig:
        """Parse a transformer's `config.json`. Raises a one-line `ValueError`."""

    @classmethod
    def parse_known(cls, values: Mapping[str, Any], where: object) -> ModelConfig:
        """Parse the fields of this class among other keys. Raises a one-line `ValueError` that names `where`."""
        return cls.parse({key: values[key] for key in cls.model_fields if key in values}, where)

    def to_diffusers(self) -> dict[str, Any]:
        return self.model_dump()

    @abstractmethod
    def to_trtllm(self, model_path: str) -> dict[str, Any]:
        """The model's keys in TensorRT-LLM's `config.json`, in the same order."""

    @abstractmethod
    def summary(self) -> str:
        """A short description of the model."""

    @abstractmethod
    def check_layout(self, layout: Layout) -> None:
        """Raises `ValueError`, naming the valid sizes, if the model does not support the layout."""

    @abstractmethod
    def default_side(self, vae_scale_factor: int) -> int:
        """The default side of an image, in pixels."""

    @abstractmethod
    def pixel_step(self, vae_scale_factor: int) -> int:
        """Image height and width must be multiples of this many pixels."""

    @abstractmethod
    def max_side(self, vae_scale_factor: int) -> int:
        """The longest supported side of an image, in pixels."""


@dataclass(frozen=True)
class Input:
    """An input or output of an engine.

    Attributes:
        shape: one size per dimension: a name, a name divided by others ('height/vae_scale_factor'), or a product of
            these ('height/patch_size*width/patch_size'). Names are those of `config.Sizes` (dynamic) and of the
            model config's attributes (static).
        dtype: None for the network's dtype.
        uniform: samples are uniform in [0, `uniform`). None: they are the default or, without one, unit normal.
        default: every element of an input that a call leaves out. None: a call must give it.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str | None = None
    uniform: float | None = None
    default: float | bool | None = None

    @property
    def batch_dim(self) -> int | None:
        """The dimension of the batch, if there is one."""
        return self.shape.index("batch") if "batch" in self.shape else None


class Kept(NamedTuple):
    """Linear layers that are not quantized: a pattern of their paths, and the reason."""

    pattern: str
    reason: str


class SingleFile(NamedTuple):
    """A model's original single-file checkpoint."""

    prefix: str
    """Prefix of the transformer's tensor names."""
    marker: str
    """A tensor name that starts with this, after the prefix, identifies the layout."""
    to_diffusers: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    """diffusers' conversion. It may only move entire rows (dim 0), and must pop the tensors it uses."""


class Keys(Protocol):
    """Maps tensor and module names between diffusers and this library. Both methods raise `ValueError`."""

    def from_diffusers(self, name: str) -> str: ...
    def to_diffusers(self, name: str) -> str: ...


class LoraKey(NamedTuple):
    """What a tensor of a LoRA file is for.

    Attributes:
        part: 'A' [rank, in], 'B' [out, rank], 'bias' [out], 'magnitude' [out] (DoRA's) or 'alpha' (a number).
        rows: the modules whose weights it changes, by diffusers' names; several for a projection that the file has
            fused. B's rows are divided into equal parts; the numbers are the module's parts, in the module's order.
    """

    part: str
    rows: dict[str, tuple[int, ...]]


class LoraKeys(Protocol):
    """Maps the names in LoRA files."""

    PREFIXES: tuple[str, ...]
    """Possible prefixes of the transformer's tensor names; keys in PEFT's config have the same ones."""

    def parse(self, key: str, config: ModelConfig) -> LoraKey | None:
        """None if the tensor belongs to a text encoder. Raises `ValueError` if it is unknown."""


class Reference(Protocol):
    """diffusers' transformer as the reference."""

    def load(
        self, path: str, dtype: torch.dtype, *, variant: str | None, revision: str | None, config: ModelConfig | None
    ) -> torch.nn.Module:
        """Load from `path`: a folder, a hub id or, with `config`, a single file."""

    def arguments(self, inputs: Mapping[str, torch.Tensor], config: ModelConfig, build: BuildConfig) -> dict[str, Any]:
        """The arguments of diffusers' transformer for an engine's inputs, without those that it does not have."""

    def outputs(
        self,
        reference: torch.nn.Module,
        inputs: Mapping[str, torch.Tensor],
        config: ModelConfig,
        build: BuildConfig,
    ) -> tuple[dict[str, list[torch.Tensor]], dict[str, str]]:
        """Every module's outputs by our path, in the order in which modules finish; the reason for each omission.

        If the reference is in float64, every output is a float64 result, also where diffusers itself uses float32.
        """


class Pipelines(Protocol):
    """The model-specific parts of its diffusers pipelines."""

    TEXT_ENCODERS: tuple[str, ...]
    """Names of the pipeline's text encoder components."""
    ENCODER_OPTIONS: tuple[str, ...]
    """Options of the pipeline's call that go to its text encoders."""
    ARGUMENTS: tuple[str, ...]
    """Names of the arguments of diffusers' transformer, in its order."""
    ADDED_COMPONENTS: tuple[str, ...]
    """Components that are not in a pipeline's folder; a user passes them with a pipeline class that accepts them."""
    ATTRIBUTES: Mapping[str, Callable[[ModelConfig, Weights], Any]]
    """What pipelines read from diffusers' transformer besides its config, from config and checkpoint tensors."""

    def default_class(self) -> type: ...
    def adapt(self, pipe, config: ModelConfig) -> None:
        """Set what a pipeline loaded without a transformer would otherwise read from its config."""

    def to_inputs(self, arguments: dict[str, Any], config: ModelConfig, build: BuildConfig) -> dict[str, torch.Tensor]:
        """The optional inputs for those arguments of diffusers' transformer that are not inputs themselves.

        Raises `ValueError` naming an argument that is invalid, or that the engine does not support.
        """

    def check_call(self, options: Mapping[str, Any], config: ModelConfig, build: BuildConfig) -> None:
        """Raises `ValueError` naming an option of the pipeline's call that the engine does not support."""

    def call_sizes(self, options: Mapping[str, Any]) -> dict[str, int]:
        """Batch and text tokens of a step, for one prompt and these options of the pipeline's call."""

    def encode(self, pipe, prompt, *, generator, latents, options: dict, encoding: dict) -> dict[str, torch.Tensor]:
        """Run the text encoders and draw the initial noise; returns arguments for the pipeline's call."""

    def decode(self, pipe, latents: torch.Tensor) -> list:
        """Latents -> PIL images."""


@dataclass(frozen=True)
class Architecture:
    """A model, as the rest of the library sees it.

    Attributes:
        name: diffusers' class; `architecture` in TensorRT-LLM's config.json.
        config: the class of its config.
        known_models: configs of published models, by the last part of their hub id.
        module: the root of its module tree.
        define: adds the full network: config, inputs by name, build options -> output.
        inputs: the inputs of every network, in the order of the transformer's arguments.
        optional_inputs: the inputs that build options add to them.
        input_options: the names of these options (fields of `BuildConfig`), by patterns of the inputs' names.
        output: the network's output.
        shardings: tensor-parallel tables by layout.
        full_precision: linear layers that are not quantized with the others.
        keys: maps tensor and module names.
        lora_keys: maps the names in LoRA files.
        infer_config: infers the config from tensor shapes; the second argument supplies what no tensor determines.
            Raises `ValueError`.
        single_file: layout of the original checkpoints.
        blocks: path of the list of repeated blocks.
        conditioning: names of the inputs that set how a step modulates all tokens: the timestep, then inputs that stay
            the same for an image.
        vae_scale_factor: image pixels per latent pixel of the published models.
    """

    name: str
    config: type[ModelConfig]
    known_models: Mapping[str, ModelConfig]
    module: Callable[[ModelConfig], Module]
    define: Callable[[ModelConfig, dict[str, Tensor], BuildConfig], Tensor]
    inputs: tuple[Input, ...]
    optional_inputs: Callable[[ModelConfig, BuildConfig], tuple[Input, ...]]
    input_options: Mapping[str, str]
    output: Input
    shardings: Mapping[TpLayout, Sharding]
    full_precision: tuple[Kept, ...]
    keys: Keys
    lora_keys: LoraKeys
    infer_config: Callable[[Shapes, ModelConfig | None], ModelConfig]
    single_file: SingleFile
    reference: Reference
    pipelines: Pipelines
    blocks: str
    conditioning: tuple[str, ...]
    vae_scale_factor: int

    def inputs_of(self, config: ModelConfig, build: BuildConfig) -> tuple[Input, ...]:
        """All inputs of a build's network."""
        return (*self.inputs, *self.optional_inputs(config, build))

    def parameters(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Name and full shape of every checkpoint tensor, in the order of definition."""
        return self.module(config).named_parameters()

    def local_parameters(self, config: ModelConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in one tp rank's file."""
        return self.shardings[layout.tp_layout].local_shapes(self.parameters(config), layout.tp_size)
