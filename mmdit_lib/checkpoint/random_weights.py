"""Random weights, and random transformers of any size in diffusers' layout, for tests and benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from ..architecture import ModelConfig, Shapes
from ..config import Dtype
from ..models import architecture_of
from .source import STEM
from .tensor_file import Stored, TensorFileWriter

SHARD_BYTES = 4_000_000_000
DRAWN_AT_A_TIME = 1 << 22


def write_random_transformer(
    folder: str | Path, config: ModelConfig, dtype: Dtype = "float16", seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a transformer folder as diffusers does: `config.json` and safetensors of at most `shard_bytes` each.

    Args:
        folder: the transformer folder; existing weights are overwritten.
        config: one of `KNOWN_MODELS`, or any other.
        dtype: dtype of the weights.
        seed: the same seed gives the same bytes.
        shard_bytes: maximum size of a file (a larger tensor gets its own file).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    architecture = architecture_of(config)
    values = {"_class_name": architecture.name, **config.to_diffusers()}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    shapes = {architecture.keys.to_diffusers(n): shape for n, shape in architecture.parameters(config).items()}
    shards = list(_shards(shapes, shard_bytes // getattr(torch, dtype).itemsize))
    names = [f"{STEM}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{STEM}.safetensors"]
    else:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    for file, shard in zip(names, shards, strict=True):
        stored = {name: Stored(dtype, shape) for name, shape in shard.items()}
        with TensorFileWriter(folder / file, stored) as writer:
            for name, shape in shard.items():
                writer.write(name, draw_weight(name, shape, generator, getattr(torch, dtype)))
            writer.finish()
    return folder


def _shards(shapes: Shapes, limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Groups of consecutive tensors with at most `limit` elements in total."""
    shard, size = {}, 0
    for name, shape in shapes.items():
        if shard and size + math.prod(shape) > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += math.prod(shape)
    yield shard


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
