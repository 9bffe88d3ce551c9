"""Stable Diffusion 3 / 3.5's transformer (the MMDiT) as TensorRT engines, on one GPU or many.

The way through the library: `convert` a checkpoint, `build` an engine folder, `load_pipeline` with it,
`compare_layers` with diffusers. Each name is imported when first asked for.
"""

from .lazy import names_from

_HOMES = {
    "convert": "checkpoint",
    "Checkpoint": "checkpoint",
    "build": "engine.build",
    "EngineFolder": "engine.folder",
    "MMDiTRunner": "pipeline",
    "install": "pipeline",
    "load_pipeline": "pipeline",
    "compare_layers": "parity",
}
__all__ = sorted(_HOMES)
__getattr__ = names_from(__name__, _HOMES)
