"""LoRAs: low-rank updates of a model's weights, checked against the model and fused in float32.

W becomes W + scale * scaling * B A, with A [rank, in] and B [out, rank]. With DoRA's magnitude m [out], each row is
then multiplied by m / its norm. LoRAs are fused one after the other, as PEFT's `merge` does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..architecture import Architecture, LoraKey, ModelConfig
from ..files.records import sha256_of
from .lora_changes import Change, changes_of, read
from .lora_source import GivenLora, find_lora, with_scales
from .manifest import LoraRecord
from .peft_config import PeftConfig
from .tensor_file import read_header_and_metadata

log = logging.getLogger("mmdit_lib")


@dataclass(frozen=True)
class Lora:
    """A LoRA file that fits a model.

    Attributes:
        record: what a manifest records about it.
        changes: by our names of the modules.
        left_out: number of the file's tensors that are for text encoders.
    """

    record: LoraRecord
    changes: dict[str, Change]
    left_out: int

    @classmethod
    def open(cls, source: str | Path, scale: float, architecture: Architecture, model: ModelConfig) -> Lora:
        """Read a LoRA and check it against the model.

        Args:
            source: see `find_lora`.
            scale: multiplies the update, as in diffusers' `fuse_lora(lora_scale=scale)`.

        Raises:
            ValueError: one line that names the first tensor that is unknown, missing, of the wrong shape or not finite.
        """
        if not math.isfinite(scale):
            raise ValueError(f"LoRA {source}: scale {scale}: give a finite number")
        path, revision = find_lora(source)
        tensors, metadata = read_header_and_metadata(path)
        config = PeftConfig.read(path, metadata, architecture.lora_keys.PREFIXES)
        try:
            keys = _parsed(tensors, architecture, model)
            ours = {name: key for name, key in keys.items() if key is not None}
            if not ours:
                raise ValueError("no tensors for the transformer")
            changes = changes_of(tensors, ours, config, architecture, model)
            for name in ours:
                if not read(tensors[name]).isfinite().all():
                    raise ValueError(f"tensor '{name}' contains NaN or infinity")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        origin = {"source": str(source), "file": path.name, "revision": revision, "sha256": sha256_of(path)}
        record = LoraRecord.parse(origin | {"scale": scale}, f"LoRA {source}")
        return cls(record, changes, len(keys) - len(ours))

    def names(self) -> set[str]:
        """The weights and biases that it changes, by our names."""
        return {f"{module}.{kind}" for module, change in self.changes.items() for kind in change.kinds()}

    def fused(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The full tensor `name` with the LoRA fused, in float32; unchanged if the LoRA does not affect it.

        May overwrite `tensor`."""
        module, _, kind = name.rpartition(".")
        change = self.changes.get(module)
        if change is None or kind not in change.kinds():
            return tensor
        tensor = tensor.float()
        change.fuse(kind, tensor, self.record.scale)
        if not tensor.isfinite().all():
            raise ValueError(f"LoRA {self.record}: '{name}' contains NaN or infinity after fusing")
        return tensor


def _parsed(names: Iterable[str], architecture: Architecture, model: ModelConfig) -> dict[str, LoraKey | None]:
    """What each tensor is for. Raises `ValueError` naming the first unknown tensor, with the number of others."""
    keys, faults = {}, []
    for name in names:
        try:
            keys[name] = architecture.lora_keys.parse(name, model)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))
    return keys


def open_loras(loras: Iterable[GivenLora], architecture: Architecture, model: ModelConfig) -> tuple[Lora, ...]:
    """Open LoRAs, and warn of tensors for text encoders. Raises `ValueError`."""
    opened = tuple(Lora.open(*lora, architecture, model) for lora in with_scales(loras))
    for lora in opened:
        if lora.left_out:
            message = "LoRA %s: ignoring %d tensors for text encoders; only the transformer's are fused"
            log.warning(message, lora.record.source, lora.left_out)
    return opened


def fuse(name: str, tensor: torch.Tensor, loras: Sequence[Lora]) -> torch.Tensor:
    """As `Lora.fused`, with several LoRAs in this order."""
    for lora in loras:
        tensor = lora.fused(name, tensor)
    return tensor
