"""Whether inputs lie inside what an engine was built for, told before anything runs."""

from __future__ import annotations

from .folder import EngineFolder


def check_profile(folder: EngineFolder, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises `ValueError` naming the input, the number and the legal range."""
    build, model = folder.build, folder.model
    expected = {"hidden_states": 4, "encoder_hidden_states": 3, "pooled_projections": 2, "timestep": 1}
    for name, rank in expected.items():
        if len(shapes[name]) != rank:
            raise ValueError(f"{name} must have {rank} dimensions, not shape {shapes[name]}")
    batch, channels, *latent = shapes["hidden_states"]
    _, tokens, features = shapes["encoder_hidden_states"]
    batches = {name: shape[0] for name, shape in shapes.items()}
    if len(set(batches.values())) > 1:
        raise ValueError(f"the batch differs between inputs: {batches}")
    for name, found, wanted in (
        ("hidden_states channels", channels, model.in_channels),
        ("encoder_hidden_states features", features, model.joint_attention_dim),
        ("pooled_projections features", shapes["pooled_projections"][1], model.pooled_projection_dim),
    ):
        if found != wanted:
            raise ValueError(f"{name}: expected {wanted}, got {found}")
    if not 1 <= batch <= build.max_batch_size:
        raise ValueError(
            f"batch {batch} lies outside the engine's 1 to {build.max_batch_size} (guidance doubles the images); "
            f"build with --max_batch_size {batch}"
        )
    if not build.min_text_tokens <= tokens <= build.max_text_tokens:
        raise ValueError(
            f"{tokens} text tokens lie outside the engine's {build.min_text_tokens} to {build.max_text_tokens}"
        )
    check_latent(folder, *latent)


def check_latent(folder: EngineFolder, height: int, width: int) -> None:
    """As `check_profile`, for the size of the latents alone."""
    build, model = folder.build, folder.model
    for side, size in (("height", height), ("width", width)):
        low, high = (getattr(r, side) for r in (build.min_resolution, build.max_resolution))
        pixels = size * build.vae_scale_factor
        if not low <= pixels <= high:
            raise ValueError(
                f"{side} {pixels} lies outside the engine's {low} to {high} pixels; "
                f"build with --{'min' if pixels < low else 'max'}_resolution {pixels}"
            )
        if size % model.patch_size:
            raise ValueError(
                f"{side} {pixels} must be a multiple of {model.patch_size * build.vae_scale_factor} pixels"
            )
