"""`build`: from a checkpoint to an engine folder with one plan and one graph file per rank."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

from ..architecture import ModelConfig
from ..checkpoint.folder import Checkpoint
from ..checkpoint.manifest import CONFIG_FILE, OWN_KEY, version_of
from ..config import BuildConfig, CpMethod, Layout, RankMapping, Resolution
from ..files import FileRecord, complete_folder, write_synced
from ..files.records import to_json
from ..network.network import Network
from ..network.trt import installed, trt
from .folder import FORMAT_VERSION, checkpoint_reference, graph_file, is_engine_folder, plan_file
from .inputs import check_build, declared_shape, input_dtype, profile_shapes
from .logger import build_progress, logger
from .read_network import read_network


def build(
    checkpoint_dir: str | Path = "tllm_checkpoint",
    output_dir: str | Path = "engine_outputs",
    *,
    max_batch_size: int = 2,
    min_resolution: str | None = None,
    opt_resolution: str | None = None,
    max_resolution: str | None = None,
    min_text_tokens: int = 77,
    opt_text_tokens: int = 333,
    max_text_tokens: int = 589,
    cp_size: int | None = None,
    cfg_size: int | None = None,
    cp_method: CpMethod = "allgather",
    compute_capability: tuple[str, ...] = (),
    plan: bool = True,
    progress: bool = True,
) -> Path:
    """Build one TensorRT plan and one graph file per rank from a checkpoint folder.

    `tensorrt_rtx` needs no GPU for this. The folder appears only when every rank is built.

    Args:
        checkpoint_dir: a checkpoint folder of `convert` or of TensorRT-LLM (<= 1.2.1).
        output_dir: the engine folder to write.
        max_batch_size: rows of the largest batch; classifier-free guidance uses two per image.
        min_resolution: smallest image, HEIGHTxWIDTH in pixels; by default a quarter of the model's default side.
        opt_resolution: the size to optimize for; by default the model's.
        max_resolution: largest image; by default 1.5 times the model's default side.
        min_text_tokens: length of the shortest text.
        opt_text_tokens: text length to optimize for; 77 CLIP and 256 T5 tokens are diffusers' default.
        max_text_tokens: length of the longest text; 589 is 77 CLIP and 512 T5 tokens.
        cp_size: ranks of context parallelism; by default the checkpoint's.
        cfg_size: 2 for CFG parallelism; by default the checkpoint's.
        cp_method: allgather (keys and values are gathered) or ulysses (heads are scattered).
        compute_capability: GPUs to build for, for instance 8.9 12.0 (tensorrt_rtx only, which has a default list).
        plan: with --no-plan only the graph files for the pytorch backend are written.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: if checkpoint, layout and profile do not match, or TensorRT rejects the network.
    """
    checkpoint = Checkpoint.open(checkpoint_dir)
    own = checkpoint.layout
    changes = {
        "cp_size": own.cp_size if cp_size is None else cp_size,
        "cfg_size": own.cfg_size if cfg_size is None else cfg_size,
        "cp_method": cp_method,
    }
    layout = Layout.parse(own.model_dump() | changes, "parallel layout")
    low, middle, high = default_resolutions(checkpoint.model, checkpoint.vae_scale_factor)
    config = BuildConfig.parse(
        {
            "max_batch_size": max_batch_size,
            "min_resolution": Resolution.read(low if min_resolution is None else min_resolution),
            "opt_resolution": Resolution.read(middle if opt_resolution is None else opt_resolution),
            "max_resolution": Resolution.read(high if max_resolution is None else max_resolution),
            "min_text_tokens": min_text_tokens,
            "opt_text_tokens": opt_text_tokens,
            "max_text_tokens": max_text_tokens,
            "vae_scale_factor": checkpoint.vae_scale_factor,
        },
        "build options",
    )
    check_build(checkpoint.model, config, layout)
    output = Path(output_dir).expanduser()
    with complete_folder(output, "engine folder", is_engine_folder) as partial:
        checkpoint.verify()
        report = [
            build_rank(checkpoint, mapping, config, partial, compute_capability, plan, progress)
            for mapping in layout.ranks()
        ]
        content = _config(checkpoint, layout, config, partial, output, plan, report)
        write_synced(partial / CONFIG_FILE, json.dumps(content, indent=2) + "\n")
    return output


def default_resolutions(model: ModelConfig, vae_scale_factor: int) -> tuple[Resolution, ...]:
    """(min, opt, max): a quarter of the model's default side, that side, 1.5 times it; at most its position table."""
    step, most = model.pixel_step(vae_scale_factor), model.max_side(vae_scale_factor)
    side = model.default_side(vae_scale_factor)
    sides = (max(step, side // 4), min(side, most), min(side * 3 // 2, most))
    return tuple(Resolution(height=s // step * step, width=s // step * step) for s in sides)


def define(definition, checkpoint: Checkpoint, mapping: RankMapping, config: BuildConfig) -> Network:
    """Add one rank's full network to an empty `INetworkDefinition`. The result owns the weights' memory."""
    architecture, model = checkpoint.architecture, checkpoint.model
    network = Network(
        definition,
        weights=checkpoint.weights(mapping.tp_rank),
        dtype=checkpoint.dtype,
        mapping=mapping,
        sharding=architecture.shardings[mapping.layout.tp_layout],
    )
    inputs = {
        x.name: network.input(x.name, input_dtype(x, checkpoint.dtype), declared_shape(x, model))
        for x in architecture.inputs
    }
    network.output(architecture.define(model, inputs, config), architecture.output.name)
    return network


def build_rank(
    checkpoint: Checkpoint,
    mapping: RankMapping,
    config: BuildConfig,
    folder: Path,
    capabilities: tuple[str, ...],
    plan: bool,
    progress: bool,
) -> dict:
    """Write one rank's graph file and plan; returns a report of sizes and times."""
    start = time.perf_counter()
    logger().errors.clear()  # of an earlier build
    builder = trt.Builder(logger())
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network = define(definition, checkpoint, mapping, config)
    graph = read_network(definition, network.module_outputs())
    graph.save(folder / graph_file(mapping.rank))
    report = {"rank": mapping.rank, "layers": len(graph.layers), "define_seconds": time.perf_counter() - start}
    if plan:
        shapes = profile_shapes(checkpoint.architecture, checkpoint.model, config, mapping.cfg_size)
        options = builder_config(builder, checkpoint.dtype, shapes, capabilities)
        with build_progress(f"build rank {mapping.rank}", progress) as monitor:
            options.progress_monitor = monitor
            serialized = builder.build_serialized_network(definition, options)
        if serialized is None:
            raise ValueError(f"TensorRT built no plan for rank {mapping.rank}: {logger().last_error()}")
        write_synced(folder / plan_file(mapping.rank), memoryview(serialized))
        report["plan_bytes"] = serialized.nbytes
    report["seconds"] = time.perf_counter() - start
    report["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report


def builder_config(builder, dtype: str, shapes: dict[str, list[tuple[int, ...]]], capabilities: tuple[str, ...]):
    """An `IBuilderConfig` with one optimization profile."""
    options = builder.create_builder_config()
    if dtype == "float32":
        options.clear_flag(trt.BuilderFlag.TF32)  # full float32 precision
    profile = builder.create_optimization_profile()
    for name, (low, middle, high) in shapes.items():
        profile.set_shape(name, low, middle, high)
    options.add_optimization_profile(profile)
    if not capabilities:
        return options
    if not hasattr(options, "set_compute_capability"):
        raise ValueError(
            f"compute_capability: {installed()} builds for the local GPU only; tensorrt_rtx accepts a list"
        )
    options.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
        if member is None:
            legal = [m.removeprefix("SM") for m in trt.ComputeCapability.__members__ if m.startswith("SM")]
            raise ValueError(f"compute_capability {capability}: use {', '.join(f'{m[:-1]}.{m[-1]}' for m in legal)}")
        options.set_compute_capability(member, i)
    return options


def _config(
    checkpoint: Checkpoint, layout: Layout, config: BuildConfig, folder: Path, output: Path, plan: bool, report: list
) -> dict:
    sizes = {"tp_size": layout.tp_size, "cp_size": layout.cp_size, "world_size": layout.tp_size * layout.cp_size}
    pretrained = checkpoint.config | {"mapping": checkpoint.config["mapping"] | sizes}
    pretrained.pop(OWN_KEY, None)
    return {
        "version": version_of("mmdit_lib"),
        "pretrained_config": pretrained,
        "build_config": config.model_dump(mode="json") | {"cp_method": layout.cp_method},
        OWN_KEY: {
            "format_version": FORMAT_VERSION,
            "tensorrt": installed() if plan else None,
            "network_made_with": installed(),
            "tp_layout": layout.tp_layout,
            "cfg_size": layout.cfg_size,
            "checkpoint": checkpoint_reference(checkpoint, output),
            "report": report,
            "files": to_json({path.name: FileRecord.of(path) for path in sorted(folder.iterdir())}),
        },
    }
