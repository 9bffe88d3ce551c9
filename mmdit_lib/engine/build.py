"""`build`: from a checkpoint to an engine folder with one plan and one graph file per rank."""

from __future__ import annotations

import inspect
import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architecture import ModelConfig
from ..checkpoint.folder import Checkpoint
from ..checkpoint.manifest import CONFIG_FILE, FORMAT_VERSION, OWN_KEY, version_of
from ..config import BuildConfig, Builder, CpMethod, Layout, PlanOptions, RankMapping, Resolution
from ..files import FileRecord, complete_folder, write_synced
from ..files.records import to_json
from ..network.network import Network
from ..network.trt import Features, installed, installed_features, trt
from . import trtllm
from .builder_config import builder_config, check_options, save_timing_cache
from .folder import checkpoint_reference, graph_file, is_engine_folder, plan_file
from .inputs import check_build, declared_shape, input_dtype, profile_shapes
from .logger import build_progress, logger
from .read_network import read_network

NO_OPTIONS = PlanOptions()


def build(
    checkpoint_dir: str | Path = "tllm_checkpoint",
    output_dir: str | Path = "engine_outputs",
    *,
    max_batch_size: int = 2,
    opt_batch_size: int | None = None,
    min_resolution: str | None = None,
    opt_resolution: str | None = None,
    max_resolution: str | None = None,
    min_text_tokens: int = 77,
    opt_text_tokens: int = 333,
    max_text_tokens: int = 589,
    cp_size: int | None = None,
    cfg_size: int | None = None,
    cp_method: CpMethod = "allgather",
    skip_layers: bool = False,
    controlnet_residuals: int = 0,
    fp8_attention: bool = False,
    builder: Builder = "tensorrt",
    compute_capability: tuple[str, ...] = (),
    attention_layer: bool = True,
    plan: bool = True,
    plan_options: PlanOptions = NO_OPTIONS,
    progress: bool = True,
) -> Path:
    """Build one TensorRT plan and one graph file per rank from a checkpoint folder.

    `tensorrt_rtx` needs no GPU for this. The folder appears only when every rank is built.

    Args:
        checkpoint_dir: a checkpoint folder of `convert` or of TensorRT-LLM (<= 1.2.1).
        output_dir: the engine folder to write.
        max_batch_size: rows of the largest batch; classifier-free guidance uses two per image.
        opt_batch_size: rows to optimize for; by default half of max_batch_size, rounded up to a multiple of cfg_size.
        min_resolution: smallest image, HEIGHTxWIDTH in pixels; by default a quarter of the model's default side.
        opt_resolution: the size to optimize for; by default the model's.
        max_resolution: largest image; by default 1.5 times the model's default side.
        min_text_tokens: length of the shortest text.
        opt_text_tokens: text length to optimize for; 77 CLIP and 256 T5 tokens are diffusers' default.
        max_text_tokens: length of the longest text; 589 is 77 CLIP and 512 T5 tokens.
        cp_size: ranks of context parallelism; by default the checkpoint's.
        cfg_size: 2 for CFG parallelism; by default the checkpoint's.
        cp_method: allgather (keys and values are gathered) or ulysses (heads are scattered).
        skip_layers: allow calls to skip blocks, for skip-layer guidance.
        controlnet_residuals: add inputs for a ControlNet with this many blocks (its num_layers); 0 for none.
        fp8_attention: attention in FP8 too, which is faster and less exact; needs a checkpoint in FP8, and no context
            parallelism.
        builder: tensorrt, or trtllm to run TensorRT-LLM's trtllm-build: one image size, 333 text tokens, and the
            checkpoint's layout; of the other options it takes only max_batch_size.
        compute_capability: GPUs to build for, for instance 8.9 12.0 (tensorrt_rtx only, which has a default list).
        attention_layer: use TensorRT's attention layer, if it has one; --no-attention_layer defines attention as two
            matrix products and a softmax, as TensorRT 10 needs.
        plan: with --no-plan only the graph files for the pytorch backend are written.
        plan_options: how TensorRT builds the plan; recorded in the folder.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: if checkpoint, layout and profile do not match, or TensorRT rejects the network.
    """
    if builder == "trtllm":
        refuse_for_trtllm(locals())
        return trtllm.build(checkpoint_dir, output_dir, max_batch_size)
    check_options(plan_options)
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
            "opt_batch_size": opt_batch_size,
            "min_resolution": Resolution.read(low if min_resolution is None else min_resolution),
            "opt_resolution": Resolution.read(middle if opt_resolution is None else opt_resolution),
            "max_resolution": Resolution.read(high if max_resolution is None else max_resolution),
            "min_text_tokens": min_text_tokens,
            "opt_text_tokens": opt_text_tokens,
            "max_text_tokens": max_text_tokens,
            "vae_scale_factor": checkpoint.vae_scale_factor,
            "skip_layers": skip_layers,
            "controlnet_residuals": controlnet_residuals,
            "fp8_attention": fp8_attention,
        },
        "build options",
    )
    check_build(checkpoint.model, config, layout)
    check_fp8_attention(checkpoint, config)
    check_collectives(layout)
    output = Path(output_dir).expanduser()
    with complete_folder(output, "engine folder", is_engine_folder) as partial:
        checkpoint.verify()
        usable = installed_features()
        usable = usable._replace(attention=usable.attention and attention_layer)
        job = Job(checkpoint, config, usable, plan, compute_capability, plan_options, progress)
        report = [build_rank(job, mapping, partial) for mapping in layout.ranks()]
        content = _config(job, layout, partial, output, report)
        write_synced(partial / CONFIG_FILE, json.dumps(content, indent=2) + "\n")
    return output


@dataclass(frozen=True)
class Job:
    """What all ranks of a build have in common."""

    checkpoint: Checkpoint
    config: BuildConfig
    features: Features
    plan: bool
    compute_capability: tuple[str, ...]
    plan_options: PlanOptions
    progress: bool


def refuse_for_trtllm(arguments: dict[str, Any]) -> None:
    """Raises `ValueError` naming the first argument of `build` that is given and that `trtllm-build` does not take."""
    taken = {"builder", "checkpoint_dir", "output_dir", "max_batch_size", "progress"}
    for name, parameter in inspect.signature(build).parameters.items():
        if name not in taken and arguments[name] != parameter.default:
            given = ", ".join(arguments[name].given()) if name == "plan_options" else name
            raise ValueError(
                f"{given}: not an option of builder trtllm, which takes max_batch_size only; image size and text "
                "length are fixed, and the layout is the checkpoint's"
            )


def check_fp8_attention(checkpoint: Checkpoint, config: BuildConfig) -> None:
    """Raises `ValueError` if attention should be in FP8, but no weight is; the network refuses the rest."""
    if config.fp8_attention and checkpoint.quantization.quant_algo is None:
        raise ValueError(f"fp8_attention: {checkpoint.path} is not in FP8; convert with --quantization fp8")


def check_collectives(layout: Layout) -> None:
    """Raises `ValueError` if the layout has several ranks and the installed TensorRT cannot connect them."""
    if layout.world_size > 1 and not installed_features().collectives:
        raise ValueError(
            f"{installed()} has no collectives, which {layout.world_size} ranks need: pip install 'tensorrt>=11', "
            "or tensorrt-rtx-cu13"
        )


def default_resolutions(model: ModelConfig, vae_scale_factor: int) -> tuple[Resolution, ...]:
    """(min, opt, max): a quarter of the model's default side, that side, 1.5 times it; at most its position table."""
    step, most = model.pixel_step(vae_scale_factor), model.max_side(vae_scale_factor)
    side = model.default_side(vae_scale_factor)
    sides = [max(step, min(s, most) // step * step) for s in (side // 4, side, side * 3 // 2)]
    return tuple(Resolution.parse({"height": s, "width": s}, "the model's default resolution") for s in sides)


def define(
    definition, checkpoint: Checkpoint, mapping: RankMapping, config: BuildConfig, features: Features | None = None
) -> Network:
    """Add one rank's full network to an empty `INetworkDefinition`. The result owns the weights' memory."""
    architecture, model = checkpoint.architecture, checkpoint.model
    network = Network(
        definition,
        weights=checkpoint.weights(mapping.tp_rank),
        dtype=checkpoint.dtype,
        mapping=mapping,
        sharding=architecture.shardings[mapping.layout.tp_layout],
        features=features,
        fp8_attention=config.fp8_attention,
    )
    inputs = {
        x.name: network.input(x.name, input_dtype(x, checkpoint.dtype), declared_shape(x, model))
        for x in architecture.inputs_of(model, config)
    }
    network.output(architecture.define(model, inputs, config), architecture.output.name)
    return network


def build_rank(job: Job, mapping: RankMapping, folder: Path) -> dict:
    """Write one rank's graph file and plan; returns a `BuildReport` of sizes, times and the process's peak memory."""
    start = time.perf_counter()
    logger().errors.clear()  # of an earlier build
    builder = trt.Builder(logger())
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network = define(definition, job.checkpoint, mapping, job.config, job.features)
    graph = read_network(definition, network.module_outputs())
    graph.save(folder / graph_file(mapping.rank))
    report = {"rank": mapping.rank, "layers": len(graph.layers), "define_seconds": time.perf_counter() - start}
    if job.plan:
        report["plan_bytes"] = build_plan(job, builder, definition, mapping, folder / plan_file(mapping.rank))
    report["seconds"] = time.perf_counter() - start
    report["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report


def build_plan(job: Job, builder, definition, mapping: RankMapping, file: Path) -> int:
    """Write one rank's plan; returns its size in bytes."""
    checkpoint, cache = job.checkpoint, job.plan_options.timing_cache
    shapes = profile_shapes(checkpoint.architecture, checkpoint.model, job.config, mapping.cfg_size)
    config = builder_config(builder, checkpoint.dtype, shapes, job.compute_capability, job.plan_options)
    with build_progress(f"build rank {mapping.rank}", job.progress) as monitor:
        config.progress_monitor = monitor
        serialized = builder.build_serialized_network(definition, config)
    if serialized is None:
        raise ValueError(f"TensorRT built no plan for rank {mapping.rank}: {logger().last_error()}")
    write_synced(file, memoryview(serialized))
    if cache is not None:
        save_timing_cache(config, cache)
    return serialized.nbytes


def _config(job: Job, layout: Layout, folder: Path, output: Path, report: list) -> dict:
    checkpoint = job.checkpoint
    sizes = {"tp_size": layout.tp_size, "cp_size": layout.cp_size, "world_size": layout.tp_size * layout.cp_size}
    pretrained = checkpoint.config | {"mapping": checkpoint.config["mapping"] | sizes}
    pretrained.pop(OWN_KEY, None)
    return {
        "version": version_of("mmdit_lib"),
        "pretrained_config": pretrained,
        "build_config": job.config.model_dump(mode="json") | {"cp_method": layout.cp_method},
        OWN_KEY: {
            "format_version": FORMAT_VERSION if job.config.fp8_attention else checkpoint.quantization.format_version,
            "tensorrt": installed() if job.plan else None,
            "network_made_with": installed(),
            "tp_layout": layout.tp_layout,
            "cfg_size": layout.cfg_size,
            "plan_options": job.plan_options.given(),
            "checkpoint": checkpoint_reference(checkpoint, output),
            "report": report,
            "files": to_json({path.name: FileRecord.of(path) for path in sorted(folder.iterdir())}),
        },
    }
