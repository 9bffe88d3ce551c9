"""The engine folder: `rank{r}.engine`, `rank{r}.graph.json` and `config.json`, as TensorRT-LLM lays it out."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..checkpoint.manifest import CONFIG_FILE, OWN_KEY, keys_in, rank_file
from ..checkpoint.source import read_json
from ..checkpoint.tensor_file import sha256_of
from ..config import BuildConfig, Dtype, Mapping, ModelConfig, TpLayout
from .graph import Graph

FORMAT_VERSION = 1


def plan_file(rank: int) -> str:
    return f"rank{rank}.engine"


def graph_file(rank: int) -> str:
    return f"rank{rank}.graph.json"


def is_engine_folder(folder: Path) -> bool:
    """Whether `folder` holds an engine folder, ours or TensorRT-LLM's, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    if {name for name in names if not re.fullmatch(r"rank\d+\.(engine|graph\.json)", name)} != {CONFIG_FILE}:
        return False
    keys = keys_in(folder / CONFIG_FILE)
    return {"pretrained_config", "build_config"} <= keys and (OWN_KEY in keys or plan_file(0) in names)


@dataclass(frozen=True)
class EngineFolder:
    """What `build` wrote, checked against its config."""

    folder: Path
    model: ModelConfig
    dtype: Dtype
    mapping: Mapping
    """At rank 0; `mapping.at(rank)` is another rank's."""
    tp_layout: TpLayout
    build: BuildConfig
    tensorrt: str | None
    """Package and version that made the plans, for instance 'tensorrt_rtx 1.7.1.116'; None: no plans."""
    files: dict[str, dict[str, Any]]
    """{file: {sha256, bytes}}."""
    checkpoint: dict[str, Any]
    """Where the weights lay, relative to the folder and by name, and the checksums of their files."""
    config: dict[str, Any]
    """`config.json` as it stands."""

    @classmethod
    def open(cls, folder: str | Path) -> EngineFolder:
        """Read the config. Raises `ValueError`, in one line, where this is no engine folder."""
        folder = Path(folder).expanduser()
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise ValueError(f"{folder} is not an engine folder: it has no {CONFIG_FILE}; `mmdit build` writes one")
        config = read_json(path)
        if "architecture" in config and "pretrained_config" not in config:
            raise ValueError(
                f"{folder} is a checkpoint folder; `mmdit build --checkpoint_dir {folder}` makes an engine folder of it"
            )
        try:
            return _interpret(folder, config)
        except KeyError as error:
            raise ValueError(f"{path} is not the config of an engine folder of mmdit_lib: no valid {error}") from None

    def verify(self, *names: str) -> None:
        """Compare size and checksum of the named files or of all. Raises `ValueError` naming the first that differs."""
        for name in names or self.files:
            path, written = self.folder / name, self.files.get(name)
            if written is None or not path.is_file():
                raise ValueError(f"{path} is missing")
            found = path.stat().st_size
            if found != written["bytes"]:
                raise ValueError(f"{path} has changed: expected {written['bytes']} bytes, found {found}")
            digest = sha256_of(path)
            if digest != written["sha256"]:
                raise ValueError(f"{path} has changed: its sha256 is {digest}, {CONFIG_FILE} says {written['sha256']}")

    def graph(self, rank: int, *, verify: bool = True) -> Graph:
        if verify:
            self.verify(graph_file(rank))
        return Graph.load(self.folder / graph_file(rank))

    def open_checkpoint(
        self, checkpoint_dir: str | Path | None = None, *, verify: bool = True, tp_rank: int | None = None
    ) -> Checkpoint:
        """The checkpoint that the folder was built from.

        Looked for in `checkpoint_dir`, then where it lay relative to this folder, then beside this
        folder under its name.

        Args:
            verify: read the files through and compare their checksums.
            tp_rank: the only one whose file is verified; all if not given.

        Raises:
            ValueError: if it is not there, or is another one.
        """
        places = [checkpoint_dir] if checkpoint_dir else [
            self.folder / self.checkpoint["path"], self.folder.resolve().parent / self.checkpoint["name"],
        ]  # fmt: skip
        places = [Path(place).expanduser() for place in places]
        found = next((place for place in places if (place / CONFIG_FILE).is_file()), None)
        if found is None:
            tried = " and ".join(map(str, places))
            raise ValueError(
                f"the pytorch backend reads the weights from the checkpoint '{self.checkpoint['name']}', which is not "
                f"at {tried}; say where it is with --checkpoint_dir"
            )
        checkpoint = Checkpoint.open(found)
        # What TensorRT-LLM wrote has no checksums of its own: those of the build are compared.
        for name, built_from in self.checkpoint["files"].items():
            written = checkpoint.files.get(name, built_from)
            if written != built_from:
                raise ValueError(f"{found / name} is not the file that {self.folder} was built from; build again")
            wanted = verify and (tp_rank is None or name == rank_file(tp_rank))
            if wanted and sha256_of(found / name) != built_from["sha256"]:
                raise ValueError(f"{found / name} has changed since {self.folder} was built from it")
        return checkpoint


def _interpret(folder: Path, config: dict[str, Any]) -> EngineFolder:
    """Raises `KeyError` with the key that is missing, or whose value is of another type."""
    own, pretrained, options = (_entry(config, key, dict) for key in (OWN_KEY, "pretrained_config", "build_config"))
    version = _entry(own, "format_version", int)
    if version > FORMAT_VERSION:
        raise ValueError(f"{folder} has format {version}; this version reads up to {FORMAT_VERSION}")
    where = str(folder / CONFIG_FILE)
    mapping = _entry(pretrained, "mapping", dict)
    sizes = {"tp_size": mapping["tp_size"], "cp_size": mapping["cp_size"], "cfg_size": own["cfg_size"]}
    return EngineFolder(
        folder=folder,
        model=ModelConfig.parse({key: pretrained[key] for key in ModelConfig.model_fields}, where),
        dtype=_entry(pretrained, "dtype", str),
        mapping=Mapping.parse(sizes, where),
        tp_layout=_entry(own, "tp_layout", str),
        build=BuildConfig.parse({k: v for k, v in options.items() if k in BuildConfig.model_fields}, where),
        tensorrt=own["tensorrt"],
        files=_entry(own, "files", dict),
        checkpoint=_entry(own, "checkpoint", dict),
        config=config,
    )


def _entry(values: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(values[key], kind):
        raise KeyError(key)
    return values[key]


def checkpoint_reference(checkpoint: Checkpoint, engine_dir: Path) -> dict[str, Any]:
    """What an engine folder says of the checkpoint that it was built from."""
    paths = [checkpoint.folder / rank_file(rank) for rank in range(checkpoint.tp_size)]
    files = checkpoint.files or {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in paths}
    folder = checkpoint.folder.resolve()
    return {"name": folder.name, "path": os.path.relpath(folder, engine_dir.resolve()), "files": files}
