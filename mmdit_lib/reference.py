"""The side to compare with: diffusers' transformer, inputs for both, and what each of its modules returned."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import torch

from .checkpoint.keys import from_diffusers
from .checkpoint.source import find_source
from .config import ARCHITECTURE, Resolution
from .engine.folder import EngineFolder
from .engine.torch_ops import DTYPES
from .pipeline import dtype_option
from .tiny.package import resolve_model

OUTPUT = "output"
"""The row of the whole transformer."""


def load_reference(
    model_path: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    variant: str | None = None,
    revision: str | None = None,
):
    """diffusers' transformer, in evaluation mode, of whatever `convert` takes: a folder, a file, a hub id or tiny."""
    from diffusers import SD3Transformer2DModel

    model_path = resolve_model(model_path)
    path = Path(model_path).expanduser()
    if path.suffix == ".json" and path.is_file():  # the index of a folder's shards
        path, variant = path.parent, re.fullmatch(r".*\.index\.?(.*)\.json", path.name)[1] or None
    if path.is_file():
        return _load_file(path, dtype).eval().to(device)
    options: dict = dtype_option(dtype) | {"use_safetensors": True, "variant": variant}
    if not path.is_dir():
        options |= {"revision": revision}
    if not path.is_dir() or (path / "transformer").is_dir():
        options |= {"subfolder": "transformer"}
    where = str(path) if path.is_dir() else str(model_path)
    return SD3Transformer2DModel.from_pretrained(where, **options).eval().to(device)


def _load_file(path: Path, dtype: torch.dtype):
    """By diffusers' own loader, which knows both layouts; told the config, for it would ask the hub for one."""
    from diffusers import SD3Transformer2DModel

    config = find_source(path).model.to_diffusers() | {"_class_name": ARCHITECTURE}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        return SD3Transformer2DModel.from_single_file(str(path), config=folder, torch_dtype=dtype)


def sample_inputs(
    folder: EngineFolder,
    *,
    resolution: str | int | Resolution | None = None,
    text_tokens: int | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Seeded inputs in the engine's dtype, on the CPU; fractional timesteps between 0 and 1000 in float32."""
    model, build = folder.model, folder.build
    size = Resolution.read(resolution or build.opt_resolution)
    step = model.patch_size * build.vae_scale_factor
    if size.height % step or size.width % step:
        raise ValueError(f"resolution {size}: height and width must be multiples of {step} pixels")
    tokens = build.opt_text_tokens if text_tokens is None else text_tokens
    batch = build.batches(folder.mapping.cfg_size)[1] if batch is None else batch
    if batch % folder.mapping.cfg_size:
        raise ValueError(f"batch {batch}: cfg {folder.mapping.cfg_size} needs an even one")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[folder.dtype])

    scale = build.vae_scale_factor
    return {
        "hidden_states": draw(batch, model.in_channels, size.height // scale, size.width // scale),
        "encoder_hidden_states": draw(batch, tokens, model.joint_attention_dim),
        "pooled_projections": draw(batch, model.pooled_projection_dim),
        "timestep": 1000 * torch.rand(batch, generator=generator),
    }


def reference_outputs(
    reference: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, list[torch.Tensor]], dict[str, str]]:
    """Every module's outputs by our path, in the order in which the modules finish; and what is left out, and why."""
    found: dict[str, list[torch.Tensor]] = {}
    left_out: dict[str, str] = {}
    handles = []

    def keep(path: str, unread: int | None):
        def hook(module, args, output):
            outputs = list(output) if isinstance(output, tuple) else [output]
            found[path] = [x for i, x in enumerate(outputs) if x is not None and i != unread]

        return hook

    for path, module in reference.named_modules():
        reason = _no_counterpart(module)
        if reason:
            left_out[path] = reason
            continue
        # The last block's attention also returns the text's part, which nothing reads: we do not calculate it.
        unread = 1 if getattr(module, "context_pre_only", None) and hasattr(module, "to_q") else None
        if unread:
            left_out[f"{path}:1"] = "the last block drops the text stream"
        handles.append(module.register_forward_hook(keep(from_diffusers(path) if path else OUTPUT, unread)))
    device, dtype = reference.device, reference.dtype
    moved = {k: v.to(device, torch.float32 if k == "timestep" else dtype) for k, v in inputs.items()}
    try:
        with torch.inference_mode():
            reference(**moved, return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    return found, left_out


def _no_counterpart(module: torch.nn.Module) -> str | None:
    """Why this module of diffusers is nothing to compare; None for every module that calculates."""
    if isinstance(module, torch.nn.ModuleList):
        return "a list of modules is not itself called"
    if isinstance(module, torch.nn.Dropout):  # ff.net.1 and attn.to_out.1
        return "dropout does nothing at inference"
    return None
