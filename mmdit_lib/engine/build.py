"""`build`: a checkpoint becomes an engine folder, one plan and one graph file per rank."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

from ..checkpoint.atomic import complete_folder
from ..checkpoint.folder import Checkpoint
from ..checkpoint.manifest import CONFIG_FILE, OWN_KEY, version_of
from ..checkpoint.tensor_file import sha256_of
from ..config import BuildConfig, CpMethod, Mapping, ModelConfig, Resolution
from ..network.mmdit import MMDiT
from ..network.network import Network
from ..network.trt import installed, trt
from .folder import FORMAT_VERSION, checkpoint_reference, graph_file, is_engine_folder, plan_file
from .graph import Graph
from .logger import Progress, logger
from .read_network import read_network


def build(
    checkpoint_dir: str = "tllm_checkpoint",
    output_dir: str = "engine_outputs",
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

    With `tensorrt_rtx` this needs no GPU. The folder appears only when every rank is built.

    Args:
        checkpoint_dir: as `convert` writes it, or as TensorRT-LLM (<= 1.2.1) did.
        output_dir: the engine folder to write.
        max_batch_size: rows of the largest batch; classifier-free guidance takes two per image.
        min_resolution: smallest image, HEIGHTxWIDTH in pixels; a quarter of the model's own side if not given.
        opt_resolution: the size to optimise for; the model's own if not given.
        max_resolution: largest image; one and a half of the model's own side if not given.
        min_text_tokens: shortest text.
        opt_text_tokens: 77 of CLIP and 256 of T5, diffusers' default.
        max_text_tokens: longest text: 77 and 512.
        cp_size: ranks of context parallelism; the checkpoint's if not given.
        cfg_size: 2 for CFG parallelism; the checkpoint's if not given.
        cp_method: allgather (keys and values travel) or ulysses (heads are dealt out).
        compute_capability: GPUs to build for, for instance 8.9 12.0 (tensorrt_rtx only; its own list if not given).
        plan: with --no-plan only the graph files for the pytorch backend are written.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: in one line, where checkpoint, layout and profile do not fit together, or TensorRT refuses.
    """
    checkpoint = Checkpoint.open(checkpoint_dir)
    own = checkpoint.mapping
    sizes = {
        "tp_size": own.tp_size,
        "cp_size": own.cp_size if cp_size is None else cp_size,
        "cfg_size": own.cfg_size if cfg_size is None else cfg_size,
    }
    mapping = Mapping.parse(sizes, "parallel layout")
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
            "cp_method": cp_method,
        },
        "build options",
    )
    config.check(checkpoint.model, mapping)
    output = Path(output_dir).expanduser()
    with complete_folder(output, "engine folder", is_engine_folder) as partial:
        checkpoint.verify()
        report = [
            build_rank(checkpoint, rank, config, partial, compute_capability, plan, progress)
            for rank in mapping.ranks()
        ]
        content = _config(checkpoint, mapping, config, partial, output, plan, report)
        (partial / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
    return output


def default_resolutions(model: ModelConfig, vae_scale_factor: int) -> tuple[Resolution, ...]:
    """(min, opt, max): a quarter of the model's own side, its side, one and a half of it (or its whole table)."""
    step = model.patch_size * vae_scale_factor
    side = model.sample_size * vae_scale_factor
    most = model.pos_embed_max_size * step
    sides = (max(step, side // 4), min(side, most), min(side * 3 // 2, most))
    return tuple(Resolution(height=s // step * step, width=s // step * step) for s in sides)


def define(definition, checkpoint: Checkpoint, mapping: Mapping, config: BuildConfig) -> Network:
    """Add one rank's whole network to an empty `INetworkDefinition`. The result owns the weights' memory."""
    model = checkpoint.model
    network = Network(
        definition,
        weights=checkpoint.weights(mapping.tp_rank),
        dtype=checkpoint.dtype,
        mapping=mapping,
        tp_layout=checkpoint.tp_layout,
        cp_method=config.cp_method,
    )
    inputs = {
        name: network.input(name, dtype, shape) for name, (dtype, shape) in inputs_of(model, checkpoint.dtype).items()
    }
    step = model.patch_size * config.vae_scale_factor
    largest = config.max_resolution
    output = MMDiT(model)(*inputs.values(), max_patches=(largest.height // step, largest.width // step))
    network.output(output, "output")
    return network


def inputs_of(model: ModelConfig, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape), in the order of `MMDiT.forward`; `timestep` keeps float32, as in diffusers."""
    return {
        "hidden_states": (dtype, (-1, model.in_channels, -1, -1)),
        "encoder_hidden_states": (dtype, (-1, -1, model.joint_attention_dim)),
        "pooled_projections": (dtype, (-1, model.pooled_projection_dim)),
        "timestep": ("float32", (-1,)),
    }


def profile_shapes(model: ModelConfig, config: BuildConfig, cfg_size: int) -> dict[str, list[tuple[int, ...]]]:
    """The smallest, the optimal and the largest shape of every input."""
    tokens = (config.min_text_tokens, config.opt_text_tokens, config.max_text_tokens)
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in inputs_of(model, "float32")}
    for batch, image, text in zip(config.batches(cfg_size), config.resolutions, tokens, strict=True):
        scale = config.vae_scale_factor
        latent = (image.height // scale, image.width // scale)
        shapes["hidden_states"].append((batch, model.in_channels, *latent))
        shapes["encoder_hidden_states"].append((batch, text, model.joint_attention_dim))
        shapes["pooled_projections"].append((batch, model.pooled_projection_dim))
        shapes["timestep"].append((batch,))
    return shapes


def build_rank(
    checkpoint: Checkpoint,
    mapping: Mapping,
    config: BuildConfig,
    folder: Path,
    capabilities,
    plan: bool,
    progress: bool,
) -> dict:
    """Write one rank's graph file and plan; returns what it took."""
    start = time.perf_counter()
    logger().errors.clear()  # an earlier build's
    builder = trt.Builder(logger())
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network = define(definition, checkpoint, mapping, config)
    graph: Graph = read_network(definition, network.module_outputs())
    graph.save(folder / graph_file(mapping.rank))
    report = {"rank": mapping.rank, "layers": len(graph.layers), "define_seconds": time.perf_counter() - start}
    if plan:
        shapes = profile_shapes(checkpoint.model, config, mapping.cfg_size)
        options = builder_config(builder, checkpoint.dtype, shapes, capabilities)
        with Progress(f"build rank {mapping.rank}", progress) as monitor:
            options.progress_monitor = monitor
            serialized = builder.build_serialized_network(definition, options)
        if serialized is None:
            raise ValueError(f"TensorRT built no plan for rank {mapping.rank}: {logger().last_error()}")
        with open(folder / plan_file(mapping.rank), "wb") as file:
            file.write(memoryview(serialized))
            file.flush()
            os.fsync(file.fileno())
        report["plan_bytes"] = serialized.nbytes
    report["seconds"] = time.perf_counter() - start
    report["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report


def builder_config(builder, dtype: str, shapes: dict[str, list[tuple[int, ...]]], capabilities: tuple[str, ...]):
    """An `IBuilderConfig` with one optimisation profile."""
    options = builder.create_builder_config()
    if dtype == "float32":
        options.clear_flag(trt.BuilderFlag.TF32)  # float32 here means float32
    profile = builder.create_optimization_profile()
    for name, (low, middle, high) in shapes.items():
        profile.set_shape(name, low, middle, high)
    options.add_optimization_profile(profile)
    if not capabilities:
        return options
    if not hasattr(options, "set_compute_capability"):
        raise ValueError(
            f"compute_capability: {installed()} builds for the GPU at hand only; tensorrt_rtx takes a list"
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
    checkpoint: Checkpoint, mapping: Mapping, config: BuildConfig, folder: Path, output: Path, plan: bool, report: list
) -> dict:
    sizes = {"tp_size": mapping.tp_size, "cp_size": mapping.cp_size, "world_size": mapping.tp_size * mapping.cp_size}
    pretrained = checkpoint.config | {"mapping": checkpoint.config["mapping"] | sizes}
    pretrained.pop(OWN_KEY, None)
    files = {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())}
    return {
        "version": version_of("mmdit_lib"),
        "pretrained_config": pretrained,
        "build_config": config.model_dump(mode="json"),
        OWN_KEY: {
            "format_version": FORMAT_VERSION,
            "tensorrt": installed() if plan else None,
            "network_made_with": installed(),
            "tp_layout": checkpoint.tp_layout,
            "cfg_size": mapping.cfg_size,
            "checkpoint": checkpoint_reference(checkpoint, output),
            "report": report,
            "files": files,
        },
    }
