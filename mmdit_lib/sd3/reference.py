"""diffusers' transformer as the reference: loading it, and recording the outputs of its modules."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..architecture import ModelConfig
from ..config import TORCH_DTYPES, BuildConfig, dtype_option
from .config import SD3Config
from .inputs import INPUTS, KEPT_LAYERS, OUTPUT, RESIDUALS, residual_name
from .keys import from_diffusers


def load(
    path: str,
    dtype: torch.dtype,
    *,
    variant: str | None = None,
    revision: str | None = None,
    config: ModelConfig | None = None,
) -> torch.nn.Module:
    """Load `SD3Transformer2DModel` from a folder or hub id, or from a single file whose `config` is known."""
    from diffusers import SD3Transformer2DModel

    folder = Path(path)
    if config is not None:
        # Without a local config, diffusers would download one from the hub.
        content = config.to_diffusers() | {"_class_name": SD3Transformer2DModel.__name__}
        with tempfile.TemporaryDirectory() as place:
            Path(place, "config.json").write_text(json.dumps(content))
            return SD3Transformer2DModel.from_single_file(path, config=place, torch_dtype=dtype)
    options: dict = dtype_option(dtype) | {"use_safetensors": True, "variant": variant}
    if not folder.is_dir():
        options |= {"revision": revision}
    if not folder.is_dir() or (folder / "transformer").is_dir():
        options |= {"subfolder": "transformer"}
    return SD3Transformer2DModel.from_pretrained(path, **options)


def arguments(inputs: Mapping[str, torch.Tensor], config: SD3Config, build: BuildConfig) -> dict[str, Any]:
    """The arguments of `SD3Transformer2DModel` for an engine's inputs, without those that it does not have."""
    found: dict[str, Any] = {x.name: inputs[x.name] for x in INPUTS if x.default is None}
    if build.skip_layers:
        found["skip_layers"] = [i for i, kept in enumerate(inputs[KEPT_LAYERS.name].tolist()) if not kept]
    if build.controlnet_residuals:  # diffusers does not read those that are no inputs
        names = (residual_name(i) for i in range(build.controlnet_residuals))
        found[RESIDUALS] = [inputs.get(name) for name in names]
    return found


def outputs(
    reference: torch.nn.Module, inputs: Mapping[str, torch.Tensor], config: SD3Config, build: BuildConfig
) -> tuple[dict[str, list[torch.Tensor]], dict[str, str]]:
    """Every module's outputs by our path, in the order in which modules finish; and the reason for each omission."""
    found: dict[str, list[torch.Tensor]] = {}
    left_out: dict[str, str] = {}
    handles = []

    def keep(path: str, unread: int | None):
        def hook(module, args, output):
            tensors = list(output) if isinstance(output, tuple) else [output]
            found[path] = [x for i, x in enumerate(tensors) if x is not None and i != unread]

        return hook

    if reference.dtype == torch.float64:
        handles.append(reference.time_text_embed.time_proj.register_forward_hook(_sinusoid_in_float64))
    for path, module in reference.named_modules():
        reason = _no_counterpart(module)
        if reason:
            left_out[path] = reason
            continue
        # The last block's attention also returns the text stream, which is not used; our network does not return it.
        unread = 1 if getattr(module, "context_pre_only", None) and hasattr(module, "to_q") else None
        if unread:
            left_out[f"{path}:1"] = "the last block drops the text stream"
        handles.append(module.register_forward_hook(keep(from_diffusers(path) if path else OUTPUT.name, unread)))
    try:
        with torch.inference_mode():
            reference(**arguments(_moved(reference, inputs), config, build), return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    return found, left_out


def _sinusoid_in_float64(module, args, output) -> torch.Tensor:
    """diffusers computes the timestep's sinusoid in float32, whatever the transformer's dtype."""
    half = module.num_channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float64, device=output.device) / half
    angles = args[0].double()[:, None] * exponent.exp()
    return torch.cat([angles.cos(), angles.sin()], 1)


def _moved(reference: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs on diffusers' device, in its dtype unless `INPUTS` specifies another."""
    dtypes = {x.name: TORCH_DTYPES[x.dtype] for x in INPUTS if x.dtype}
    return {name: x.to(reference.device, dtypes.get(name, reference.dtype)) for name, x in inputs.items()}


def _no_counterpart(module: torch.nn.Module) -> str | None:
    """Why a diffusers module is not compared; None if it is."""
    if isinstance(module, torch.nn.ModuleList):
        return "a ModuleList is not called itself"
    if isinstance(module, torch.nn.Dropout):  # ff.net.1 and attn.to_out.1
        return "dropout does nothing at inference"
    return None
