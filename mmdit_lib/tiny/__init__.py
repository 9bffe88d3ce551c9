"""A tiny, trained Stable Diffusion 3 that ships with the package, and what made it and measures it."""

from importlib import import_module

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


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
