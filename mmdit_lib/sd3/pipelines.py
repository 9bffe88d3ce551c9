"""The model-specific parts of diffusers' SD3 pipelines: text encoders, VAE, the transformer's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .config import SD3Config

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
ENCODER_OPTIONS = (
    "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "num_images_per_prompt",
    "clip_skip", "max_sequence_length", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)  # fmt: skip
GUIDANCE, CLIP_TOKENS, T5_TOKENS = 7.0, 77, 256
"""Defaults of the pipeline's call: guidance scale, and the two parts of the text."""


def default_class() -> type:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline


def adapt(pipe, config: SD3Config) -> None:
    """Without a transformer, diffusers assumes the published models' patch size and sample size."""
    pipe.patch_size = config.patch_size
    pipe.default_sample_size = config.sample_size


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raises `ValueError` naming an argument of `SD3Transformer2DModel` that an engine does not support."""
    for name, value in arguments.items():
        if value is None or (name == "skip_layers" and not value):
            continue
        if name == "block_controlnet_hidden_states":
            raise ValueError(f"{name}: the engine has no ControlNet inputs")
        if name == "skip_layers":
            raise ValueError(f"{name}={list(value)}: the engine always runs every layer")
        if name != "joint_attention_kwargs":
            raise ValueError(f"{name}: the transformer has no such argument")
        for key, option in value.items():
            if key == "scale" and option == 1.0:
                continue
            what = "LoRA scale" if key == "scale" else "argument"
            raise ValueError(f"{name}['{key}']: the engine does not support this {what}")


def call_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Rows and text tokens of a step, for one prompt and these options of the pipeline's call."""
    passes = 2 if options.get("guidance_scale", GUIDANCE) > 1 else 1
    tokens = CLIP_TOKENS + options.get("max_sequence_length", T5_TOKENS)
    return {"batch": passes * options.get("num_images_per_prompt", 1), "text_tokens": tokens}


@torch.inference_mode()
def encode(pipe, prompt, *, generator, latents, options: dict, encoding: dict) -> dict[str, torch.Tensor]:
    """Text embeddings and initial latents, as arguments for the pipeline's call."""
    guidance = options.get("guidance_scale", GUIDANCE) > 1
    texts = {"prompt_2": None, "prompt_3": None} | encoding
    found = pipe.encode_prompt(prompt, device=pipe._execution_device, do_classifier_free_guidance=guidance, **texts)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    # Embeddings of a prompt come repeated for each of its images, and given ones as they are.
    images = 1 if encoding.get("prompt_embeds") is None else encoding.get("num_images_per_prompt", 1)
    given = {name: value for name, value in zip(names, found, strict=True) if value is not None}
    side = pipe.default_sample_size * pipe.vae_scale_factor
    embeds, channels = given["prompt_embeds"], pipe.transformer.config.in_channels
    height, width = options.get("height") or side, options.get("width") or side
    given["latents"] = pipe.prepare_latents(
        images * len(embeds), channels, height, width, embeds.dtype, embeds.device, generator, latents
    )
    return given


@torch.inference_mode()
def decode(pipe, latents: torch.Tensor) -> list:
    """Latents -> PIL images."""
    vae = pipe.vae
    latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
    return pipe.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pil")
