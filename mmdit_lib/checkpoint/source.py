"""Finding a transformer: in a pipeline folder, a transformer folder, a single file, or on the hub."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from .. import models
from ..architecture import Architecture, ModelConfig
from ..config import DTYPES, FileConfig, Text
from ..files import read_json
from ..files.records import FileName
from . import hub
from .shapes import check_shapes
from .single_file import as_diffusers, is_layout
from .tensor_file import StoredTensor, read_header, refuse_pickles

STEM = "diffusion_pytorch_model"


class WeightIndex(FileConfig):
    """`*.safetensors.index.json`: which file has which tensor."""

    weight_map: dict[Text, FileName] = Field(min_length=1)


class VaeConfig(FileConfig):
    """`vae/config.json`; each level but the first halves the sides of the image."""

    block_out_channels: tuple[int, ...] = Field(min_length=1, max_length=9)


@dataclass(frozen=True)
class Source:
    """A transformer whose file headers match its config; no weights are in memory."""

    architecture: Architecture
    model: ModelConfig
    tensors: dict[str, StoredTensor]
    """By our names."""
    vae_scale_factor: int
    revision: str | None

    @property
    def dtype(self) -> str:
        """The dtype that takes the most bytes."""
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
    """Find a transformer; see `convert` for what `model_path` may be.

    A hub id's config is passed to `check` before its weights are downloaded.

    Raises:
        ValueError: if there is no transformer, or its files do not match.
    """
    path = Path(model_path).expanduser()
    if not path.exists():
        path, commit = hub.download(str(model_path), hub.CONFIGS, revision)
        _, model = _read_config(_transformer(path) / "config.json")
        check(model)
        path, again = hub.download(str(model_path), hub.weights(variant), revision)
        if again != commit:  # requesting the commit itself fails offline with huggingface_hub 1
            raise ValueError(f"{model_path} changed on the hub during the download; try again")
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
    architecture, model = _read_config(folder / "config.json")
    return _source(folder, tensors, architecture, model, _vae_scale_factor(folder, architecture), revision)


def _transformer(folder: Path) -> Path:
    """The folder with the transformer's files."""
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
    for architecture in models.ARCHITECTURES.values():
        layout = architecture.single_file
        if is_layout(tensors, layout):
            tensors = as_diffusers(tensors, layout, path)
            return _source(path, tensors, architecture, None, architecture.vae_scale_factor, None)
    config = path.parent / "config.json"
    if config.is_file():
        architecture, model = _read_config(config)
        return _source(path, tensors, architecture, model, _vae_scale_factor(path.parent, architecture), None)
    return _without_config(path, tensors)


def _without_config(path: Path, tensors: dict[str, StoredTensor]) -> Source:
    """Use the first architecture that matches the tensors. Raises the last one's error if none does."""
    fault = None
    for architecture in models.ARCHITECTURES.values():
        try:
            scale = _vae_scale_factor(path.parent, architecture)
            return _source(path, tensors, architecture, None, scale, None)
        except ValueError as error:
            fault = error
    raise fault


def _source(
    where: Path,
    tensors: dict[str, StoredTensor],
    architecture: Architecture,
    model: ModelConfig | None,
    scale: int,
    revision: str | None,
) -> Source:
    keys = architecture.keys
    try:
        tensors = {keys.from_diffusers(name): tensor for name, tensor in tensors.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if model is None:
        try:
            model = architecture.infer_config(shapes, None)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    check_shapes(shapes, architecture, model, str(where), keys.to_diffusers)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{where}: tensor '{keys.to_diffusers(name)}' is {tensor.code}; {', '.join(DTYPES)} can be converted"
            )
    return Source(architecture, model, tensors, scale, revision)


def _read_config(path: Path) -> tuple[Architecture, ModelConfig]:
    config = read_json(path)
    architecture = models.find(config.get("_class_name"), path)
    try:
        return architecture, architecture.config.from_diffusers(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _vae_scale_factor(transformer: Path, architecture: Architecture) -> int:
    """Image pixels per latent pixel, from the VAE next to the transformer; without a VAE, the published models'."""
    path = transformer.parent / "vae" / "config.json"
    if not path.is_file():
        return architecture.vae_scale_factor
    return 2 ** (len(VaeConfig.parse(read_json(path), path).block_out_channels) - 1)


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one variant, as diffusers names them; variants are never mixed."""
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
        + (f"; variants found: {', '.join(there)}" if there else "")
    )


def _shards(index: Path) -> list[Path]:
    weight_map = WeightIndex.parse(read_json(index), index).weight_map
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    refuse_pickles(files)
    if missing := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"{index} names {missing[0]}, which does not exist")
    return files


def _read_headers(paths: list[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        found = read_header(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(f"tensor '{twice[0]}' is in both {tensors[twice[0]].path.name} and {path.name}")
        tensors |= found
    return tensors
