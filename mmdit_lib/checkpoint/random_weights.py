"""Random weights, and random transformers of any size in diffusers' layout, for tests and benchmarks."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..architecture import ModelConfig
from ..config import TORCH_DTYPES, Dtype
from ..files import complete_folder
from ..models import architecture_of
from .diffusers_folder import SHARD_BYTES, describe_folder, is_own_folder
from .tensor_file import TensorFileWriter

DRAWN_AT_A_TIME = 1 << 22


def write_random_transformer(
    folder: str | Path, config: ModelConfig, dtype: Dtype = "float16", seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a transformer folder as diffusers does: `config.json` and safetensors of at most `shard_bytes` each.

    The folder appears only when it is complete.

    Args:
        folder: the transformer folder; replaced if this library wrote it.
        config: one of `KNOWN_MODELS`, or any other.
        dtype: dtype of the weights.
        seed: the same seed gives the same bytes.
        shard_bytes: maximum size of a file (a larger tensor gets its own file).

    Raises:
        ValueError: if `folder` contains anything else, or the disk is full.
    """
    folder, generator = Path(folder), torch.Generator().manual_seed(seed)
    with complete_folder(folder, "transformer folder", is_own_folder) as partial:
        files = describe_folder(partial, architecture_of(config), config, dtype, shard_bytes)
        for file, tensors in files.items():
            with TensorFileWriter(partial / file, tensors) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, draw_weight(name, tensor.shape, generator, TORCH_DTYPES[dtype]))
                writer.finish()
    return folder


def draw_weight(
    name: str,
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A random weight for the parameter `name`: activations stay near unit size, and each weight affects the output.

    Biases 0.3 n, norms 1 + 0.2 n, tables (position, token embeddings) 0.7 n, all others n / sqrt(fan_in), with n
    drawn from a unit normal.
    """
    mean = 0.0
    if name.endswith("bias") or "relative_attention_bias" in name:
        deviation = 0.3
    elif name.endswith(".pos_embed") or any(word in name for word in ("embedding", "shared", "embed_tokens")):
        deviation = 0.7  # about the deviation of sines and cosines
    elif len(shape) == 1:  # norms
        mean, deviation = 1.0, 0.2
    else:
        deviation = 1 / math.sqrt(math.prod(shape[1:]))
    tensor = torch.empty(shape, dtype=dtype, device=device)
    # Drawn in float32, block by block: twice as fast as in half precision, with little memory.
    for block in tensor.view(-1).split(DRAWN_AT_A_TIME):
        block.copy_(torch.empty(block.shape, device=device).normal_(mean, deviation, generator=generator))
    return tensor


@torch.no_grad()
def randomize(module: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    """Apply `draw_weight` to every parameter and persistent buffer of a module, in name order. Returns the module."""
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_floating_point():
            tensor.copy_(draw_weight(name, tuple(tensor.shape), generator, device=tensor.device))
    return module
