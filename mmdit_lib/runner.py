"""The runner: an engine as `pipe.transformer`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import torch

from . import parallel
from .checkpoint.lora_source import GivenLora
from .checkpoint.manifest import LoraRecord
from .config import TORCH_DTYPES
from .engine.adapters import Adapters
from .engine.backend import Backend, RunnerOptions
from .engine.backends import choose_backend
from .engine.finite import FiniteCheck
from .engine.folder import EngineFolder
from .engine.inputs import check_names, check_shapes, default_inputs, input_dtype

log = logging.getLogger("mmdit_lib")

SLOW = 10
"""A step that takes this many times as long as the one before, of the same size, hangs."""


class MMDiTRunner:
    """Takes the place of diffusers' transformer in its pipelines (text to image, img2img, inpainting).

    Attributes:
        config: diffusers' config fields, as attributes and as keys.
        backend: the backend in use; `backend.name` is 'tensorrt' or 'pytorch'.
        reason: why that backend was chosen.
        rank: this process's rank in the engine folder's layout.
        timesteps: called in each step; returns the timesteps of all steps, or None if they are unknown. `install`
            sets it to return those of the pipeline's scheduler.
    """

    def __init__(
        self,
        folder: EngineFolder,
        backend: Backend,
        reason: str,
        *,
        rank: int = 0,
        check_finite: bool = True,
        verify: bool = True,
        checkpoint_dir: str | Path | None = None,
        adapters: Adapters | None = None,
    ):
        self.folder = folder
        self.backend = backend
        self.reason = reason
        self.rank = rank
        self.check_finite = check_finite
        self.verify = verify
        self.checkpoint_dir = checkpoint_dir
        self.dtype = TORCH_DTYPES[folder.dtype]
        self.device = backend.device
        self._adapters = adapters or Adapters(folder, backend, RunnerOptions())
        self.timesteps: Callable[[], torch.Tensor | None] = lambda: None
        self._timestep = folder.architecture.conditioning[0]
        self._not_finite = FiniteCheck(late=self.device.type == "cuda")
        self._step, self._steps = 0, None
        self._sizes: dict[str, torch.Size] = {}  # of the last step
        self._seconds = [0.0, 0.0]  # of the last two

    @cached_property
    def config(self):
        # Only pipelines read it, and importing diffusers takes longer than opening a small engine.
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(self.folder.model.to_diffusers())

    def __getattr__(self, name: str):
        """What a pipeline reads from diffusers' transformer besides its config; computed once, maybe from weights.

        Also raises `AttributeError` if the attribute needs the checkpoint and it cannot be opened.
        """
        folder = vars(self).get("folder")
        if folder is None or name not in folder.architecture.pipelines.ATTRIBUTES:
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        try:
            value = folder.architecture.pipelines.ATTRIBUTES[name](folder.model, self._weights)
        except (ValueError, OSError) as error:
            raise AttributeError(f"{type(self).__name__}.{name}: {error}") from error
        setattr(self, name, value)
        return value

    def _weights(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors of this rank, memory-mapped. Raises `ValueError` if it cannot be opened."""
        tp_rank = self.folder.layout.at(self.rank).tp_rank
        checkpoint = self.folder.open_checkpoint(self.checkpoint_dir, verify=self.verify, tp_rank=tp_rank)
        return checkpoint.weights(tp_rank)

    @classmethod
    def from_engine(cls, engine_dir: str | Path, options: RunnerOptions | None = None, **changes) -> MMDiTRunner:
        """Open an engine folder; under `mpirun`, every rank opens its own part of it.

        Args:
            engine_dir: an engine folder written by `build`.
            options: how to open and run it.
            changes: individual fields of `RunnerOptions`: backend ('auto', 'tensorrt', 'pytorch'),
                checkpoint_dir, device, compile, cuda_graph, check_finite, verify, trust, heartbeat_timeout.

        Raises:
            ValueError: if the folder is damaged or incomplete, or the device or the backend cannot run here.
        """
        options = with_changes(options or RunnerOptions(), changes)
        options.check()
        if not 0 <= (options.heartbeat_timeout or 0) < math.inf:
            raise ValueError(f"heartbeat_timeout {options.heartbeat_timeout}: give seconds, or 0 for never")
        folder = EngineFolder.open(engine_dir)
        team = None
        if folder.layout.world_size > 1:
            team = parallel.join(folder, options.device, heartbeat=options.heartbeat_timeout)
            options = replace(options, device=team.device)
        backend, reason = choose_backend(folder, options.backend, options.torch_device)
        if team:
            team.agree("backend", backend.name)
        log.info("backend %s: %s", backend.name, reason)
        with parallel.doing("loading weights"):
            opened = backend.open(folder, options, team)
        table = [x.name for x in folder.inputs]
        if missing := [name for name in table if name not in opened.inputs]:
            raise ValueError(f"{folder.path} has no input {missing[0]}: build it again with this version")
        if unknown := set(opened.inputs) - set(table):
            raise ValueError(
                f"{folder.path} has an input {min(unknown)}, which {folder.architecture.name} does not have"
            )
        return cls(
            folder,
            opened,
            reason,
            rank=team.rank if team else 0,
            check_finite=options.check_finite,
            verify=options.verify,
            checkpoint_dir=options.checkpoint_dir,
            adapters=Adapters(folder, opened, options, team),
        )

    def __call__(self, *positional, **arguments):
        """One denoising step, with the arguments of diffusers' transformer.

        For SD3: hidden_states [B, C, H, W], encoder_hidden_states [B, T, J], pooled_projections [B, P], timestep
        [B] (0 to 1000, at any stride); skip_layers (numbers of blocks), block_controlnet_hidden_states ([B, N, D] for
        each block of the ControlNet), if the engine was built for them. Other arguments raise an error unless they
        are None.

        Returns:
            The prediction [B, C, H, W] in the latents' dtype, as `Transformer2DModelOutput` or, with
            `return_dict=False`, in a tuple.

        Raises:
            TypeError: for more positional arguments than diffusers' transformer has, or an argument given twice.
            ValueError: for a shape outside the engine's profile, an unsupported argument, NaN or infinity (on a GPU in
                this step of an image or the one before).
        """
        folder, special = self.folder, self.folder.architecture.pipelines
        arguments = by_name(special.ARGUMENTS, positional, arguments)
        return_dict = arguments.pop("return_dict", True)
        inputs = {tensor.name: arguments.pop(tensor.name, None) for tensor in folder.inputs}
        inputs |= special.to_inputs(arguments, folder.model, folder.build_config)
        output = self.run(inputs).to(inputs[folder.inputs[0].name].dtype)
        if not return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`inputs` by name, as for a call, on any device -> prediction [B, C, H, W] in the engine's dtype.

        Raises `ValueError` as a call does, and for an input that the engine does not have.
        """
        prepared, batch = self.prepare(inputs)
        with self._named_step(prepared):
            timesteps = self.timesteps()
            output = self.backend(prepared, timesteps)[:batch]
            if self.check_finite:
                given = {name: prepared[name] for name, value in inputs.items() if value is not None}
                self._refuse(self._not_finite({**given, "output": output}, prepared[self._timestep], timesteps))
        return output

    @property
    def adapters(self) -> list[LoraRecord]:
        """The LoRAs of the last `set_adapters`."""
        return [lora.record for lora in self._adapters.active]

    def set_adapters(self, adapters: Iterable[GivenLora]) -> None:
        """Fuse LoRAs into the engine's weights, replacing those of the previous call. Nothing is rebuilt.

        Under `mpirun`, every rank must call it. LoRAs that `convert` fused stay.

        Args:
            adapters: each as (path or hub id, scale) or 'PATH:SCALE', as for `convert`; an empty list restores the
                checkpoint's weights bit for bit.

        Raises:
            ValueError: if a LoRA cannot be read or does not fit the model, the checkpoint is not found or has changed,
                or the backend cannot replace weights. The weights stay as they were.
        """
        with parallel.doing("setting adapters"):
            self._adapters.set(adapters)

    def load_lora_adapter(self, *args, **options):
        """Called by diffusers' `load_lora_weights`. Raises `ValueError`."""
        raise ValueError("load LoRAs into an engine with pipe.transformer.set_adapters([(path, scale)])")

    def count_steps(self, steps: int | None) -> None:
        """Number the following calls from 1 to `steps` (None: unknown) in messages about a frozen rank."""
        self._step, self._steps = 0, steps

    @contextmanager
    def _named_step(self, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The first step of its size may take any time, as it may compile; others are compared with the last two."""
        self._step += 1
        sizes = {name: value.shape for name, value in inputs.items()}
        name = f"step {self._step}" + (f" of {self._steps}" if self._steps else "")
        start = time.monotonic()
        # Of two steps, because the first step of an image may end before the GPU has done its work.
        with parallel.doing(name, limit=SLOW * max(self._seconds) if sizes == self._sizes else None):
            yield
        self._sizes, self._seconds = sizes, [self._seconds[1], time.monotonic() - start]

    def intermediates(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every named value of the network, by module path or layer name.

        Raises `ValueError` as `run` does, and if the backend does not keep them.
        """
        with parallel.doing("computing every value of the network"):
            return self.backend.intermediates(self.prepare(inputs)[0])

    def prepare(self, inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
        """Check inputs against the profile; returns them on the engine's device in its dtypes, and the batch size."""
        table, cfg_size = self.folder.inputs, self.folder.layout.cfg_size
        inputs = {name: value for name, value in inputs.items() if value is not None}
        check_names(self.folder, inputs)
        sizes = check_shapes(self.folder, {name: tuple(value.shape) for name, value in inputs.items()})
        # CFG parallelism halves the batch; a single row (guidance off) is computed twice.
        odd = sizes.batch % cfg_size
        prepared = default_inputs(self.folder, sizes._replace(batch=sizes.batch + odd), self.device)
        for tensor in (x for x in table if x.name in inputs):
            dtype = TORCH_DTYPES[input_dtype(tensor, self.folder.dtype)]
            value, dim = inputs[tensor.name], tensor.batch_dim
            # Ordinary memory is read before the call returns, pinned memory perhaps later:
            # https://docs.nvidia.com/cuda/cuda-driver-api/api-sync-behavior.html
            ordinary = value.device.type == "cpu" and self.device.type == "cuda" and not value.is_pinned()
            value = value.to(self.device, dtype, non_blocking=ordinary)
            if odd and dim is not None:
                value = torch.cat([value, value.narrow(dim, -1, 1)], dim)
            # Left as a view, the timestep tells which of the scheduler's timesteps it is: see engine/schedule.py.
            prepared[tensor.name] = value if tensor.name == self._timestep else value.contiguous()
        return prepared, sizes.batch

    def _refuse(self, not_finite: Sequence[str]) -> None:
        """Raises `ValueError` if there are tensors with NaN or infinity; `not_finite` are their names."""
        if not_finite == ["output"] and self.folder.dtype == "float16":
            raise ValueError(
                "the output contains NaN or infinity: float16 overflowed in the network; convert with --dtype bfloat16"
            )
        if not_finite:
            raise ValueError(f"{' and '.join(not_finite)} contain{'s' * (len(not_finite) == 1)} NaN or infinity")

    def cache_context(self, name: str):
        """diffusers' hook for caching between steps; nothing is cached here."""
        return nullcontext()

    def save_pretrained(self, *arguments, **options) -> None:
        """What diffusers calls to save a pipeline. Raises `ValueError`: an engine is not diffusers' weights."""
        raise ValueError(
            f"save_pretrained: the transformer is the engine {self.folder.path}, which diffusers cannot save; open "
            "that folder again with load_pipeline, or write its checkpoint as diffusers' transformer with mmdit export"
        )


def by_name(names: Sequence[str], positional: Sequence[object], named: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a call by name. Raises `TypeError`, as Python does, if one is surplus or given twice."""
    if len(positional) > len(names):
        raise TypeError(f"{len(positional)} positional arguments: give at most {len(names)}, {', '.join(names)}")
    found = dict(zip(names, positional, strict=False))
    if twice := [name for name in found if name in named]:
        raise TypeError(f"got multiple values for argument '{twice[0]}'")
    return found | dict(named)


def with_changes(options: RunnerOptions, changes: Mapping[str, object]) -> RunnerOptions:
    """`options` with some fields replaced. Raises `ValueError` for an unknown name."""
    known = [field.name for field in fields(RunnerOptions)]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise ValueError(f"runner option '{unknown[0]}': use {', '.join(known)}")
    return replace(options, **changes)
