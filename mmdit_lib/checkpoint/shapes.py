"""What a model's tensors are called and how large they are, checked against what a checkpoint holds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from ..config import ModelConfig
from ..network.mmdit import MMDiT

Shapes = Mapping[str, tuple[int, ...]]
LATENT_SIDE = 128
"""`sample_size` of the published models. No tensor tells it; it only sets a pipeline's default resolution."""
HEAD_DIM = 64
"""Of the published models; without QK-norm no tensor tells it."""


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every checkpoint tensor, in the order of definition."""
    return MMDiT(model).named_parameters()


def check_shapes(found: Shapes, model: ModelConfig, where: str, spell: Callable[[str], str] = str) -> None:
    """Raises `ValueError` naming the first missing, unknown or wrongly shaped tensor.

    Where another config explains every tensor, it is the config that is wrong: its fields are named too.

    Args:
        found: full shapes by our names.
        model: what they should fit.
        where: the checkpoint, for the message.
        spell: how the checkpoint spells our names.
    """
    fault = first_fault(found, expected_shapes(model), spell)
    if fault is None:
        return
    contradiction = _contradiction(found, model)
    raise ValueError(f"{where}: {contradiction}{fault}")


def first_fault(found: Shapes, expected: Shapes, spell: Callable[[str], str] = str) -> str | None:
    def described(kind: str, names: list[str], shape: tuple[int, ...]) -> str:
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        return f"{kind} tensor '{spell(names[0])}' {list(shape)}{others}"

    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing and unknown:
        known_by = "a name that the key table, checkpoint/keys.py, does not know"
        return f"{described('missing', missing, expected[missing[0]])}; {unknown[0]} is {known_by}"
    if missing:
        return described("missing", missing, expected[missing[0]])
    if unknown:
        return described("unknown", unknown, found[unknown[0]])
    if wrong := [name for name in expected if tuple(found[name]) != tuple(expected[name])]:
        return f"{described('wrongly shaped', wrong, found[wrong[0]])}, expected {list(expected[wrong[0]])}"
    return None


def _contradiction(found: Shapes, model: ModelConfig) -> str:
    """'the config says num_layers 4, its weights say 3: ' where the weights are whole in themselves, else ''."""
    try:
        weights = deduce_model(found, head_dim=model.attention_head_dim)
    except ValueError:
        return ""
    if first_fault(found, expected_shapes(weights)) is not None:
        return ""
    derived = {"sample_size", "caption_projection_dim"}
    differ = [k for k in ModelConfig.model_fields if k not in derived and getattr(model, k) != getattr(weights, k)]
    says = "; ".join(f"{k} {getattr(model, k)}, its weights say {getattr(weights, k)}" for k in differ)
    return f"the config says {says}: "


def deduce_model(found: Shapes, head_dim: int = HEAD_DIM) -> ModelConfig:
    """The config that these shapes speak of; raises `ValueError` where a tensor that tells it is missing or odd.

    `head_dim` counts only without QK-norm.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if len(found.get(name, ())) != dimensions:
            raise ValueError(f"tensor '{name}' with {dimensions} dimensions is missing: this is no SD3 transformer")
        return tuple(found[name])

    dim, channels, patch, _ = shape("pos_embed.proj.weight", 4)
    norm = "transformer_blocks.0.attn.norm_q.weight"
    if norm in found:
        (head_dim,) = shape(norm, 1)
    blocks = {int(m[1]) for name in found if (m := re.match(r"transformer_blocks\.(\d+)\.", name))}
    dual = {int(m[1]) for name in found if (m := re.match(r"transformer_blocks\.(\d+)\.attn2\.", name))}
    values = {
        "sample_size": LATENT_SIDE,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight", 2)[0] // patch**2,
        "num_layers": max(blocks, default=-1) + 1,
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": shape("context_embedder.weight", 2)[1],
        "caption_projection_dim": dim,
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "pos_embed_max_size": math.isqrt(shape("pos_embed.pos_embed", 3)[1]),
        "dual_attention_layers": tuple(sorted(dual)),
        "qk_norm": "rms_norm" if norm in found else None,
    }
    return ModelConfig.parse(values, "config deduced from the weights")
