"""Reading a checkpoint folder: ours, or one that TensorRT-LLM (<= 1.2.1) wrote."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..config import ARCHITECTURE, Dtype, Mapping, ModelConfig, TpLayout
from ..network.plan import PLANS, local_shape
from .manifest import CONFIG_FILE, FORMAT_VERSION, OWN_KEY, known_keys, rank_file
from .shapes import expected_shapes, first_fault
from .source import read_json
from .tensor_file import CODES, StoredTensor, read_header, sha256_of


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files are all there and fit its config."""

    folder: Path
    model: ModelConfig
    dtype: Dtype
    mapping: Mapping
    tp_layout: TpLayout
    vae_scale_factor: int
    """Image pixels per latent pixel."""
    files: dict[str, dict[str, Any]]
    """{file: {sha256, bytes}}; empty where TensorRT-LLM wrote the folder."""
    config: dict[str, Any]
    """`config.json` as it stands."""

    @property
    def tp_size(self) -> int:
        return self.mapping.tp_size

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Checkpoint:
        """Read the config and the headers of the rank files.

        Args:
            folder: as `convert` writes it, or as TensorRT-LLM's converter did.
            verify: also read every file through and compare its checksum.

        Raises:
            ValueError: in one line, naming the first thing that does not fit.
        """
        folder = Path(folder).expanduser()
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"{folder} is not a checkpoint folder: it has no {CONFIG_FILE}")
        config = read_json(folder / CONFIG_FILE)
        if "pretrained_config" in config:
            raise ValueError(f"{folder} is an engine folder, not a checkpoint; `mmdit convert` writes checkpoints")
        try:
            checkpoint = _interpret(folder, config)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / CONFIG_FILE} is not a checkpoint's config ({type(error).__name__}: {error})"
            ) from None
        checkpoint._check_files()
        if verify:
            checkpoint.verify()
        return checkpoint

    def weights(self, tp_rank: int = 0) -> dict[str, torch.Tensor]:
        """The tensors of one tp rank, by name: mapped from the file, not copied."""
        if not 0 <= tp_rank < self.tp_size:
            raise ValueError(f"tp rank {tp_rank} does not exist: the checkpoint is cut for tp {self.tp_size}")
        with safe_open(self.folder / rank_file(tp_rank), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def verify(self) -> None:
        """Raises `ValueError` naming the first file that is not the one that was written."""
        for name, written in self.files.items():
            path = self.folder / name
            _check_size(path, written)
            found = sha256_of(path)
            if found != written["sha256"]:
                raise ValueError(f"{path} has changed: its sha256 is {found}, {CONFIG_FILE} says {written['sha256']}")

    def _check_files(self) -> None:
        expected = expected_shapes(self.model)
        local = {name: local_shape(name, shape, self.tp_layout, self.tp_size) for name, shape in expected.items()}
        for rank in range(self.tp_size):
            path = self.folder / rank_file(rank)
            if not path.is_file():
                raise ValueError(f"{path} is missing: the checkpoint is cut for tp {self.tp_size}")
            if path.name in self.files:
                _check_size(path, self.files[path.name])
            _check_header(path, read_header(path), local, self.dtype)


def _interpret(folder: Path, config: dict[str, Any]) -> Checkpoint:
    if config["architecture"] != ARCHITECTURE:
        raise ValueError(f"{folder} holds a {config['architecture']}, not a {ARCHITECTURE}")
    if config["dtype"] not in CODES or (config.get("quantization") or {}).get("quant_algo"):
        raise ValueError(f"{folder} is quantised or of dtype {config['dtype']}; {', '.join(CODES)} can be read")
    model = ModelConfig.parse({key: config[key] for key in ModelConfig.model_fields}, str(folder / CONFIG_FILE))
    if unknown := sorted(config.keys() - known_keys(model)):
        warnings.warn(f"{folder / CONFIG_FILE}: unknown keys are kept but not used: {', '.join(unknown)}", stacklevel=3)
    own = config.get(OWN_KEY) or {}
    if own.get("format_version", 1) > FORMAT_VERSION:
        raise ValueError(f"{folder} has format {own['format_version']}; this version reads up to {FORMAT_VERSION}")
    sizes = {key: config["mapping"][key] for key in ("tp_size", "cp_size")} | {"cfg_size": own.get("cfg_size", 1)}
    mapping = Mapping.parse(sizes, f"{folder / CONFIG_FILE}: mapping")
    layout = own["tp_layout"] if own else ("trtllm" if mapping.tp_size > 1 else "megatron")
    if layout not in PLANS:
        raise ValueError(f"{folder / CONFIG_FILE}: tp_layout {layout} is not one of {', '.join(PLANS)}")
    mapping.check(model, tp_layout=layout)
    scale = own.get("vae_scale_factor", 8)
    return Checkpoint(folder, model, config["dtype"], mapping, layout, scale, own.get("files", {}), config)


def _check_size(path: Path, written: dict[str, Any]) -> None:
    found = path.stat().st_size if path.is_file() else 0
    if found != written["bytes"]:
        raise ValueError(f"{path} has changed: expected {written['bytes']} bytes, found {found}")


def _check_header(path: Path, found: dict[str, StoredTensor], local: dict[str, tuple[int, ...]], dtype: Dtype) -> None:
    fault = first_fault({name: tensor.shape for name, tensor in found.items()}, local)
    if fault is not None:
        raise ValueError(f"{path}: {fault}")
    for name, tensor in found.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{path}: tensor '{name}' is {tensor.code}, its config says {dtype}")
