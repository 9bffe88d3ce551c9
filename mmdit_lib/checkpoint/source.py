"""Finding a transformer: in a pipeline folder, a transformer folder, a single file, or on the hub."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import ARCHITECTURE, ModelConfig
from . import hub, original
from .keys import from_diffusers, to_diffusers
from .shapes import check_shapes, deduce_model
from .tensor_file import CODES, StoredTensor, read_header, refuse_pickles

STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Source:
    """A transformer whose headers have been read and found to fit its config; no weights are in memory."""

    model: ModelConfig
    tensors: dict[str, StoredTensor]
    """By our names."""
    vae_scale_factor: int
    revision: str | None

    @property
    def dtype(self) -> str:
        """The dtype of most parameters."""
        sizes = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.nbytes
        return sizes.most_common(1)[0][0]


def find_source(
    model_path: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    check: Callable[[ModelConfig], None] = lambda model: None,
) -> Source:
    """See `convert` for what `model_path` may be; `check` sees a hub id's config before the weights are fetched.

    Raises:
        ValueError: in one line, where there is no transformer, or its parts do not fit together.
    """
    path = Path(model_path).expanduser()
    if not path.exists():
        path, commit = hub.download(str(model_path), hub.CONFIGS, revision)
        check(_read_config(_transformer(path) / "config.json"))
        path, again = hub.download(str(model_path), hub.weights(variant), revision)
        if again != commit:  # asking for the commit itself fails offline with huggingface_hub 1
            raise ValueError(f"{model_path} changed on the hub while it was fetched; try again")
        return _from_folder(path, variant, commit)
    if revision:
        raise ValueError(f"revision {revision} applies to hub ids; {path} is on disk")
    if path.is_dir():
        return _from_folder(path, variant, None)
    if variant:
        raise ValueError(f"variant {variant} applies to folders; {path} is a file")
    return _from_file(path)


def _from_folder(folder: Path, variant: str | None, revision: str | None) -> Source:
    folder = _transformer(folder)
    tensors = _read_headers(_weight_files(folder, variant))
    return _source(folder, tensors, _read_config(folder / "config.json"), _vae_scale_factor(folder), revision)


def _transformer(folder: Path) -> Path:
    """Where the transformer's files lie."""
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is neither a pipeline folder (with transformer/) nor a transformer (with config.json)"
        )
    return folder


def _from_file(path: Path) -> Source:
    refuse_pickles([path])
    tensors = _read_headers(_shards(path) if path.name.endswith(".json") else [path])
    if original.is_original(tensors):
        return _source(path, original.as_diffusers(tensors, path), None, 8, None)
    config = path.parent / "config.json"
    model = _read_config(config) if config.is_file() else None
    return _source(path, tensors, model, _vae_scale_factor(path.parent), None)


def _source(
    where: Path, tensors: dict[str, StoredTensor], model: ModelConfig | None, scale: int, revision: str | None
) -> Source:
    try:
        tensors = {from_diffusers(name): tensor for name, tensor in tensors.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if model is None:
        model = deduce_model(shapes)
    check_shapes(shapes, model, str(where), to_diffusers)
    for name, tensor in tensors.items():
        if tensor.dtype is None:
            raise ValueError(
                f"{where}: tensor '{to_diffusers(name)}' is {tensor.code}; {', '.join(CODES)} can be converted"
            )
    return Source(model, tensors, scale, revision)


def _read_config(path: Path) -> ModelConfig:
    config = read_json(path)
    found = config.get("_class_name")
    if found != ARCHITECTURE:
        raise ValueError(f"{path} describes a {found}; only {ARCHITECTURE} can be converted")
    try:
        return ModelConfig.from_diffusers(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _vae_scale_factor(transformer: Path) -> int:
    """Image pixels per latent pixel, from the VAE beside the transformer; the published models' 8 without one."""
    path = transformer.parent / "vae" / "config.json"
    return 2 ** (len(read_json(path)["block_out_channels"]) - 1) if path.is_file() else 8


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one variant, as diffusers names them; never a mixture."""
    infix = f".{variant}" if variant else ""
    index = folder / f"{STEM}.safetensors.index{infix}.json"
    if index.is_file():
        return _shards(index)
    single = folder / f"{STEM}{infix}.safetensors"
    if single.is_file():
        return [single]
    # Shards come as name.variant-00001-of-00002.safetensors or, older, name-00001-of-00002.variant.safetensors.
    shard = r"(?:-\d+-of-\d+)?"
    names = (re.fullmatch(rf"{STEM}(\.[^.]+?)?{shard}(\.[^.]+)?\.safetensors", p.name) for p in folder.iterdir())
    there = sorted({(m[1] or m[2] or ".none")[1:] for m in names if m})
    if not there:
        refuse_pickles(sorted(folder.iterdir()))
    raise ValueError(
        f"{folder} has neither {index.name} nor {single.name}"
        + (f"; variants there: {', '.join(there)}" if there else "")
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map", {})
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if not files:
        raise ValueError(f"{index} names no files")
    refuse_pickles(files)
    if missing := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"{index} names {missing[0]}, which is not there")
    return files


def _read_headers(paths: list[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        found = read_header(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(f"tensor '{twice[0]}' is in both {tensors[twice[0]].path.name} and {path.name}")
        tensors |= found
    return tensors


def read_json(path: Path) -> dict:
    """Raises `ValueError` of one line."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values
