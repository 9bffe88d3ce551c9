"""The engine folder: `rank{r}.engine` and `config.json` as in TensorRT-LLM, and `rank{r}.graph.json`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import models
from ..architecture import Architecture, Input, ModelConfig
from ..checkpoint.folder import Checkpoint
from ..checkpoint.manifest import CONFIG_FILE, OWN_KEY, LoraRecord, loras_entry, rank_file
from ..checkpoint.quantization import NONE, Quantization
from ..config import BuildConfig, Builder, Dtype, Layout, PlanOptions, Resolution, shown
from ..files import FileRecord, Files, read_json
from ..files.records import keys_in, to_json
from .graph import Graph
from .inputs import check_build, check_interface
from .manifest import BuildReport, CheckpointReference, EngineConfig, TrtllmConfig

TRTLLM = "tensorrt_llm"
TRTLLM_TEXT_TOKENS = 333
"""The text length of TensorRT-LLM's engines: 77 CLIP and 256 T5 tokens."""


def plan_file(rank: int) -> str:
    return f"rank{rank}.engine"


def graph_file(rank: int) -> str:
    return f"rank{rank}.graph.json"


def is_engine_folder(folder: Path) -> bool:
    """Whether `folder` is an engine folder, ours or TensorRT-LLM's, and contains nothing else."""
    names = {path.name for path in folder.iterdir()}
    if {name for name in names if not re.fullmatch(r"rank\d+\.(engine|graph\.json)", name)} != {CONFIG_FILE}:
        return False
    keys = keys_in(folder / CONFIG_FILE)
    return {"pretrained_config", "build_config"} <= keys and (OWN_KEY in keys or plan_file(0) in names)


@dataclass(frozen=True)
class EngineFolder:
    """An engine folder written by `build` or by TensorRT-LLM's `trtllm-build`, with a valid config."""

    path: Path
    architecture: Architecture
    model: ModelConfig
    dtype: Dtype
    layout: Layout
    build_config: BuildConfig
    builder: Builder
    tensorrt: str | None
    """Package and version that built the plans, for instance 'tensorrt_rtx 1.7.1.116'; None: no plans."""
    plan_options: PlanOptions
    files: Files
    """Empty if TensorRT-LLM alone wrote the folder."""
    checkpoint: CheckpointReference | None
    """None if TensorRT-LLM alone wrote the folder."""
    config: dict[str, Any]
    """The content of `config.json`."""
    network_made_with: str | None = None
    """Package and version that defined the network."""
    quantization: Quantization = NONE
    report: tuple[BuildReport, ...] = ()
    """Time and memory of each rank's build; empty if TensorRT-LLM built the folder."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs of every rank's network."""
        return self.architecture.inputs_of(self.model, self.build_config)

    @property
    def loras(self) -> tuple[LoraRecord, ...]:
        """The LoRAs that `convert` fused into the checkpoint."""
        return self.checkpoint.loras if self.checkpoint else ()

    @classmethod
    def open(cls, folder: str | Path) -> EngineFolder:
        """Read the config. Raises a one-line `ValueError` if this is not an engine folder."""
        folder = Path(folder).expanduser()
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise ValueError(f"{folder} is not an engine folder: it has no {CONFIG_FILE}; `mmdit build` writes one")
        config = read_json(path)
        if "architecture" in config and "pretrained_config" not in config:
            raise ValueError(
                f"{folder} is a checkpoint folder; build an engine from it: mmdit build --checkpoint_dir {folder}"
            )
        return _interpret_trtllm(folder, config) if _by_trtllm(config) else _interpret(folder, config)

    def verify(self, *names: str) -> None:
        """Compare size and checksum of the named files, or of all. Raises `ValueError` for the first that differs."""
        for name in names or self.files:
            if name not in self.files:
                raise ValueError(f"{self.path / name} is missing")
            self.files[name].verify(self.path)

    def graph(self, rank: int, *, verify: bool = True) -> Graph:
        """One rank's network. Raises `ValueError` if its file is damaged; `verify=False` skips the checksum."""
        path = self.path / graph_file(rank)
        if verify:
            self.verify(path.name)
        graph = Graph.load(path)
        check_interface(self, graph, path)
        return graph

    def fingerprint(self) -> dict[str, str]:
        """What all ranks must have in common: each part of the folder and its checksum."""
        parts = {name: file.sha256 for name, file in self.files.items()}
        if self.checkpoint:
            parts |= {f"checkpoint {name}": file.sha256 for name, file in self.checkpoint.files.items()}
        configs = {"model": self.model, "build options": self.build_config, "parallel layout": self.layout}
        for name, value in configs.items():
            text = json.dumps(value.model_dump(mode="json"), sort_keys=True)
            parts[name] = hashlib.sha256(text.encode()).hexdigest()
        return parts

    def open_checkpoint(
        self, checkpoint_dir: str | Path | None = None, *, verify: bool = True, tp_rank: int | None = None
    ) -> Checkpoint:
        """The checkpoint that the folder was built from.

        It is searched for in `checkpoint_dir` or, if that is not given, at its original path relative to this
        folder, then next to this folder under its name.

        Args:
            verify: compare the checksums of the files.
            tp_rank: verify only this tp rank's file; all files if not given.

        Raises:
            ValueError: if it is not found, or is not the one that this folder was built from.
        """
        if self.checkpoint is None:
            raise ValueError(f"{self.path} does not say which checkpoint it was built from: trtllm-build wrote it")
        places = [checkpoint_dir] if checkpoint_dir else [
            self.path / self.checkpoint.path, self.path.resolve().parent / self.checkpoint.name,
        ]  # fmt: skip
        places = [Path(place).expanduser() for place in places]
        found = next((place for place in places if (place / CONFIG_FILE).is_file()), None)
        if found is None:
            tried = " and ".join(map(str, places))
            raise ValueError(
                f"weights are read from the checkpoint '{self.checkpoint.name}', which is not "
                f"at {tried}; give its path with --checkpoint_dir"
            )
        checkpoint = Checkpoint.open(found)
        parts = {
            "model or dtype": ((checkpoint.model, checkpoint.dtype), (self.model, self.dtype)),
            "quantization": (checkpoint.quantization, self.quantization),
        }
        for part, (theirs, mine) in parts.items():
            if theirs != mine:
                raise ValueError(f"{found} has a different {part} from the checkpoint that {self.path} was built from")
        # TensorRT-LLM's checkpoints have no checksums; those recorded by the build are compared.
        for name, built_from in self.checkpoint.files.items():
            if checkpoint.files.get(name, built_from) != built_from:
                raise ValueError(f"{found / name} is not the file that {self.path} was built from; build again")
            if verify and (tp_rank is None or name == rank_file(tp_rank)):
                built_from.verify(found)
        return checkpoint


def _interpret(folder: Path, config: dict[str, Any]) -> EngineFolder:
    where = folder / CONFIG_FILE
    content = EngineConfig.parse(config, f"{where} is not the config of an engine folder of mmdit_lib")
    pretrained, options, own = content.pretrained_config, content.build_config, content.mmdit_lib
    architecture = models.find(pretrained.architecture, folder)
    pretrained.check_dtype(folder)
    model = architecture.config.parse_known(config["pretrained_config"], where)
    parallel = {"cfg_size": own.cfg_size, "tp_layout": own.tp_layout, "cp_method": options.cp_method}
    layout = Layout.parse(pretrained.mapping.model_dump() | parallel, f"{where}: mapping")
    build = BuildConfig(**{key: getattr(options, key) for key in BuildConfig.model_fields})
    try:
        check_build(model, build, layout)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _require_records(own.files, [graph_file(m.rank) for m in layout.ranks()], f"{where}: mmdit_lib.files")
    tp_files = [rank_file(rank) for rank in range(layout.tp_size)]
    _require_records(own.checkpoint.files, tp_files, f"{where}: mmdit_lib.checkpoint.files")
    return EngineFolder(
        path=folder,
        architecture=architecture,
        model=model,
        dtype=pretrained.dtype,
        layout=layout,
        build_config=build,
        builder="tensorrt",
        tensorrt=own.tensorrt,
        plan_options=own.plan_options,
        files=own.files,
        checkpoint=own.checkpoint,
        config=config,
        network_made_with=own.network_made_with,
        quantization=pretrained.quantized,
        report=own.report,
    )


def _require_records(files: Files, names: list[str], where: str) -> None:
    if missing := [name for name in names if name not in files]:
        raise ValueError(f"{where}: no record of {missing[0]} among {shown(list(files))}")


def _by_trtllm(config: dict[str, Any]) -> bool:
    """Whether `trtllm-build` wrote the folder; `build` adds our key if it ran the command."""
    if OWN_KEY in config:
        return isinstance(config[OWN_KEY], dict) and config[OWN_KEY].get("builder") == "trtllm"
    options = config.get("build_config")
    return isinstance(options, dict) and "opt_resolution" not in options


def _interpret_trtllm(folder: Path, config: dict[str, Any]) -> EngineFolder:
    """As `_interpret`. These engines have one image size and text length, and every input has the model's dtype."""
    where = folder / CONFIG_FILE
    content = TrtllmConfig.parse(config, f"{where} is not the config of an engine folder of TensorRT-LLM")
    pretrained, own = content.pretrained_config, content.mmdit_lib
    architecture = models.find(pretrained.architecture, folder)
    pretrained.check_dtype(folder)
    if pretrained.quantized.quant_algo:
        raise ValueError(f"{folder}: TensorRT-LLM's engines of this model are not quantized")
    model = architecture.config.parse_known(config["pretrained_config"], where)
    layout = Layout.parse(pretrained.mapping.model_dump() | {"tp_layout": "trtllm"}, f"{where}: mapping")
    model.check_layout(layout)
    scale, batch = architecture.vae_scale_factor, content.build_config.max_batch_size
    side = model.default_side(scale)
    size = Resolution.parse({"height": side, "width": side}, f"{where}: the model's default resolution")
    inputs = tuple(replace(tensor, dtype=None) for tensor in architecture.inputs)
    return EngineFolder(
        path=folder,
        architecture=replace(architecture, inputs=inputs),
        model=model,
        dtype=pretrained.dtype,
        layout=layout,
        build_config=BuildConfig.one_size(size, batch, TRTLLM_TEXT_TOKENS, vae_scale_factor=scale),
        builder="trtllm",
        tensorrt=f"{TRTLLM} {content.version}",
        plan_options=PlanOptions(),
        files=own.files if own else {},
        checkpoint=own.checkpoint if own else None,
        config=config,
    )


def checkpoint_reference(checkpoint: Checkpoint, engine_dir: Path) -> dict[str, Any]:
    """What an engine folder's config records about the checkpoint that it was built from."""
    files = checkpoint.files or {name: FileRecord.of(checkpoint.path / name) for name in checkpoint.rank_files}
    folder = checkpoint.path.resolve()
    place = {"name": folder.name, "path": os.path.relpath(folder, engine_dir.resolve())}
    own = checkpoint.manifest
    downloaded = {"revision": own.revision} if own and own.revision else {}
    return {**place, "files": to_json(files), **loras_entry(own.loras if own else ()), **downloaded}
