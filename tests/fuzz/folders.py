"""The undamaged folders: a small random model as source, checkpoints and engine folders.

Each has a sibling in `donors`, whose files replace its own in some damages. A donor of a folder with checksums has the
same shapes and other weights; a donor of one without has another architecture, because nothing could tell another
model of the same shapes from the right one.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

from helpers import original_layout, random_transformer
from loras import random_lora, write
from safetensors.torch import save_file

from mmdit_lib import build, convert
from mmdit_lib.checkpoint import conversion
from mmdit_lib.sd3 import SD3Config

MODEL = SD3Config(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=12,
    pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
)  # fmt: skip
OTHER = SD3Config(**MODEL.model_dump() | {"num_layers": 3, "joint_attention_dim": 20, "dual_attention_layers": ()})
PROFILE = dict(
    min_resolution="32", opt_resolution="64", max_resolution="128", min_text_tokens=4, opt_text_tokens=8,
    max_text_tokens=16, plan=False, progress=False,
)  # fmt: skip


def make_folders(root: Path) -> None:
    """Write every folder below `root/good` and `root/donors`."""
    for place, foreign, seed in (("good", MODEL, 0), ("donors", OTHER, 1)):
        _make_sources(root / place, foreign, seed)
        # A donor with checksums has the right shapes, so it is converted from a source of its own.
        source = root / place / "pipeline"
        if foreign is not MODEL:
            source = root / "same_shapes" / "pipeline"
            _make_sources(source.parent, MODEL, seed)
        _make_outputs(root / place, source)
        _make_upstream(root / place / "upstream", root / place / "pipeline")
        _make_upstream_engine(root / place / "upstream_engine", root / place / "upstream")


def _make_sources(place: Path, config: SD3Config, seed: int) -> None:
    """A pipeline folder with sharded weights, a transformer folder, and a file in the original layout."""
    model = random_transformer(config, seed)
    model.save_pretrained(place / "pipeline" / "transformer", max_shard_size="30KB")
    (place / "pipeline" / "vae").mkdir()
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "latent_channels": 4}
    (place / "pipeline" / "vae" / "config.json").write_text(json.dumps(vae))
    (place / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    model.save_pretrained(place / "transformer")
    (place / "single_file").mkdir()
    save_file(original_layout(model), place / "single_file" / "sd3.safetensors")
    lora = write(
        place / "lora" / "adapter_model.safetensors", random_lora(model.state_dict(), seed), "base_model.model."
    )
    (lora.parent / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "peft_type": "LORA"}))


def _make_outputs(place: Path, source: Path) -> None:
    convert(source, place / "checkpoint", progress=False)
    build(place / "checkpoint", place / "engine", **PROFILE)
    convert(source, place / "checkpoint_tp2", tp_size=2, progress=False)
    options = dict(cp_size=2, skip_layers=True, controlnet_residuals=2)
    build(place / "checkpoint_tp2", place / "engine_tp2", **options, **PROFILE)

    # The source has no text encoders to calibrate with.
    def four(source, path, modules, *_, **__):
        return dict.fromkeys(modules, 4.0)

    largest = mock.patch.object(conversion, "calibrate", four)
    with largest, mock.patch.object(conversion, "require_pipeline"):
        options = dict(quantization="fp8", calibration_prompts=["a circle"], progress=False)
        convert(source, place / "checkpoint_fp8", **options)
    build(place / "checkpoint_fp8", place / "engine_fp8", **PROFILE)


def _make_upstream(folder: Path, source: Path) -> None:
    """A checkpoint as TensorRT-LLM writes it: without our key."""
    convert(source, folder, tp_size=2, tp_layout="trtllm", progress=False)
    content = json.loads((folder / "config.json").read_text())
    del content["mmdit_lib"]
    (folder / "config.json").write_text(json.dumps(content))


def _make_upstream_engine(folder: Path, checkpoint: Path) -> None:
    """The config of an engine folder as `trtllm-build` writes it; the plans are not read."""
    folder.mkdir()
    pretrained = json.loads((checkpoint / "config.json").read_text())
    content = {"version": "1.2.1", "pretrained_config": pretrained, "build_config": {"max_batch_size": 2}}
    (folder / "config.json").write_text(json.dumps(content))
