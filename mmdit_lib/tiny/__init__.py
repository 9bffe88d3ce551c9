"""The tiny, trained Stable Diffusion 3 that ships with the package. The code that trained it is in `training/`."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.hub import shipped_model

__all__ = ["controlnet_path", "lora_path", "model_path"]


def model_path() -> Path:
    """The folder of the trained pipeline, for `StableDiffusion3Pipeline.from_pretrained`."""
    return shipped_model("tiny")


def lora_path() -> Path:
    """A LoRA that draws outlines instead of filled shapes: a file in diffusers' format."""
    return model_path().parent / "lora" / "pytorch_lora_weights.safetensors"


def controlnet_path() -> Path:
    """The folder of a ControlNet for the tiny model, for `SD3ControlNetModel.from_pretrained`.

    It places objects where an image of white outlines on black shows them.
    """
    return model_path().parent / "controlnet"
