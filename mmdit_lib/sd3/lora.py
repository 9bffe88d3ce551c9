"""Tensor names in LoRA files for SD3: of diffusers and PEFT, of older diffusers, and of kohya's sd-scripts."""

from __future__ import annotations

import re

from ..architecture import LoraKey
from .config import SD3Config

TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.", "lora_te1_", "lora_te2_", "lora_te3_")
PREFIXES = ("transformer.", "base_model.model.", "")
"""Of diffusers' pipelines, of PEFT's models, of diffusers' transformers."""
KOHYA = "lora_unet_"

PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "alpha": "alpha",
}
OLDER = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
"""Older versions of diffusers put the LoRA of a projection into the attention's processor."""

STREAMS = {
    "x": ("attn.to_{}", "attn.to_out.0", "norm1", "ff"),
    "context": ("attn.add_{}_proj", "attn.to_add_out", "norm1_context", "ff_context"),
}
IN_BLOCK = re.compile(r"joint_blocks_(\d+)_(x|context)_block_(attn2?_qkv|attn2?_proj|adaLN_modulation_1|mlp_fc[12])")
EMBEDDERS = {
    "x_embedder_proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
}


def parse(key: str, config: SD3Config) -> LoraKey | None:
    """What a tensor of a LoRA file is for; None if it belongs to a text encoder. Raises `ValueError` if unknown."""
    if key.startswith(TEXT_ENCODERS):
        return None
    if key.endswith(".dora_scale"):
        raise ValueError(f"tensor '{key}': DoRA is supported only as PEFT stores it (lora_magnitude_vector)")
    if key.startswith(KOHYA):
        module, _, rest = key.partition(".")
        if rest in PARTS:
            return LoraKey(PARTS[rest], kohya_rows(module.removeprefix(KOHYA), config))
    name = key.removeprefix(next(prefix for prefix in PREFIXES if key.startswith(prefix)))
    if older := OLDER.search(name):
        module = f"{name[: older.start()]}.{older[1]}{'.0' if older[1] == 'to_out' else ''}"
        return LoraKey("A" if older[2] == "down" else "B", {module: (0,)})
    for ending, part in PARTS.items():
        if name.endswith(f".{ending}"):
            return LoraKey(part, {name.removesuffix(f".{ending}"): (0,)})
    raise ValueError(f"unknown tensor '{key}'")


def kohya_rows(name: str, config: SD3Config) -> dict[str, tuple[int, ...]]:
    """As `LoraKey.rows`. sd-scripts trains the original layout, whose names it joins with underscores."""
    if name in EMBEDDERS:
        return {EMBEDDERS[name]: (0,)}
    if name == "final_layer_adaLN_modulation_1":
        return {"norm_out.linear": (1, 0)}  # the original layout has the shift before the scale
    found = IN_BLOCK.fullmatch(name)
    if found is None:
        raise ValueError(f"sd-scripts' name '{KOHYA}{name}' matches no module of the transformer")
    block, stream, layer = f"transformer_blocks.{found[1]}", found[2], found[3]
    qkv, out, norm, mlp = (f"{block}.{path}" for path in STREAMS[stream])
    if layer.startswith("attn2"):
        qkv, out = (path.replace(".attn.", ".attn2.") for path in (qkv, out))
    if layer.endswith("_qkv"):
        return {qkv.format(letter): (i,) for i, letter in enumerate("qkv")}
    if layer.endswith("_proj"):
        return {out: (0,)}
    if layer.startswith("mlp"):
        return {f"{mlp}.net.0.proj" if layer == "mlp_fc1" else f"{mlp}.net.2": (0,)}
    last = stream == "context" and int(found[1]) == config.num_layers - 1
    return {f"{norm}.linear": (1, 0) if last else (0,)}
