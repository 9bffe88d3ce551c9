"""Random transformers of any size in diffusers' layout: to time conversions and builds, and to test them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from ..config import ARCHITECTURE, Dtype, ModelConfig
from .keys import to_diffusers
from .shapes import Shapes, expected_shapes
from .tensor_file import TensorFileWriter

SHARD_BYTES = 4_000_000_000
DRAWN_AT_A_TIME = 1 << 22


def write_random_transformer(
    folder: str | Path, config: ModelConfig, dtype: Dtype = "float16", seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write `config.json` and safetensors, sharded as diffusers does, with every weight drawn anew.

    Weights have a deviation of 1 / sqrt(inputs), so that activations stay near unit size at any width.

    Args:
        folder: a transformer folder to make; weights there already are written over.
        config: one of `KNOWN_MODELS`, or any other.
        dtype: of the weights.
        seed: the same gives the same bytes.
        shard_bytes: the most that one file may hold (a larger tensor gets a file of its own).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"_class_name": ARCHITECTURE, **config.to_diffusers()}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    shapes = {to_diffusers(name): shape for name, shape in expected_shapes(config).items()}
    shards = list(_shards(shapes, shard_bytes // getattr(torch, dtype).itemsize))
    stem = "diffusion_pytorch_model"
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    for file, shard in zip(names, shards, strict=True):
        with TensorFileWriter(folder / file, dtype, shard) as writer:
            for name, shape in shard.items():
                writer.write(name, _draw(name, shape, getattr(torch, dtype), generator))
            writer.finish()
    return folder


def _shards(shapes: Shapes, limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Runs of tensors with at most `limit` elements together."""
    shard, size = {}, 0
    for name, shape in shapes.items():
        if shard and size + math.prod(shape) > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += math.prod(shape)
    yield shard


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if name == "pos_embed.pos_embed":
        mean, deviation = 0.0, 0.7  # as sines and cosines have
    elif name.endswith("bias"):
        mean, deviation = 0.0, 0.02
    elif len(shape) == 1:
        mean, deviation = 1.0, 0.02  # norms
    else:
        mean, deviation = 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    tensor = torch.empty(shape, dtype=dtype)
    # Drawn in float32, blockwise: twice as fast as in half precision, and in little memory.
    for block in tensor.view(-1).split(DRAWN_AT_A_TIME):
        block.copy_(torch.empty(block.shape).normal_(mean, deviation, generator=generator))
    return tensor
