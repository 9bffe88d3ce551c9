"""`convert`: from a diffusers transformer to a checkpoint folder with `config.json` and one file per tp rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from ..architecture import ModelConfig
from ..config import DTYPES, TORCH_DTYPES, Dtype, Layout, TpLayout
from ..files import complete_folder, require_place, require_space, write_synced
from ..files.records import Files, to_json
from ..models import architecture_of
from .calibration import STEPS, calibrate, read_prompts, require_pipeline
from .hub import resolve_model
from .lora import Lora, fuse, open_loras
from .lora_source import GivenLora
from .manifest import CONFIG_FILE, checkpoint_config, is_checkpoint, loras_entry, rank_file, versions
from .quantization import (
    ALGORITHMS,
    MARGIN,
    NONE,
    Algorithm,
    Quantization,
    stored_parts,
    stored_tensors,
)  # fmt: skip
from .source import Source, find_source
from .tensor_file import Stored, TensorFileWriter

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
    quantization: Algorithm | None = None,
    calibration_prompts: Sequence[str] = (),
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
        quantization: fp8 to store the weights of most linear layers in FP8, and to round their inputs to FP8 when they
            run. The pipeline, with its text encoders, runs on a few prompts to choose the scales of these inputs.
        calibration_prompts: prompts for that, or files with one on each line; tiny has its own.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: before anything is written, if source, config and options do not match; while writing, if the
            disk is full or a weight overflows `dtype`, and then no partial output remains.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype}: use auto, {', '.join(DTYPES)}")
    if quantization not in (None, *ALGORITHMS):
        raise ValueError(f"quantization {quantization}: use {', '.join(ALGORITHMS)}, or leave it out")
    if calibration_prompts and not quantization:
        raise ValueError("calibration_prompts: only quantization fp8 needs them")
    sizes = {"tp_size": tp_size, "cp_size": cp_size, "cfg_size": cfg_size, "tp_layout": tp_layout}
    layout = Layout.parse(sizes, "parallel layout")
    output = Path(output_dir).expanduser()
    require_place(output, "checkpoint", is_checkpoint)  # before a long download

    @cache
    def checked(model: ModelConfig) -> tuple[Lora, ...]:
        model.check_layout(layout)
        return open_loras(loras, architecture_of(model), model)

    path = resolve_model(model_path)
    prompts = read_prompts(calibration_prompts, path) if quantization else []
    source = find_source(path, variant, revision, checked)
    fused, scheme, largest = checked(source.model), NONE, {}
    dtype = source.dtype if dtype == "auto" else dtype
    if quantization:
        require_pipeline(path, source.architecture)
        scheme = Quantization.fp8(source.architecture)
    with complete_folder(output, "checkpoint", is_checkpoint) as partial:
        if quantization:
            modules = scheme.modules(source.architecture, source.model)
            largest = calibrate(source, path, modules, prompts, fused, variant=variant, progress=progress)
        stored = stored_tensors(source.architecture, source.model, layout, dtype, scheme)
        files = _write_ranks(source, partial, dtype, layout, fused, stored, largest, progress)
        own = {
            "format_version": scheme.format_version,
            "tp_layout": tp_layout,
            "cfg_size": cfg_size,
            "source": str(model_path),
            "revision": source.revision,
            "variant": variant,
            "source_dtype": source.dtype,
            "vae_scale_factor": source.vae_scale_factor,
            "versions": versions(),
            **loras_entry(lora.record for lora in fused),
            **({"calibration": {"prompts": len(prompts), "steps": STEPS, "margin": MARGIN}} if quantization else {}),
            "files": to_json(files),
        }
        config = checkpoint_config(source.architecture, source.model, dtype, layout, str(model_path), own, scheme)
        write_synced(partial / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    return output


def _write_ranks(
    source: Source,
    folder: Path,
    dtype: Dtype,
    layout: Layout,
    loras: tuple[Lora, ...],
    stored: dict[str, Stored],
    largest: dict[str, float],
    progress: bool,
) -> Files:
    """Read every tensor once, fuse the LoRAs into it, and write each tp rank's part to that rank's file.

    Weights are quantized if `largest` has the largest input of their layer.
    """
    architecture, tensors, tp_size = source.architecture, source.tensors, layout.tp_size
    sharding = architecture.shardings[layout.tp_layout]
    buffer = torch.empty(max(t.nbytes for t in tensors.values()), dtype=torch.uint8)
    total = sum(t.nbytes for t in tensors.values())
    with ExitStack() as stack:
        paths = [folder / rank_file(rank) for rank in range(tp_size)]
        writers = [stack.enter_context(TensorFileWriter(path, stored)) for path in paths]
        require_space(folder, sum(w.nbytes for w in writers))
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not progress))
        for name in architecture.parameters(source.model):
            tensor = fuse(name, tensors[name].read_into(buffer), loras)
            spelled = architecture.keys.to_diffusers(name)
            parts = stored_parts(name, tensor, largest, spelled) or {name: cast(tensor, dtype, spelled)}
            for part, (rank, writer) in product(parts, enumerate(writers)):
                writer.write(part, sharding.shard(part, parts[part], tp_size, rank))
            bar.update(tensors[name].nbytes)
        return {path.name: writer.finish() for path, writer in zip(paths, writers, strict=True)}


def cast(tensor: torch.Tensor, dtype: Dtype, name: str) -> torch.Tensor:
    """Cast `tensor` to `dtype`. Raises `ValueError` if a value overflows."""
    target = TORCH_DTYPES[dtype]
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
    most = torch.finfo(TORCH_DTYPES[dtype]).max
    advice = "bfloat16 or float32" if dtype == "float16" else "float32"
    return (
        f"tensor '{name}' reaches {block.abs().max():.6g}, more than {dtype} can represent ({most:.6g}): "
        f"use --dtype {advice}"
    )
