"""What the library is asked to do with a damaged folder, and what counts as the same result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmdit_lib import Checkpoint, EngineFolder, MMDiTRunner, build, convert
from mmdit_lib.config import Sizes
from mmdit_lib.engine.folder import graph_file
from mmdit_lib.engine.inputs import draw_inputs
from mmdit_lib.engine.rehearsal import rehearse
from mmdit_lib.reports.inspection import print_inspection
from mmdit_lib.sd3 import SD3

from .folders import MODEL, PROFILE

Result = dict[str, Any]

INPUTS = draw_inputs(SD3, MODEL, Sizes(batch=1, height=64, width=64, text_tokens=8))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b"")
    return sha.hexdigest()


def contents(folder: Path) -> Result:
    """The weights of a checkpoint, and its model as far as the weights determine it."""
    checkpoint = Checkpoint.open(folder)
    # `sample_size` only sets the default resolution: any legal value is as good as another.
    model = {k: v for k, v in checkpoint.model.model_dump().items() if k != "sample_size"}
    ranks = [digest(checkpoint.weights(rank)) for rank in range(checkpoint.layout.tp_size)]
    return {"model": model, "dtype": checkpoint.dtype, "weights": ranks}


def convert_it(source: Path) -> Result:
    output = source.parent / "out"
    convert(source, output, progress=False)
    return contents(output)


def fuse_it(lora: Path) -> Result:
    """Convert with a LoRA. Nothing contradicts another number in it or in its config."""
    output = lora.parent / "out"
    convert(lora.parent / "transformer", output, loras=[lora], progress=False)
    return contents(output)


def build_it(folder: Path) -> Result:
    output = folder.parent / "out"
    build(folder, output, **PROFILE)
    found, engine = contents(folder), EngineFolder.open(output)
    # How many ranks share the work, and the size of a pixel, are choices that no other file contradicts.
    choices = (engine.layout.sizes, engine.layout.tp_layout, engine.build_config.vae_scale_factor)
    graphs = [(output / graph_file(m.rank)).read_bytes() for m in engine.layout.ranks()]
    return found | {"choices": choices, "graphs": graphs}


def inspect_it(folder: Path) -> Result:
    print_inspection(folder, Console(file=StringIO(), markup=False))
    return {}


def run_it(folder: Path, verify: bool = True) -> Result:
    runner = MMDiTRunner.from_engine(folder, backend="pytorch", device="cpu", verify=verify)
    return {"output": runner.run(INPUTS).tolist()}


def open_it(folder: Path) -> Result:
    """All ranks of an engine folder for several, up to the first collective."""
    engine = EngineFolder.open(folder)
    result = {}
    for mapping in engine.layout.ranks():
        checkpoint = engine.open_checkpoint(tp_rank=mapping.tp_rank)
        graph, weights = engine.graph(mapping.rank), checkpoint.weights(mapping.tp_rank)
        rehearse(engine, graph, weights, mapping, folder / graph_file(mapping.rank))
        result[f"rank {mapping.rank}"] = (graph, digest(weights))
    return result


def same(found: Result, expected: Result) -> bool:
    """Equal, except that what was built for other choices has other graphs."""
    if found.get("choices") != expected.get("choices"):
        found, expected = ({k: v for k, v in r.items() if k not in ("choices", "graphs")} for r in (found, expected))
    return found == expected


@dataclass(frozen=True)
class Case:
    """One thing to do with one kind of folder.

    Attributes:
        needs: the folders that are copied; files of any of them are damaged.
        argument: what `run` gets, relative to them.
        checksummed: whether checksums protect the weights, so that damage to them must be noticed.
        compare: False if nothing says what is right, for instance because the user asked to skip checksums: then
            another result is not a fault, but a traceback is.
    """

    name: str
    needs: tuple[str, ...]
    argument: str
    run: Callable[[Path], Result]
    checksummed: bool = True
    compare: bool = True


CASES = (
    Case("convert a pipeline folder", ("pipeline",), "pipeline", convert_it, checksummed=False),
    Case("convert a transformer folder", ("transformer",), "transformer", convert_it, checksummed=False),
    Case("convert a single file", ("single_file",), "single_file/sd3.safetensors", convert_it, checksummed=False),
    Case("convert with a LoRA", ("lora", "transformer"), "lora", fuse_it, checksummed=False, compare=False),
    Case("build from a checkpoint", ("checkpoint",), "checkpoint", build_it),
    Case("build from a checkpoint, tp 2", ("checkpoint_tp2",), "checkpoint_tp2", build_it),
    Case("build from a checkpoint in FP8", ("checkpoint_fp8",), "checkpoint_fp8", build_it),
    Case("build from TensorRT-LLM's", ("upstream",), "upstream", build_it, checksummed=False),
    Case("inspect a checkpoint", ("checkpoint",), "checkpoint", inspect_it),
    Case("inspect an engine folder", ("engine",), "engine", inspect_it),
    Case("inspect TensorRT-LLM's engine folder", ("upstream_engine",), "upstream_engine", inspect_it),
    Case("run an engine folder", ("engine", "checkpoint"), "engine", run_it),
    Case("run an engine folder in FP8", ("engine_fp8", "checkpoint_fp8"), "engine_fp8", run_it),
    Case("run it without checksums", ("engine", "checkpoint"), "engine", lambda f: run_it(f, False), compare=False),
    Case("open an engine folder, 4 ranks", ("engine_tp2", "checkpoint_tp2"), "engine_tp2", open_it),
)  # fmt: skip
