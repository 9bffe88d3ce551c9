"""`convert`: from a diffusers transformer to a checkpoint folder with `config.json` and one file per tp rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from ..architecture import ModelConfig
from ..config import DTYPES, Dtype, Layout, TpLayout
from ..files import complete_folder, require_place, require_space, write_synced
from ..files.records import Files, to_json
from ..models import architecture_of
from .hub import resolve_model
from .lora import Lora, fuse, open_loras
from .lora_source import GivenLora
from .manifest import CONFIG_FILE, FORMAT_VERSION, checkpoint_config, is_checkpoint, loras_entry, rank_file, versions
from .source import Source, find_source
from .stored import stored_tensors
from .tensor_file import TensorFileWriter

CAST_BLOCK = 1 << 24
"""Elements cast and checked at a time, to bound memory."""


def convert(
    model_path: str | Path,
    output_dir: str | Path = "tllm_checkpoint",
    *,
    dtype: Literal["auto", Dtype] = "auto",
    tp_size: int = 1,
    cp_size: int = 1,
    cfg_size: int = 1,
    tp_layout: TpLayout = "megatron",
    variant: str | None = None,
    revision: str | None = None,
    loras: Sequence[GivenLora] = (),
    progress: bool = True,
) -> Path:
    """Convert the transformer of a Stable Diffusion 3 or 3.5 checkpoint to a rank-sharded checkpoint folder.

    Weights pass through memory one tensor at a time. The folder appears only when it is complete,
    and then replaces an older checkpoint of that name.

    Args:
        model_path: a diffusers pipeline folder, a `transformer` folder, a safetensors file in diffusers' or in
            Stability AI's original layout, a hub id, or tiny (the small model that ships with the package).
        output_dir: the folder to write.
        dtype: dtype of the weights; auto keeps the source's.
        tp_size: ranks over which tensor parallelism shards the weights.
        cp_size: ranks of context parallelism; they use the same file as their tp rank.
        cfg_size: 2 to run the conditional and the unconditional pass on different ranks.
        tp_layout: megatron, or trtllm to shard as TensorRT-LLM does; both are the same if tp_size is 1.
        variant: variant of the weight files, for instance fp16.
        revision: branch, tag or commit of a hub id.
        loras: LoRAs to fuse into the weights. Each is PATH:SCALE, or in Python (path, scale); the scale defaults to 1.
            PATH is a safetensors file, a folder or a hub id (owner/name or owner/name/FILE.safetensors).
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: before anything is written, if source, config and options do not match; while writing, if the
            disk is full or a weight overflows `dtype`, and then no partial output remains.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype}: use auto, {', '.join(DTYPES)}")
    sizes = {"tp_size": tp_size, "cp_size": cp_size, "cfg_size": cfg_size, "tp_layout": tp_layout}
    layout = Layout.parse(sizes, "parallel layout")
    output = Path(output_dir).expanduser()
    require_place(output, "checkpoint", is_checkpoint)  # before a long download

    @cache
    def checked(model: ModelConfig) -> tuple[Lora, ...]:
        model.check_layout(layout)
        return open_loras(loras, architecture_of(model), model)

    source = find_source(resolve_model(model_path), variant, revision, checked)
    fused = checked(source.model)
    dtype = source.dtype if dtype == "auto" else dtype
    with complete_folder(output, "checkpoint", is_checkpoint) as partial:
        files = _write_ranks(source, partial, dtype, layout, fused, progress)
        own = {
            "format_version": FORMAT_VERSION,
            "tp_layout": tp_layout,
            "cfg_size": cfg_size,
            "source": str(model_path),
            "revision": source.revision,
            "variant": variant,
            "source_dtype": source.dtype,
            "vae_scale_factor": source.vae_scale_factor,
            "versions": versions(),
            **loras_entry(lora.record for lora in fused),
            "files": to_json(files),
        }
        config = checkpoint_config(source.architecture, source.model, dtype, layout, str(model_path), own)
        write_synced(partial / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    return output


def _write_ranks(
    source: Source, folder: Path, dtype: Dtype, layout: Layout, loras: tuple[Lora, ...], progress: bool
) -> Files:
    """Read every tensor once, fuse the LoRAs into it, and write each tp rank's part to that rank's file."""
    architecture, tensors, tp_size = source.architecture, source.tensors, layout.tp_size
    sharding = architecture.shardings[layout.tp_layout]
    stored = stored_tensors(architecture, source.model, layout, dtype)
    buffer = torch.empty(max(t.nbytes for t in tensors.values()), dtype=torch.uint8)
    total = sum(t.nbytes for t in tensors.values())
    with ExitStack() as stack:
        paths = [folder / rank_file(rank) for rank in range(tp_size)]
        writers = [stack.enter_context(TensorFileWriter(path, stored)) for path in paths]
        require_space(folder, sum(w.nbytes for w in writers))
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not progress))
        for name in architecture.parameters(source.model):
            tensor = fuse(name, tensors[name].read_into(buffer), loras)
            tensor = cast(tensor, dtype, architecture.keys.to_diffusers(name))
            for rank, writer in enumerate(writers):
                writer.write(name, sharding.shard(name, tensor, tp_size, rank))
            bar.update(tensors[name].nbytes)
        return {path.name: writer.finish() for path, writer in zip(paths, writers, strict=True)}


def cast(tensor: torch.Tensor, dtype: Dtype, name: str) -> torch.Tensor:
    """Cast `tensor` to `dtype`. Raises `ValueError` if a value overflows."""
    target = getattr(torch, dtype)
    if tensor.dtype == target:
        return tensor
    result = torch.empty(tensor.shape, dtype=target)
    for block, out in zip(tensor.view(-1).split(CAST_BLOCK), result.view(-1).split(CAST_BLOCK), strict=True):
        out.copy_(block)
        if not out.isfinite().all():
            raise ValueError(_overflow(block, dtype, name))
    return result


def _overflow(block: torch.Tensor, dtype: Dtype, name: str) -> str:
    if not block.isfinite().all():
        return f"tensor '{name}' contains values that are not finite"
    most = torch.finfo(getattr(torch, dtype)).max
    advice = "bfloat16 or float32" if dtype == "float16" else "float32"
    return (
        f"tensor '{name}' reaches {block.abs().max():.6g}, more than {dtype} can represent ({most:.6g}): "
        f"use --dtype {advice}"
    )
