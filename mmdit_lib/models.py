"""The supported models. A new one is a package and a line here."""

from __future__ import annotations

from .architecture import Architecture, ModelConfig
from .config import either, shown
from .sd3 import SD3

ARCHITECTURES = {architecture.name: architecture for architecture in (SD3,)}
KNOWN_MODELS = {name: config for a in ARCHITECTURES.values() for name, config in a.known_models.items()}
"""Configs of the published models, by the last part of their hub id."""


def find(name: object, where: object) -> Architecture:
    """Look up the architecture that a config names. Raises `ValueError` that names `where`."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{where} describes a {shown(name)}; only {either(ARCHITECTURES)} is supported")
    return ARCHITECTURES[name]


def architecture_of(config: ModelConfig) -> Architecture:
    return next(a for a in ARCHITECTURES.values() if type(config) is a.config)
