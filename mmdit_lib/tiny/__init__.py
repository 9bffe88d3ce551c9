"""A tiny, trained Stable Diffusion 3 that ships with the package, and what made it and measures it."""

from ..lazy import names_from

_HOMES = {  # name: the file it comes from, imported when first asked for
    "EXAMPLES": "gallery",
    "Prompt": "captions",
    "Scores": "evaluation",
    "evaluate": "evaluation",
    "gallery_of": "gallery",
    "heldout_prompts": "captions",
    "look": "judge",
    "make_random_pipeline": "random_pipeline",
    "model_path": "package",
}
__all__ = sorted(_HOMES)
__getattr__ = names_from(__name__, _HOMES)
