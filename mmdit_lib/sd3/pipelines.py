"""The model-specific parts of diffusers' SD3 pipelines: text encoders, VAE, the transformer's arguments."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch

from ..architecture import Weights
from ..config import BuildConfig, shown
from .config import SD3Config
from .inputs import KEPT_LAYERS, RESIDUALS, residual_inputs, residual_name

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
ENCODER_OPTIONS = (
    "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "num_images_per_prompt",
    "clip_skip", "max_sequence_length", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)  # fmt: skip
ADDED_COMPONENTS = ("controlnet",)
ARGUMENTS = (
    "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "block_controlnet_hidden_states",
    "joint_attention_kwargs", "return_dict", "skip_layers",
)  # fmt: skip
GUIDANCE, CLIP_TOKENS, T5_TOKENS = 7.0, 77, 256
"""Defaults of the pipeline's call: guidance scale, and the two parts of the text."""
MAX_T5_TOKENS = 512
"""The most that diffusers' pipelines take."""


def default_class() -> type:
    logging.getLogger("transformers.utils.import_utils").addFilter(_not_about_torchvision)
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline


def _not_about_torchvision(record: logging.LogRecord) -> bool:
    """False for transformers' advice on the image processors that diffusers imports and these pipelines do not use."""
    return "requires torchvision" not in record.getMessage()


def pos_embed(config: SD3Config, weights: Weights) -> torch.nn.Module:
    """diffusers' module. The ControlNets of SD3.5-large have none of their own and copy the transformer's."""
    from diffusers.models.embeddings import PatchEmbed

    side = config.sample_size
    sizes = dict(patch_size=config.patch_size, in_channels=config.in_channels, embed_dim=config.hidden_size)
    module = PatchEmbed(side, side, **sizes, pos_embed_max_size=config.pos_embed_max_size)
    prefix = "pos_embed."
    module.load_state_dict({name.removeprefix(prefix): x for name, x in weights().items() if name.startswith(prefix)})
    return module


ATTRIBUTES = {"inner_dim": lambda config, weights: config.hidden_size, "pos_embed": pos_embed}


def adapt(pipe, config: SD3Config) -> None:
    """Without a transformer, diffusers assumes the published models' patch size and sample size."""
    pipe.patch_size = config.patch_size
    pipe.default_sample_size = config.sample_size


def to_inputs(arguments: dict[str, Any], config: SD3Config, build: BuildConfig) -> dict[str, torch.Tensor]:
    """The optional inputs for those arguments of `SD3Transformer2DModel` that are not inputs themselves.

    Raises `ValueError` naming an argument that is invalid, or that the engine does not support.
    """
    others = dict(arguments)
    skipped, residuals = others.pop("skip_layers", None), others.pop(RESIDUALS, None)
    check_arguments(others)
    return kept_layers(skipped, config, build) | residual_tensors(residuals, config, build)


def kept_layers(
    skipped: Any, config: SD3Config, build: BuildConfig, name: str = "skip_layers"
) -> dict[str, torch.Tensor]:
    """The input that is True for each block not in `skipped`, the value of the argument `name`."""
    skipped = [] if skipped is None else as_list(name, skipped)
    if not skipped:
        return {}
    named = f"{name}={shown(skipped)}"
    if not build.skip_layers:
        raise ValueError(f"{named}: the engine always runs every layer; build with --skip_layers")
    if any(isinstance(i, bool) or not isinstance(i, Integral) for i in skipped):
        raise ValueError(f"{named}: give block numbers")
    if any(not 0 <= i < config.num_layers for i in skipped):
        raise ValueError(f"{named}: the model's blocks are 0 to {config.num_layers - 1}")
    if len(set(skipped)) < len(skipped):
        raise ValueError(f"{named}: give each block once")
    return {KEPT_LAYERS.name: torch.tensor([i not in skipped for i in range(config.num_layers)])}


def residual_tensors(residuals: Any, config: SD3Config, build: BuildConfig) -> dict[str, torch.Tensor]:
    """A ControlNet's residuals [B, N, D] by the names of their inputs."""
    if residuals is None:
        return {}
    residuals, built = as_list(RESIDUALS, residuals), build.controlnet_residuals
    if len(residuals) != built:
        given = f"{len(residuals)} residual{'s' * (len(residuals) != 1)}"
        takes = f"takes {built}" if built else "has no ControlNet inputs"
        remedy = f"build with --controlnet_residuals {len(residuals)}" if residuals else "give None for no residuals"
        raise ValueError(f"{RESIDUALS}: {given}, but the engine {takes}; {remedy}")
    if not all(isinstance(x, torch.Tensor) for x in residuals):
        raise ValueError(f"{RESIDUALS}: give a list of tensors")
    named = {residual_name(i): residual for i, residual in enumerate(residuals)}
    return {name: named[name] for name in residual_inputs(config, build) if name}


def as_list(name: str, values: Any) -> list:
    """Raises `ValueError` if it is not a collection."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name}={shown(values)}: give a list")
    return list(values)


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raises `ValueError` naming an argument of `SD3Transformer2DModel` that an engine does not support."""
    for name, value in arguments.items():
        if value is None:
            continue
        if name != "joint_attention_kwargs":
            raise ValueError(f"{name}: the transformer has no such argument")
        for key, option in value.items():
            if key == "scale" and option == 1.0:
                continue
            what = "LoRA scale; set_adapters takes it" if key == "scale" else "argument"
            raise ValueError(f"{name}['{key}']: the engine does not support this {what}")


def check_call(options: Mapping[str, Any], config: SD3Config, build: BuildConfig) -> None:
    """Raises `ValueError` naming an option of the pipeline's call that the engine does not support."""
    kept_layers(options.get("skip_guidance_layers"), config, build, "skip_guidance_layers")
    if (tokens := options.get("max_sequence_length", T5_TOKENS)) > MAX_T5_TOKENS:
        raise ValueError(f"max_sequence_length {tokens}: diffusers' pipelines allow at most {MAX_T5_TOKENS}")


def call_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Rows and text tokens of a step, for one prompt and these options of the pipeline's call."""
    passes = 2 if options.get("guidance_scale", GUIDANCE) > 1 else 1
    tokens = CLIP_TOKENS + options.get("max_sequence_length", T5_TOKENS)
    return {"batch": passes * options.get("num_images_per_prompt", 1), "text_tokens": tokens}


@torch.no_grad()  # not inference_mode: see engine/ahead.py, Seen
def encode(pipe, prompt, *, generator, latents, options: dict, encoding: dict) -> dict[str, torch.Tensor]:
    """Text embeddings and initial latents, as arguments for the pipeline's call."""
    guidance = options.get("guidance_scale", GUIDANCE) > 1
    texts = {"prompt_2": None, "prompt_3": None} | encoding
    found = pipe.encode_prompt(prompt, device=pipe._execution_device, do_classifier_free_guidance=guidance, **texts)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    # The pipeline repeats a prompt's embeddings for each of its images, but not embeddings that it is given.
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
