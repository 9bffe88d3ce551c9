"""`config.json` of an engine folder, ours and TensorRT-LLM's: what is read from it and what is legal."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..checkpoint.manifest import FormatVersion, Loras, PretrainedConfig
from ..config import MAX_BATCH, MAX_RANKS, BuildConfig, CpMethod, FileConfig, PlanOptions, Text, TpLayout
from ..files import Files

Count = Annotated[int, Field(strict=True, ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CheckpointReference(FileConfig):
    """The checkpoint that an engine folder was built from: its name, its path from the folder, its rank files."""

    name: Text
    path: Text
    files: Files
    loras: Loras = ()
    """The LoRAs that `convert` fused into it."""
    revision: Text | None = None
    """The commit of the hub id that was converted; None: it was not downloaded."""


class BuildReport(FileConfig):
    """Time of one rank's build, and the process's memory."""

    rank: Count
    layers: Count
    define_seconds: Seconds
    seconds: Seconds
    peak_rss_bytes: Count
    """The most memory that the process has held so far, earlier ranks and whatever ran before included."""
    plan_bytes: Count | None = None
    """None: no plan was built."""


class EngineManifest(FileConfig):
    """Our own key."""

    format_version: FormatVersion
    tensorrt: Text | None
    network_made_with: Text | None = None
    tp_layout: TpLayout
    cfg_size: Literal[1, 2]
    plan_options: PlanOptions = PlanOptions()
    checkpoint: CheckpointReference
    report: tuple[BuildReport, ...] = Field(max_length=MAX_RANKS)
    files: Files


class BuildOptions(BuildConfig, FileConfig):
    """TensorRT-LLM's key, with our profile."""

    cp_method: CpMethod


class EngineConfig(FileConfig):
    """The file that `build` writes."""

    pretrained_config: PretrainedConfig
    build_config: BuildOptions
    mmdit_lib: EngineManifest


class TrtllmManifest(FileConfig):
    """Our own key in the file of `trtllm-build`, if this library ran it."""

    format_version: FormatVersion
    checkpoint: CheckpointReference
    files: Files


class TrtllmOptions(FileConfig):
    max_batch_size: int = Field(ge=1, le=MAX_BATCH, strict=True)


class TrtllmConfig(FileConfig):
    """The file that `trtllm-build` writes."""

    version: Text
    pretrained_config: PretrainedConfig
    build_config: TrtllmOptions
    mmdit_lib: TrtllmManifest | None = None
