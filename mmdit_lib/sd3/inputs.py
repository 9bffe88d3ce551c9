"""The engine's inputs and output: one table for the network, the profile, all checks, random inputs and the runner."""

from __future__ import annotations

from ..architecture import Input

LATENT = ("height/vae_scale_factor", "width/vae_scale_factor")

INPUTS = (
    Input("hidden_states", ("batch", "in_channels", *LATENT)),
    Input("encoder_hidden_states", ("batch", "text_tokens", "joint_attention_dim")),
    Input("pooled_projections", ("batch", "pooled_projection_dim")),
    # float32 in every network, as in diffusers: near 1000, float16 has steps of 0.5 and bfloat16 of 4.
    Input("timestep", ("batch",), dtype="float32", uniform=1000.0),
)
OUTPUT = Input("output", ("batch", "out_channels", *LATENT))
