"""Random LoRAs for test models, in every format, and diffusers' result for them."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

TENSORS = dict[str, torch.Tensor]


def has_peft() -> bool:
    """Whether diffusers can load LoRAs here."""
    return find_spec("peft") is not None


def layers(state: TENSORS) -> TENSORS:
    """The weights of a diffusers transformer that a LoRA can change: of linear layers and of the patch embedding."""
    return {name.removesuffix(".weight"): w for name, w in state.items() if name.endswith(".weight") and w.dim() != 1}


def random_lora(state: TENSORS, seed: int = 0, rank: int = 4, only: str = "") -> TENSORS:
    """`module.lora_A.weight` and `module.lora_B.weight` of every layer with `only` in its name, by diffusers' names.

    Each change is about a third of its weight, so a missing one shows, and activations keep their size.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, weight in layers(state).items():
        if only in module:
            ones = [1] * (weight.dim() - 2)
            inputs = math.prod(weight.shape[1:])
            a = torch.randn(rank, *weight.shape[1:], generator=generator) / math.sqrt(inputs)
            b = torch.randn(weight.shape[0], rank, *ones, generator=generator) / math.sqrt(9 * rank)
            found |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return found


def prefixed(lora: TENSORS, prefix: str = "transformer.") -> TENSORS:
    return {f"{prefix}{name}": tensor for name, tensor in lora.items()}


def write(path: Path, lora: TENSORS, prefix: str = "transformer.", metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.clone() for name, t in prefixed(lora, prefix).items()}, path, metadata=metadata)
    return path


def fused_by_diffusers(transformer, loras: list[tuple[Path, float]]):
    """The transformer after `pipe.load_lora_weights` and `pipe.fuse_lora`, without PEFT's wrappers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    others = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **dict.fromkeys(others))
    for i, (path, scale) in enumerate(loras):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"lora{i}")
        pipe.fuse_lora(lora_scale=scale, adapter_names=[f"lora{i}"])
        pipe.unload_lora_weights()
    return transformer


def fused(state: TENSORS, loras: list[tuple[TENSORS, float]]) -> TENSORS:
    """The weights after fusing LoRAs of `random_lora`, by the definition in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    for lora, scale in loras:
        for module in {name.partition(".lora_")[0] for name in lora}:
            a, b = (lora[f"{module}.lora_{part}.weight"].double().flatten(1) for part in "AB")
            weight = state[f"{module}.weight"]
            state[f"{module}.weight"] = weight + scale * (b @ a).view(weight.shape)
    return state
