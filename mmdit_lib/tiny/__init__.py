"""A tiny, trained Stable Diffusion 3 that ships with the package, and what made it and measures it."""

from importlib import import_module

_HOMES = {"make_random_pipeline": "random_pipeline"}  # name: the file it comes from, imported when first asked for
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
