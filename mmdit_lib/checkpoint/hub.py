"""Locating a model: on disk, on the Hugging Face hub (only the transformer is downloaded), or in this package."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

SHIPPED = ("tiny",)
"""Models that ship with the package, each in `mmdit_lib/NAME/weights`."""
INDEX_FILE, TRANSFORMER_CONFIG = "model_index.json", "transformer/config.json"
HUB_OPTIONS = frozenset({"cache_dir", "token", "local_files_only", "proxies", "force_download"})
"""Options of `from_pretrained` on where and how to download, which `download` does not take."""
CONFIGS = [INDEX_FILE, "vae/config.json", TRANSFORMER_CONFIG]


def resolve_model(model: str | Path) -> str:
    """The path of a model on disk, with `~` expanded, or of one that ships with the package; other names unchanged."""
    path = os.path.expanduser(model)  # unlike pathlib's, it leaves the name of an unknown user
    if os.path.exists(path):
        return path
    return str(shipped_model(str(model))) if str(model) in SHIPPED else str(model)


def shipped_model(name: str) -> Path:
    """The diffusers pipeline folder of a model that ships with the package. Raises `FileNotFoundError`."""
    folder = Path(str(files("mmdit_lib"))) / name / "weights"
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{folder} contains no model: the package was installed without its weights")
    return folder


def pipeline_folder(model: str, revision: str | None = None) -> Path:
    """A folder with a pipeline's `model_index.json` and, if it has a transformer, that one's `config.json`.

    Of a hub id, only these two files are downloaded. Raises `ValueError` if it is not a pipeline or cannot be reached.
    """
    path = Path(model)
    folder = path if path.exists() else download(model, [INDEX_FILE, TRANSFORMER_CONFIG], revision)[0]
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(
            f"{model} is not a pipeline: it has no {INDEX_FILE}; give the folder or hub id of a complete one"
        )
    return folder


def download(repository: str, patterns: list[str], revision: str | None) -> tuple[Path, str]:
    """Download files of a hub id, unless cached; returns the local folder and the commit.

    Args:
        patterns: glob patterns of the files to download.

    Raises:
        ValueError: if there is no such path or repository, or the download fails.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{repository} does not exist and is not a hub id (owner/name)")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"{repository} does not exist locally; for hub ids: pip install huggingface_hub") from None
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except huggingface_hub.errors.GatedRepoError:
        raise ValueError(
            f"{repository} is gated: accept its license at huggingface.co/{repository}, then run `hf auth login`"
        ) from None
    except Exception as error:  # the client's errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{repository} does not exist locally and cannot be downloaded: {reason}") from None
    return folder, folder.name


def weights(variant: str | None) -> list[str]:
    """Glob patterns of a transformer's weight files."""
    infix = f".{variant}" if variant else ""
    stem = "transformer/diffusion_pytorch_model"
    return [
        f"{stem}.safetensors.index{infix}.json",
        f"{stem}{infix}.safetensors",
        f"{stem}{infix}-?????-of-?????.safetensors",
        f"{stem}-?????-of-?????{infix}.safetensors",
    ]
