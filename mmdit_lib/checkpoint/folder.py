"""Reading checkpoint folders, written by this library or by TensorRT-LLM (<= 1.2.1)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .. import models
from ..architecture import Architecture, ModelConfig
from ..config import Dtype, Layout, shown
from ..files import Files, read_json
from .manifest import CONFIG_FILE, CheckpointConfig, CheckpointManifest, known_keys, rank_file
from .quantization import NONE, Quantization, check_scales, stored_tensors
from .shapes import first_fault
from .tensor_file import Stored, StoredTensor, read_header


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files are complete and match its config."""

    path: Path
    architecture: Architecture
    model: ModelConfig
    dtype: Dtype
    layout: Layout
    vae_scale_factor: int
    """Image pixels per latent pixel."""
    manifest: CheckpointManifest | None
    """None if TensorRT-LLM wrote the folder."""
    config: dict[str, Any]
    """The content of `config.json`."""
    quantization: Quantization = NONE

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Checkpoint:
        """Read the config and the headers of the rank files, and check them against each other.

        Args:
            folder: written by `convert` or by TensorRT-LLM's converter.
            verify: also read every file and compare its checksum.

        Raises:
            ValueError: a one-line message naming the first mismatch.
        """
        folder = Path(folder).expanduser()
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"{folder} is not a checkpoint folder: it has no {CONFIG_FILE}")
        config = read_json(folder / CONFIG_FILE)
        if "pretrained_config" in config:
            raise ValueError(f"{folder} is an engine folder, not a checkpoint; `mmdit convert` writes checkpoints")
        checkpoint = _interpret(folder, config)
        checkpoint._check_files()
        if verify:
            checkpoint.verify()
        return checkpoint

    @property
    def files(self) -> Files:
        """Empty if TensorRT-LLM wrote the folder."""
        return self.manifest.files if self.manifest else {}

    @property
    def rank_files(self) -> list[str]:
        """One per tp rank."""
        return [rank_file(rank) for rank in range(self.layout.tp_size)]

    def weights(self, tp_rank: int = 0) -> dict[str, torch.Tensor]:
        """The tensors of one tp rank, by name, memory-mapped. Raises `ValueError` if there is no such rank."""
        if not 0 <= tp_rank < self.layout.tp_size:
            raise ValueError(f"tp rank {tp_rank} does not exist: the checkpoint has tp_size {self.layout.tp_size}")
        path = self.path / rank_file(tp_rank)
        try:
            with safe_open(path, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        check_scales(weights, path)
        return weights

    def verify(self) -> None:
        """Raises `ValueError` naming the first file whose size or checksum differs from the record."""
        for file in self.files.values():
            file.verify(self.path)

    def _check_files(self) -> None:
        stored = stored_tensors(self.architecture, self.model, self.layout, self.dtype, self.quantization)
        for name in self.rank_files:
            path = self.path / name
            if not path.is_file():
                raise ValueError(f"{path} is missing: the checkpoint has tp_size {self.layout.tp_size}")
            if name in self.files:
                self.files[name].check_size(self.path)
            _check_header(path, read_header(path), stored)


def _interpret(folder: Path, config: dict[str, Any]) -> Checkpoint:
    where = folder / CONFIG_FILE
    content = CheckpointConfig.parse(config, f"{where} is not the config of a checkpoint")
    architecture = models.find(content.architecture, folder)
    content.check_dtype(folder)
    model = architecture.config.parse_known(config, where)
    if unknown := sorted(config.keys() - known_keys(architecture, model)):
        warnings.warn(f"{where}: unknown keys are kept but ignored: {shown(unknown)}", stacklevel=3)
    own, sizes = content.mmdit_lib, content.mapping.model_dump()
    # With one tp rank, both layouts give the same files.
    tp_layout = own.tp_layout if own else ("trtllm" if content.mapping.tp_size > 1 else "megatron")
    options = {"tp_layout": tp_layout, "cfg_size": own.cfg_size if own else 1}
    layout = Layout.parse(sizes | options, f"{where}: mapping")
    model.check_layout(layout)
    scale = own.vae_scale_factor if own else architecture.vae_scale_factor
    checkpoint = Checkpoint(folder, architecture, model, content.dtype, layout, scale, own, config, content.quantized)
    if own and set(own.files) != set(checkpoint.rank_files):
        raise ValueError(
            f"{where}: mmdit_lib.files: expected records of {', '.join(checkpoint.rank_files)}, "
            f"found {shown(list(own.files))}"
        )
    return checkpoint


def _check_header(path: Path, found: dict[str, StoredTensor], stored: dict[str, Stored]) -> None:
    fault = first_fault(*({name: tensor.shape for name, tensor in tensors.items()} for tensors in (found, stored)))
    if fault is not None:
        raise ValueError(f"{path}: {fault}")
    for name, tensor in found.items():
        if tensor.dtype != stored[name].dtype:
            raise ValueError(f"{path}: tensor '{name}' is {tensor.code}, its config says {stored[name].dtype}")
