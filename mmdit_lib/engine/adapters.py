"""LoRAs in the weights of an open engine: fused into the checkpoint's weights, without a rebuild."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..checkpoint.conversion import cast
from ..checkpoint.lora import GivenLora, Lora, fuse, open_loras
from ..checkpoint.rank_files import RankFiles
from ..files import delayed_interrupts
from .backend import Backend, Ranks, RunnerOptions
from .folder import EngineFolder


class Adapters:
    """The LoRAs of one rank.

    The checkpoint folder remains the source of the weights, so no second copy is kept in memory. What a LoRA changes is
    read from there in full, and this rank's part of the result replaces the backend's weights.

    Attributes:
        active: the LoRAs that are in the weights now.
    """

    def __init__(self, folder: EngineFolder, backend: Backend, options: RunnerOptions, team: Ranks | None = None):
        self._folder, self._backend, self._options, self._team = folder, backend, options, team
        self._mapping = folder.layout.at(team.rank if team else 0)
        self._files: RankFiles | None = None
        self._stamps: list[tuple] = []
        self.active: tuple[Lora, ...] = ()

    def set(self, adapters: Iterable[GivenLora]) -> None:
        """Replace the active LoRAs; none restores the checkpoint's weights bit for bit. Every rank must call it.

        Raises:
            ValueError: if a LoRA does not fit the model, the ranks' LoRAs differ, the checkpoint has changed, or the
                backend cannot replace weights. The weights stay as they were.
        """
        loras = self._agreed(adapters)
        if loras and self._folder.quantization.quant_algo:
            raise ValueError(
                "set_adapters: the engine's weights are in FP8; fuse LoRAs when converting, before they are quantized: "
                "mmdit convert --lora PATH:SCALE --quantization fp8"
            )
        names = {name for lora in (*self.active, *loras) for name in lora.names()}
        replaced: set[str] = set()

        def read(name: str) -> torch.Tensor:
            part = self._part(name, loras)
            replaced.add(name)
            return part

        try:
            if names:
                self._backend.replace_weights(names, read)
        except BaseException:
            if replaced:
                with delayed_interrupts():
                    self._backend.replace_weights(replaced, lambda name: self._part(name, self.active))
            raise
        self.active = loras

    def _agreed(self, adapters: Iterable[GivenLora]) -> tuple[Lora, ...]:
        """Open the LoRAs. Raises `ValueError` on every rank if one rank cannot open them or the ranks' LoRAs differ."""
        try:
            loras, error = open_loras(adapters, self._folder.architecture, self._folder.model), None
        except (ValueError, OSError) as caught:
            loras, error = (), caught
        if self._team:
            records = [lora.record for lora in loras]
            found = ", ".join(f"{x.file} (scale {x.scale}, sha256 {x.sha256[:12]})" for x in records) or "none"
            self._team.agree("adapters", str(error or found))
        if error:
            raise error
        return loras

    def _part(self, name: str, loras: tuple[Lora, ...]) -> torch.Tensor:
        """This rank's part of a checkpoint tensor with these LoRAs; its memory is reused by the next call."""
        mapping, architecture = self._mapping, self._folder.architecture
        full = fuse(name, self._checkpoint().read(name), loras)
        full = cast(full, self._folder.dtype, architecture.keys.to_diffusers(name))
        return architecture.shardings[mapping.layout.tp_layout].shard(name, full, mapping.tp_size, mapping.tp_rank)

    def _checkpoint(self) -> RankFiles:
        """The checkpoint's files; opened and (if the options say so) verified again when one of them has changed."""
        if self._files is None or _stamps(self._files.paths) != self._stamps:
            checkpoint = self._folder.open_checkpoint(self._options.checkpoint_dir, verify=self._options.verify)
            self._files = RankFiles(checkpoint)
            self._stamps = _stamps(self._files.paths)
        return self._files


def _stamps(paths: list[Path]) -> list[tuple]:
    """Changes if a file is written or replaced."""
    found = [path.stat() for path in paths if path.exists()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]
