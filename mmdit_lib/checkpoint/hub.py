"""Fetching a model's transformer, and nothing else, from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

CONFIGS = ["model_index.json", "vae/config.json", "transformer/config.json"]


def download(repository: str, patterns: list[str], revision: str | None) -> tuple[Path, str]:
    """The local folder and the commit of a hub id; only what is missing in the cache is fetched.

    Args:
        patterns: the files to fetch.

    Raises:
        ValueError: if there is no such path or repository, or it cannot be fetched.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{repository} does not exist, and is no hub id either (owner/name)")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"{repository} does not exist here; for hub ids: pip install huggingface_hub") from None
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except huggingface_hub.errors.GatedRepoError:
        raise ValueError(
            f"{repository} asks for its licence to be accepted: do so at huggingface.co/{repository}, "
            "then `hf auth login`"
        ) from None
    except Exception as error:  # the client's errors have no common class of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{repository} does not exist here and cannot be fetched from the hub: {reason}") from None
    return folder, folder.name


def weights(variant: str | None) -> list[str]:
    """Patterns of a transformer's files."""
    infix = f".{variant}" if variant else ""
    stem = "transformer/diffusion_pytorch_model"
    return [
        f"{stem}.safetensors.index{infix}.json",
        f"{stem}{infix}.safetensors",
        f"{stem}{infix}-?????-of-?????.safetensors",
        f"{stem}-?????-of-?????{infix}.safetensors",
    ]
