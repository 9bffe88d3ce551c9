"""Checking a checkpoint's tensors against its config."""

from __future__ import annotations

from collections.abc import Callable

from ..architecture import Architecture, ModelConfig, Shapes


def check_shapes(
    found: Shapes, architecture: Architecture, model: ModelConfig, where: str, spell: Callable[[str], str] = str
) -> None:
    """Raises `ValueError` naming the first missing, unknown or wrongly shaped tensor.

    If another config explains every tensor, the config is wrong, and the message also names the fields that differ.

    Args:
        found: full shapes, by our names.
        model: the config that they must match.
        where: the checkpoint, for the message.
        spell: maps our names to the checkpoint's.
    """
    fault = first_fault(found, architecture.parameters(model), spell)
    if fault is not None:
        raise ValueError(f"{where}: {_contradiction(found, architecture, model)}{fault}")


def first_fault(found: Shapes, expected: Shapes, spell: Callable[[str], str] = str) -> str | None:
    def described(kind: str, names: list[str], shape: tuple[int, ...]) -> str:
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        return f"{kind} tensor '{spell(names[0])}' {list(shape)}{others}"

    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing and unknown:
        unmapped = "a name that the model's key table (keys.py) does not map"
        return f"{described('missing', missing, expected[missing[0]])}; {unknown[0]} is {unmapped}"
    if missing:
        return described("missing", missing, expected[missing[0]])
    if unknown:
        return described("unknown", unknown, found[unknown[0]])
    if wrong := [name for name in expected if tuple(found[name]) != tuple(expected[name])]:
        return f"{described('wrongly shaped', wrong, found[wrong[0]])}, expected {list(expected[wrong[0]])}"
    return None


def _contradiction(found: Shapes, architecture: Architecture, model: ModelConfig) -> str:
    """'the config says num_layers 4, its weights say 3: ' if another config explains the weights, else ''."""
    try:
        weights = architecture.infer_config(found, model)
    except ValueError:
        return ""
    if first_fault(found, architecture.parameters(weights)) is not None:
        return ""
    differ = [k for k in type(model).model_fields if getattr(model, k) != getattr(weights, k)]
    says = "; ".join(f"{k} {getattr(model, k)}, its weights say {getattr(weights, k)}" for k in differ)
    return f"the config says {says}: "
