"""Where a model is: on disk, on the Hugging Face hub (of which only the transformer is fetched), or in this package."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

SHIPPED = ("tiny",)
"""Models that ship with the package, each in `mmdit_lib/NAME/weights`."""
CONFIGS = ["model_index.json", "vae/config.json", "transformer/config.json"]


def resolve_model(model: str | Path) -> str:
    """The name of a model that ships with the package becomes its folder; any other name is left as it is."""
    name = str(model)
    return str(shipped_model(name)) if name in SHIPPED and not Path(name).exists() else name


def shipped_model(name: str) -> Path:
    """The diffusers pipeline folder of a model that ships with the package. Raises `FileNotFoundError`."""
    folder = Path(str(files("mmdit_lib"))) / name / "weights"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: the package was installed without its weights")
    return folder


def download(repository: str, patterns: list[str], revision: str | None) -> tuple[Path, str]:
    """The local folder and the commit of a hub id; only what is not cached is fetched.

    Args:
        patterns: the files to fetch.

    Raises:
        ValueError: if there is no such path or repository, or it cannot be fetched.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{repository} does not exist and is not a hub id (owner/name)")
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
