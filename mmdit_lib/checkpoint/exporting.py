"""`export`: from a checkpoint folder back to a diffusers transformer."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from ..files import complete_folder, require_space
from .diffusers_folder import SHARD_BYTES, describe_folder, is_own_folder
from .folder import Checkpoint
from .rank_files import RankFiles
from .tensor_file import TensorFileWriter


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
    if checkpoint.quantization.quant_algo:
        raise ValueError(
            f"{checkpoint_dir} is quantized ({checkpoint.quantization.quant_algo}), and diffusers' format has no "
            "scales: export a checkpoint that was converted without --quantization"
        )
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
