"""Finding a LoRA: a file, in a folder or on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..config import shown
from . import hub
from .peft_config import PEFT_CONFIG, PEFT_FILE
from .tensor_file import refuse_pickles

FILES = ("pytorch_lora_weights.safetensors", PEFT_FILE)
"""diffusers' and PEFT's."""


GivenLora = str | Path | tuple[str | Path, float]
"""A LoRA and its scale: as a pair, or as 'PATH:SCALE'."""


def with_scale(lora: GivenLora) -> tuple[str | Path, float]:
    """The two parts of PATH:SCALE, for instance 'style.safetensors:0.8' or 'owner/name'; the scale is 1 by default.

    A path may contain colons: only a number after the last one is a scale, unless a file has the whole name.
    Raises `ValueError` for anything but a path or a pair.
    """
    if not isinstance(lora, (str, Path)):
        return _pair(lora)
    path, _, scale = str(lora).rpartition(":")
    if not path or Path(lora).expanduser().exists():
        return lora, 1.0
    try:
        return path, float(scale)
    except ValueError:
        return lora, 1.0


def with_scales(loras: Iterable[GivenLora]) -> list[tuple[str | Path, float]]:
    """`with_scale` of each. Raises `ValueError` for no list, above all for a path, which is one of letters."""
    if isinstance(loras, (str, Path)):
        raise ValueError(f"LoRA {loras}: give a list of LoRAs, for instance ['{loras}']")
    if not isinstance(loras, Iterable):
        raise ValueError(f"LoRAs {shown(loras)}: give a list; an empty one for none")
    return [with_scale(lora) for lora in loras]


def _pair(lora: object) -> tuple[str | Path, float]:
    try:
        source, scale = lora
        if isinstance(source, (str, Path)):
            return source, float(scale)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"LoRA {shown(lora)}: give a path, or a path and a number as its scale")


class LoraFile(NamedTuple):
    """Where a LoRA was found."""

    path: Path
    revision: str | None
    """The commit of a hub id."""


def find_lora(source: str | Path) -> LoraFile:
    """The safetensors file of a LoRA.

    Args:
        source: a file, a folder with `pytorch_lora_weights.safetensors`, `adapter_model.safetensors` or a single
            safetensors file, a hub id (owner/name) with one of these two, or owner/name/FILE.safetensors.

    Raises:
        ValueError: if there is no such file, or it is a pickle.
    """
    path = Path(source).expanduser()
    if path.is_file():
        refuse_pickles([path])
        return LoraFile(path, None)
    if path.is_dir():
        return LoraFile(_in_folder(path, path), None)
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+(?<!\.safetensors))(?:/(.+\.safetensors))?", str(source))
    if hub_id is None:
        raise ValueError(f"{source} does not exist and is not a hub id (owner/name or owner/name/FILE.safetensors)")
    repository, file = hub_id.groups()
    folder, commit = hub.download(repository, [*([file] if file else FILES), PEFT_CONFIG], None)
    if file and not (folder / file).is_file():
        raise ValueError(f"{repository} has no file {file}")
    return LoraFile(folder / file if file else _in_folder(folder, repository), commit)


def _in_folder(folder: Path, where: object) -> Path:
    if named := [folder / name for name in FILES if (folder / name).is_file()]:
        return named[0]
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if len(found) == 1:
        return found[0]
    refuse_pickles(sorted(folder.iterdir()))
    what = f"has {len(found)} safetensors files" if found else f"has no {' or '.join(FILES)}"
    raise ValueError(f"{where} {what}; give the file, as {where}/FILE.safetensors")
