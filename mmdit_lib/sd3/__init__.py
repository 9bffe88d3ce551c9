"""Stable Diffusion 3 and 3.5, described by one `Architecture`."""

from __future__ import annotations

from ..architecture import Architecture
from . import keys, lora, pipelines, reference
from .config import KNOWN_MODELS, SD3Config, infer_config
from .inputs import CONDITIONING, INPUT_OPTIONS, INPUTS, OUTPUT, optional_inputs
from .original import SINGLE_FILE
from .quantization import FULL_PRECISION
from .tensor_parallel import SHARDINGS
from .transformer import MMDiT, define

SD3 = Architecture(
    name="SD3Transformer2DModel",
    config=SD3Config,
    known_models=KNOWN_MODELS,
    module=MMDiT,
    define=define,
    inputs=INPUTS,
    optional_inputs=optional_inputs,
    input_options=INPUT_OPTIONS,
    output=OUTPUT,
    shardings=SHARDINGS,
    full_precision=FULL_PRECISION,
    keys=keys,
    lora_keys=lora,
    infer_config=infer_config,
    single_file=SINGLE_FILE,
    reference=reference,
    pipelines=pipelines,
    blocks="transformer_blocks",
    conditioning=CONDITIONING,
    vae_scale_factor=8,
)

__all__ = ["KNOWN_MODELS", "SD3", "SD3Config"]
