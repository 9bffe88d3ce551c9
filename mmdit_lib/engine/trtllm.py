"""TensorRT-LLM (<= 1.2.1): building an engine folder with `trtllm-build`, and what running one needs.

Not yet run with TensorRT-LLM: the command is called with the flags of its example for this model.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from pathlib import Path

from ..checkpoint.folder import Checkpoint
from ..checkpoint.manifest import CONFIG_FILE, OWN_KEY, version_of
from ..files import FileRecord, complete_folder, read_json, write_synced
from ..files.records import to_json
from .folder import TRTLLM, checkpoint_reference, is_engine_folder, plan_file

COMMAND = "trtllm-build"
HOW_TO_INSTALL = "pip install tensorrt-llm==1.2.1, or conda env create --file environment-tensorrt-llm.yml"


def installed() -> str | None:
    """For instance 'tensorrt_llm 1.2.1'; None without TensorRT-LLM."""
    version = version_of(TRTLLM)
    return version and f"{TRTLLM} {version}"


def load_plugins() -> None:
    """Register TensorRT-LLM's plugins, which its plans contain. Those for NCCL take their ranks from MPI."""
    importlib.import_module(TRTLLM)


def build(checkpoint_dir: str | Path, output_dir: str | Path, max_batch_size: int) -> Path:
    """Run `trtllm-build` on a checkpoint folder; its output is shown.

    The folder appears only when it is complete. `config.json` gets one more key, with the checksums of the plans.

    Returns:
        The folder.

    Raises:
        ValueError: if the command is not installed, cannot build this checkpoint, or fails.
    """
    checkpoint = Checkpoint.open(checkpoint_dir)
    check_checkpoint(checkpoint)
    command = shutil.which(COMMAND)
    if command is None:
        raise ValueError(f"builder trtllm: {COMMAND} is not on PATH; {HOW_TO_INSTALL}")
    output = Path(output_dir).expanduser()
    with complete_folder(output, "engine folder", is_engine_folder) as partial:
        checkpoint.verify()
        run = subprocess.run([command, *flags(checkpoint, partial, max_batch_size)])
        if run.returncode:
            raise ValueError(f"{COMMAND} failed with exit code {run.returncode}; its output is above")
        ranks = range(checkpoint.layout.world_size)
        missing = [name for name in (CONFIG_FILE, *map(plan_file, ranks)) if not (partial / name).is_file()]
        if missing:
            raise ValueError(f"{COMMAND} wrote no {missing[0]}; its output is above")
        add_manifest(partial, checkpoint, output)
    return output


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Raises `ValueError` if TensorRT-LLM cannot read this checkpoint."""
    layout = checkpoint.layout
    if checkpoint.quantization.quant_algo:
        raise ValueError(f"builder trtllm: {checkpoint.path} is quantized; use builder tensorrt")
    if layout.cfg_size > 1:
        raise ValueError(f"builder trtllm: TensorRT-LLM has no CFG parallelism; {checkpoint.path} has cfg_size 2")
    if layout.tp_size > 1 and layout.tp_layout != "trtllm":
        raise ValueError(
            f"builder trtllm: the {layout.tp_size} tp ranks of {checkpoint.path} are sharded as {layout.tp_layout}; "
            "convert with --tp_layout trtllm"
        )


def flags(checkpoint: Checkpoint, output: Path, max_batch_size: int) -> list[str]:
    """The arguments of `trtllm-build`.

    Input padding stays, because all rows have the same number of tokens. The attention plugin takes the queries,
    keys and values of the same tokens as one packed tensor. With context parallelism a rank has queries of its own
    tokens and the gathered keys and values of all, so attention is built from plain layers there.
    """
    plugin = "auto" if checkpoint.layout.cp_size == 1 else "disable"
    values = {
        "checkpoint_dir": checkpoint.path,
        "output_dir": output,
        "max_batch_size": max_batch_size,
        "remove_input_padding": "disable",
        "bert_attention_plugin": plugin,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def add_manifest(folder: Path, checkpoint: Checkpoint, output: Path) -> None:
    """Record under our key in `config.json` what the plans were built from, and their checksums."""
    plans = sorted(path for path in folder.iterdir() if path.name != CONFIG_FILE)
    content = read_json(folder / CONFIG_FILE)
    content[OWN_KEY] = {
        "format_version": checkpoint.quantization.format_version,
        "builder": "trtllm",
        "checkpoint": checkpoint_reference(checkpoint, output),
        "files": to_json({path.name: FileRecord.of(path) for path in plans}),
    }
    write_synced(folder / CONFIG_FILE, json.dumps(content, indent=2) + "\n")
