"""The engine's inputs and output: one table for the network, the profile, all checks, random inputs and the runner."""

from __future__ import annotations

from ..architecture import Input
from ..config import BuildConfig
from .config import SD3Config

LATENT = ("height/vae_scale_factor", "width/vae_scale_factor")
IMAGE_TOKENS = "*".join(f"{side}/patch_size" for side in LATENT)

INPUTS = (
    Input("hidden_states", ("batch", "in_channels", *LATENT)),
    Input("encoder_hidden_states", ("batch", "text_tokens", "joint_attention_dim")),
    Input("pooled_projections", ("batch", "pooled_projection_dim")),
    # float32 in every network, as in diffusers: near 1000, float16 has steps of 0.5 and bfloat16 of 4.
    Input("timestep", ("batch",), dtype="float32", uniform=1000.0),
)
CONDITIONING = ("timestep", "pooled_projections")
OUTPUT = Input("output", ("batch", "out_channels", *LATENT))

KEPT_LAYERS = Input("kept_layers", ("num_layers",), dtype="bool", default=True)
"""False for a block that is skipped."""
RESIDUALS = "block_controlnet_hidden_states"
"""diffusers' argument; each of its tensors is a separate input, `block_controlnet_hidden_states_0` and so on. Stacking
them would copy them all; and in a call without residuals, one tensor of zeros serves all of them."""
INPUT_OPTIONS = {KEPT_LAYERS.name: "skip_layers", rf"{RESIDUALS}_\d+": "controlnet_residuals"}
"""The build options that add inputs, by patterns of the inputs' names."""


def optional_inputs(config: SD3Config, build: BuildConfig) -> tuple[Input, ...]:
    """The inputs for skip-layer guidance and a ControlNet."""
    names = dict.fromkeys(name for name in residual_inputs(config, build) if name)
    residuals = (Input(name, ("batch", IMAGE_TOKENS, "hidden_size"), uniform=1.0, default=0.0) for name in names)
    return (*([KEPT_LAYERS] if build.skip_layers else []), *residuals)


def residual_inputs(config: SD3Config, build: BuildConfig) -> list[str | None]:
    """For each block, the input that is added to the image tokens after it: diffusers' rule, with its rounding.

    The last block gets none, so with as many residuals as blocks the last residual is not an input.
    """
    blocks, count = config.num_layers, build.controlnet_residuals
    if not count:
        return [None] * blocks
    return [*(residual_name(int(i / (blocks / count))) for i in range(blocks - 1)), None]


def residual_name(index: int) -> str:
    return f"{RESIDUALS}_{index}"
