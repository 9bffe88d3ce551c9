"""The contents of an engine or checkpoint folder, from its configs and headers; TensorRT is not needed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table

from ..checkpoint.folder import Checkpoint
from ..checkpoint.manifest import CONFIG_FILE, CheckpointManifest, rank_file
from ..checkpoint.quantization import SCALES
from ..checkpoint.tensor_file import StoredTensor, read_header
from ..config import BuildConfig, Layout
from ..engine.folder import EngineFolder, graph_file
from ..engine.graph import Graph, Value
from ..engine.inputs import declared_shape, profile_shapes
from ..engine.manifest import BuildReport
from ..engine.rehearsal import meta_weights, rehearse
from ..files import read_json
from .memory import Memory, memory_of

LARGEST = 8
"""How many of a checkpoint's largest tensors are listed."""


@dataclass(frozen=True)
class EngineReport:
    """An engine folder; sizes in bytes, times in seconds."""

    folder: EngineFolder
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    profile: dict[str, list[tuple[int, ...]]]
    """The min, opt and max shape of every input."""
    layers: dict[str, int]
    """Layers of rank 0 by TensorRT's type, the most frequent first; empty if TensorRT-LLM built the engine."""
    files: dict[str, int]
    builds: tuple[BuildReport, ...]
    """Time and memory of each rank's build; empty if TensorRT-LLM built the engine."""
    memory: Memory | None
    """GPU memory of one rank at the largest sizes of the profile; None if TensorRT-LLM built the engine."""


@dataclass(frozen=True)
class CheckpointReport:
    checkpoint: Checkpoint
    tensors: dict[str, StoredTensor]
    """Of rank 0, by name."""
    files: dict[str, int]

    @property
    def parameters(self) -> int:
        """Number of parameters in rank 0's file, without the scales of FP8."""
        return sum(math.prod(x.shape) for name, x in self.tensors.items() if not name.endswith(SCALES))

    def largest(self, count: int = LARGEST) -> list[tuple[str, StoredTensor]]:
        return sorted(self.tensors.items(), key=lambda item: -item[1].nbytes)[:count]


def inspect(folder: str | Path) -> EngineReport | CheckpointReport:
    """Read an engine folder or a checkpoint folder. Raises a one-line `ValueError` for anything else."""
    folder = Path(folder).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} is neither an engine folder nor a checkpoint folder: it has no {CONFIG_FILE}")
    config = read_json(folder / CONFIG_FILE)
    return inspect_engine(folder) if "pretrained_config" in config else inspect_checkpoint(folder)


def inspect_engine(folder: Path) -> EngineReport:
    engine = EngineFolder.open(folder)
    profile = profile_shapes(engine.architecture, engine.model, engine.build_config, engine.layout.cfg_size)
    if engine.builder == "trtllm":  # no graph file
        table = (*engine.inputs, engine.architecture.output)
        *inputs, output = (Value(x.name, engine.dtype, declared_shape(x, engine.model)) for x in table)
        return EngineReport(engine, tuple(inputs), (output,), profile, {}, _sizes(folder), (), None)
    graph = engine.graph(0)
    produced = {layer.output.name: layer.output for layer in graph.layers}
    return EngineReport(
        folder=engine,
        inputs=graph.inputs,
        outputs=tuple(produced[name] for name in graph.outputs),
        profile=profile,
        layers=dict(Counter(layer.type for layer in graph.layers).most_common()),
        files=_sizes(folder),
        builds=engine.report,
        memory=_memory(engine, graph),
    )


def _memory(engine: EngineFolder, graph: Graph) -> Memory:
    build = engine.build_config
    *_, largest = build.sizes(engine.layout.cfg_size)
    layout = engine.layout
    weights = meta_weights(engine.architecture, engine.model, layout, engine.dtype, engine.quantization)
    rehearse(engine, graph, weights, layout.at(0), engine.path / graph_file(0))
    return memory_of(graph, engine.architecture, engine.model, layout, engine.dtype, largest, build, weights)


def inspect_checkpoint(folder: Path) -> CheckpointReport:
    checkpoint = Checkpoint.open(folder)
    return CheckpointReport(checkpoint, read_header(folder / rank_file(0)), _sizes(folder))


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


# On a terminal ---------------------------------------------------------------------------------------


def print_inspection(folder: str | Path, console: Console | None = None) -> None:
    (console or Console(markup=False)).print(describe(inspect(folder)))


def describe(report: EngineReport | CheckpointReport) -> Group:
    """The report as tables."""
    return _describe_engine(report) if isinstance(report, EngineReport) else _describe_checkpoint(report)


def _describe_engine(report: EngineReport) -> Group:
    engine, build = report.folder, report.folder.build_config
    about = [
        ("model", engine.model.summary()),
        ("dtype", engine.dtype),
        ("TensorRT", engine.tensorrt or f"no plan; network defined with {engine.network_made_with}"),
        ("ranks", _layout(engine.layout, engine.layout.cp_method)),
        ("image", f"{build.min_resolution} to {build.max_resolution} pixels, optimized for {build.opt_resolution}"),
        ("text", f"{build.min_text_tokens} to {build.max_text_tokens} tokens"),
        (
            "checkpoint",
            f"{engine.checkpoint.name} ({engine.checkpoint.path} from here)" if engine.checkpoint else "not recorded",
        ),
    ]
    about += _quantization(engine)
    about += [("LoRA", str(lora)) for lora in engine.loras]
    if report.memory:
        about.append(("GPU memory", _parts_of(report.memory, build)))
    if given := engine.plan_options.given():
        about.append(("plan options", ", ".join(f"{name} {value}" for name, value in given.items())))
    tensors = _table("inputs and outputs", "name", "dtype", "shape", "min", "opt", "max")
    for (stem, dtype, shape), group in groupby(report.inputs, key=_kind):
        first, *others = [value.name for value in group]
        name = f"{first} to {others[-1].removeprefix(stem)}" if others else first
        tensors.add_row(name, dtype, _shape(shape), *map(_shape, report.profile[first]))
    for value in report.outputs:
        tensors.add_row(value.name, value.dtype, _shape(value.shape), "", "", "")
    layers = _table(f"layers of {graph_file(0)}", "type", "count")
    for kind, count in report.layers.items():
        layers.add_row(kind, str(count))
    layers.add_row("all", str(sum(report.layers.values())), style="bold")
    builds = _table("build", "rank", "layers", "plan", "defined in", "built in", "process's peak memory")
    for build in report.builds:
        builds.add_row(
            str(build.rank),
            str(build.layers),
            "none" if build.plan_bytes is None else size(build.plan_bytes),
            f"{build.define_seconds:.1f} s",
            f"{build.seconds:.1f} s",
            size(build.peak_rss_bytes),
        )
    details = [layers, builds] if report.builds else []
    return Group(_facts(engine.path, about), tensors, *details[:1], _files(report.files), *details[1:])


def _describe_checkpoint(report: CheckpointReport) -> Group:
    checkpoint = report.checkpoint
    own = checkpoint.manifest
    about = [
        ("model", checkpoint.model.summary()),
        ("dtype", checkpoint.dtype),
        ("ranks", _layout(checkpoint.layout)),
        ("rank 0", f"{len(report.tensors)} tensors, {report.parameters:,} parameters"),
        ("source", _source(checkpoint.config.get("model_path"), own)),
    ]
    about += _quantization(checkpoint)
    if own:
        about += [("LoRA", str(lora)) for lora in own.loras]
        if own.calibration:
            prompts, steps = own.calibration.prompts, own.calibration.steps
            about.append(("calibration", f"{prompts} prompt{'s' * (prompts != 1)}, {steps} steps each"))
        about.append(("created with", ", ".join(f"{k} {v}" for k, v in own.versions.items() if v)))
    config = _table("config", "field", "value")
    for name, value in checkpoint.model.model_dump().items():
        config.add_row(name, str(value))
    largest = _table(f"largest tensors of {rank_file(0)}", "name", "shape", "size")
    for name, tensor in report.largest():
        largest.add_row(name, _shape(tensor.shape), size(tensor.nbytes))
    return Group(_facts(checkpoint.path, about), config, largest, _files(report.files))


def _parts_of(memory: Memory, build: BuildConfig) -> str:
    image, tokens = build.max_resolution, build.max_text_tokens
    sizes = f"per rank, at batch {build.max_batch_size}, {image} pixels and {tokens} text tokens (pytorch backend)"
    parts = {"weights": memory.weights, "activations": memory.activations}
    parts |= {"symmetric memory": memory.exchange} if memory.exchange else {}
    parts |= {"computed ahead": memory.ahead} if memory.ahead else {}
    return f"{sizes}: {', '.join(f'{name} {size(nbytes)}' for name, nbytes in parts.items())}"


def _quantization(folder: EngineFolder | Checkpoint) -> list[tuple[str, str]]:
    scheme = folder.quantization
    if scheme.quant_algo is None:
        return []
    count = len(scheme.modules(folder.architecture, folder.model))
    attention = " and in attention" if isinstance(folder, EngineFolder) and folder.build_config.fp8_attention else ""
    without = ", ".join(scheme.exclude_modules or ("none",))
    return [("quantization", f"{scheme.quant_algo} in {count} linear layers{attention}; excluded: {without}")]


def _kind(value: Value) -> tuple[str, str, tuple[int, ...]]:
    """Equal for inputs that differ only in the number at the end of their names."""
    return value.name.rstrip("0123456789"), value.dtype, value.shape


def _source(path: str | None, own: CheckpointManifest | None) -> str:
    """Where the weights came from; TensorRT-LLM's converter records only the path."""
    found = {key: getattr(own, key, None) for key in ("revision", "variant", "source_dtype")}
    return ", ".join([path or "not recorded", *(f"{key} {value}" for key, value in found.items() if value)])


def _layout(layout: Layout, cp_method: str | None = None) -> str:
    """`cp_method` is None for a checkpoint, because it is chosen when building."""
    sizes = f"{layout.world_size} (tp {layout.tp_size}, cp {layout.cp_size}, cfg {layout.cfg_size}"
    if layout.tp_size > 1:
        sizes += f"; weights sharded as {layout.tp_layout}"
    if layout.cp_size > 1 and cp_method:
        sizes += f"; cp by {cp_method}"
    return f"{sizes})"


def _facts(folder: Path, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=str(folder), title_justify="left", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _files(files: dict[str, int]) -> Table:
    table = _table("files", "name", "size")
    for name, nbytes in files.items():
        table.add_row(name, size(nbytes))
    table.add_row("all", size(sum(files.values())), style="bold")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = column in ("count", "size", "plan", "defined in", "built in", "process's peak memory", "layers")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=column == "name", overflow="fold")
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join("?" if n == -1 else str(n) for n in shape)


def size(nbytes: int) -> str:
    """'4.57 GB', '12.3 kB'; decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} B"
