"""Bugs to find: copies of an engine folder whose network is wrong in one place, for the exercises of notebook 03, and
of an FP8 checkpoint with a wrong scale, for those of notebook 08."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..checkpoint.manifest import CONFIG_FILE, OWN_KEY, is_checkpoint, rank_file
from ..engine.folder import graph_file, is_engine_folder
from ..engine.graph import Graph, Layer
from ..files import FileRecord, complete_folder, write_synced
from ..files.records import to_json
from ..network.layers import ACTIVATION_SCALE

Edit = Callable[[Layer], Layer]
"""Changes the layers that the bug is in, and returns the others as they are."""


def plant(engine_dir: str | Path, output_dir: str | Path, edit: str | Edit) -> Path:
    """Write a copy of an engine folder, without its plan, whose graph has a bug. Its checksums are in order.

    Args:
        engine_dir: an engine folder of one rank.
        output_dir: another folder beside it, which refers to the same checkpoint; an older engine folder is replaced.
        edit: the name of one of `BUGS`, or a function that is called with every layer.

    Raises:
        ValueError: if the edit changes no layer, or `output_dir` is `engine_dir` or something else than an engine
            folder.
    """
    source, output, name = Path(engine_dir), Path(output_dir), graph_file(0)
    require_other(source, output)
    edit = BUGS[edit] if isinstance(edit, str) else edit
    graph = Graph.load(source / name)
    layers = tuple(map(edit, graph.layers))
    if layers == graph.layers:
        raise ValueError(f"the edit changes none of the {len(layers)} layers of {source}")
    config = json.loads((source / CONFIG_FILE).read_text())
    with complete_folder(output, "engine folder", is_engine_folder) as partial:
        replace(graph, layers=layers).save(partial / name)
        config[OWN_KEY] |= {"files": to_json({name: FileRecord.of(partial / name)}), "tensorrt": None}
        write_synced(partial / CONFIG_FILE, json.dumps(config, indent=2))
    return output


def require_other(source: Path, output: Path) -> None:
    """Raises `ValueError` if a copy would replace its source."""
    if source.resolve() == output.resolve():
        raise ValueError(f"{output} is the folder to copy; give the name of another one for the copy")


def exact_gelu(layer: Layer) -> Layer:
    """The exact GELU instead of its tanh approximation, in the image's MLP of block 2."""
    found = layer.name == "transformer_blocks.2.ff.net.0/gelu_tanh"
    return replace(layer, attributes={"kind": "GELU_ERF"}) if found else layer


def swapped_shift_and_scale(layer: Layer) -> Layer:
    """Shift and scale swapped before the text's attention in block 4."""
    parts = {"slice": [1], "slice_2": [0]}
    module, _, part = layer.name.rpartition("/")
    found = module == "transformer_blocks.4.norm1_context" and part in parts
    return replace(layer, attributes=layer.attributes | {"start": parts[part]}) if found else layer


def wrong_epsilon(layer: Layer) -> Layer:
    """PyTorch's default epsilon of layer norm, 1e-5, instead of SD3's 1e-6, before the image's attention in block 0."""
    found = layer.name == "transformer_blocks.0.norm1.norm/layer_norm"
    return replace(layer, attributes=layer.attributes | {"epsilon": 1e-5}) if found else layer


BUGS: dict[str, Edit] = {"A": swapped_shift_and_scale, "B": exact_gelu, "C": wrong_epsilon}


def plant_scale(checkpoint_dir: str | Path, output_dir: str | Path) -> Path:
    """Write a copy of an FP8 checkpoint of one rank in which the scale of one layer's input is 32 times too small. It
    has no checksums, as if another program had written it.

    Args:
        checkpoint_dir: the checkpoint folder.
        output_dir: another folder; an older checkpoint is replaced.

    Raises:
        ValueError: if `output_dir` is `checkpoint_dir` or something else than a checkpoint.
    """
    source, output = Path(checkpoint_dir), Path(output_dir)
    require_other(source, output)
    tensors, config = load_file(source / rank_file(0)), json.loads((source / CONFIG_FILE).read_text())
    tensors[f"transformer_blocks.3.attn.to_out.0.{ACTIVATION_SCALE}"] /= 32
    del config[OWN_KEY]
    with complete_folder(output, "checkpoint", is_checkpoint) as partial:
        save_file(tensors, partial / rank_file(0))
        write_synced(partial / CONFIG_FILE, json.dumps(config))
    return output
