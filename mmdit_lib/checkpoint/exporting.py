"""`export`: from a checkpoint folder back to a diffusers transformer."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tqdm import tqdm

from ..files import complete_folder, require_space
from .diffusers_folder import SHARD_BYTES, describe_folder, is_own_folder
from .folder import Checkpoint
from .tensor_file import TensorFileWriter, read_header


def export(
    checkpoint_dir: str | Path = "tllm_checkpoint",
    output_dir: str | Path = "transformer",
    *,
    progress: bool = True,
) -> Path:
    """Write a checkpoint folder's transformer in diffusers' format, in the checkpoint's dtype and bit for bit.

    Weights pass through memory one tensor at a time. The folder appears only when it is complete,
    and then replaces an older export of that name.

    Args:
        checkpoint_dir: a checkpoint folder of `convert` or of TensorRT-LLM (<= 1.2.1), of any tp_size and layout.
        output_dir: the transformer folder to write, for `from_pretrained`.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: if the checkpoint is damaged or quantized, if its ranks differ in a tensor that they all hold,
            or if the disk is full; no partial output remains.
    """
    checkpoint = Checkpoint.open(checkpoint_dir)
    output = Path(output_dir).expanduser()
    with complete_folder(output, "exported transformer", is_own_folder) as partial:
        checkpoint.verify()
        _write_weights(checkpoint, partial, progress)
    return output


def _write_weights(checkpoint: Checkpoint, folder: Path, progress: bool) -> None:
    keys, ranks = checkpoint.architecture.keys, RankFiles(checkpoint)
    files = describe_folder(folder, checkpoint.architecture, checkpoint.model, checkpoint.dtype, SHARD_BYTES)
    require_space(folder, ranks.nbytes)
    with tqdm(total=ranks.nbytes, unit="B", unit_scale=True, desc="export", disable=not progress) as bar:
        for file, tensors in files.items():
            # Within a file, the safetensors package sorts by name: same tensors, same bytes.
            with TensorFileWriter(folder / file, dict(sorted(tensors.items()))) as writer:
                for name in sorted(tensors):
                    tensor = ranks.read(keys.from_diffusers(name))
                    writer.write(name, tensor)
                    bar.update(tensor.nbytes)
                writer.finish()


class RankFiles:
    """The full tensors of a checkpoint, read from its rank files one at a time.

    Attributes:
        nbytes: of all tensors together.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._paths = [checkpoint.path / name for name in checkpoint.rank_files]
        self._ranks = [read_header(path) for path in self._paths]
        self._sharding = checkpoint.architecture.shardings[checkpoint.layout.tp_layout]
        self._shapes = checkpoint.architecture.parameters(checkpoint.model)
        self._dtype = getattr(torch, checkpoint.dtype)
        sizes = [math.prod(shape) * self._dtype.itemsize for shape in self._shapes.values()]
        self.nbytes = sum(sizes)
        self._full, self._part = (torch.empty(max(sizes), dtype=torch.uint8) for _ in range(2))

    def read(self, name: str) -> torch.Tensor:
        """The full tensor; its memory is reused by the next call.

        Raises `ValueError` if the ranks' copies of a replicated tensor differ.
        """
        dim, parts = self._sharding.shard_dim(name), [rank[name] for rank in self._ranks]
        if dim is None or len(parts) == 1:
            full = parts[0].read_into(self._full)
            for path, part in zip(self._paths[1:], parts[1:], strict=True):
                if not _same_bits(part.read_into(self._part), full):
                    raise ValueError(
                        f"{path}: tensor '{name}' differs from the copy in {self._paths[0].name}, but in the "
                        f"{self._sharding.name} layout every tp rank holds the same tensor"
                    )
            return full
        shape = self._shapes[name]
        full = self._full[: math.prod(shape) * self._dtype.itemsize].view(self._dtype).view(shape)
        for place, part in zip(full.chunk(len(parts), dim), parts, strict=True):
            place.copy_(part.read_into(self._part))
        return full


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
