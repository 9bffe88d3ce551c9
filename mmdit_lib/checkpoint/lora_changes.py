"""One change per module from the tensors of a LoRA file, checked against the model's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..architecture import Architecture, LoraKey, ModelConfig
from ..config import DTYPES, either
from .peft_config import PeftConfig
from .tensor_file import StoredTensor

NAMES = {"A": "lora_A (lora_down)", "B": "lora_B (lora_up)"}


@dataclass(frozen=True)
class Change:
    """The tensors of a file that change one module, and the scaling of their product."""

    tensors: dict[str, StoredTensor]
    """By part (see `LoraKey`)."""
    rows: tuple[int, ...]
    """The parts of B's rows that are the module's."""
    of: int
    """Into how many equal parts B's rows are divided."""
    scaling: float

    def kinds(self) -> tuple[str, ...]:
        """The module's parameters that it changes."""
        return ("weight", "bias") if "bias" in self.tensors else ("weight",)

    def fuse(self, kind: str, tensor: torch.Tensor, scale: float) -> None:
        """Change the full weight [out, in, ...] or bias [out], in float32, in place."""
        factor = self.scaling * scale
        if kind == "bias":
            tensor += self._read_rows("bias") * factor
            return
        a, b = read(self.tensors["A"]).flatten(1), self._read_rows("B").flatten(1)
        tensor += ((b @ a) * factor).view_as(tensor)
        if "magnitude" in self.tensors:
            factors = self._read_rows("magnitude").flatten() / tensor.flatten(1).norm(dim=1)
            tensor *= factors.view(-1, *[1] * (tensor.dim() - 1))

    def _read_rows(self, part: str) -> torch.Tensor:
        parts = read(self.tensors[part]).chunk(self.of)
        return torch.cat([parts[i] for i in self.rows])


def read(tensor: StoredTensor) -> torch.Tensor:
    """A tensor of the file, in float32."""
    return tensor.read_into(torch.empty(tensor.nbytes, dtype=torch.uint8)).float()


def changes_of(
    tensors: Mapping[str, StoredTensor],
    keys: Mapping[str, LoraKey],
    config: PeftConfig | None,
    architecture: Architecture,
    model: ModelConfig,
) -> dict[str, Change]:
    """Changes by our names of the modules.

    Args:
        tensors: of the file, without those of text encoders.
        keys: what each tensor is for.
        config: PEFT's config, if the file has one.

    Raises:
        ValueError: naming the first tensor that belongs to no module, has no counterpart or has the wrong shape.
    """
    shapes = architecture.parameters(model)
    named: dict[str, dict[str, str]] = {}
    rows: dict[str, tuple[tuple[int, ...], int]] = {}
    unknown = []
    for name, key in keys.items():
        if tensors[name].dtype not in DTYPES:
            raise ValueError(f"tensor '{name}' is {tensors[name].code}; only {either(DTYPES)} can be fused")
        for module, parts in key.rows.items():
            if len(shapes.get(_weight(module, architecture), ())) not in (2, 4):
                unknown.append(name)
                continue
            if named.setdefault(module, {}).setdefault(key.part, name) != name:
                raise ValueError(f"tensors '{named[module][key.part]}' and '{name}' are for the same weight")
            rows[module] = parts, sum(map(len, key.rows.values()))
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ValueError(f"tensor '{unknown[0]}'{more} is for a layer that the model does not have: {model.summary()}")
    found = {}
    for module, names in named.items():
        weight = _weight(module, architecture)
        parts = {part: tensors[name] for part, name in names.items()}
        rank = _check(names, parts, shapes[weight], *rows[module])
        scaling = _scaling(module, names, parts, config, rank)
        found[weight.removesuffix(".weight")] = Change(parts, *rows[module], scaling)
    return found


def _weight(module: str, architecture: Architecture) -> str:
    """Our name of a module's weight; empty if no model has it."""
    try:
        return architecture.keys.from_diffusers(f"{module}.weight")
    except ValueError:
        return ""


def _check(
    names: dict[str, str], tensors: dict[str, StoredTensor], shape: tuple[int, ...], rows: tuple[int, ...], of: int
) -> int:
    """The rank of one module's tensors. Raises `ValueError` if they do not match each other or the weight's `shape`."""
    for part in "AB":
        if part not in names:
            raise ValueError(f"tensor '{next(iter(names.values()))}' has no matching {NAMES[part]}")
    outputs = shape[0] // len(rows) * of
    rank_a = tensors["A"].shape[:1]
    rank_b = tensors["B"].shape[1:2] or rank_a
    expected = {
        "A": (*rank_a, *shape[1:]),
        "B": (outputs, *rank_b, *[1] * len(shape[2:])),
        "bias": (outputs,),
        "magnitude": (outputs,) if len(shape) == 2 else (1, outputs, 1, 1),
    }
    for part, tensor in tensors.items():
        if part in expected and tensor.shape != expected[part]:
            raise ValueError(
                f"tensor '{names[part]}' is {list(tensor.shape)}, expected {list(expected[part])}: "
                "the LoRA is for a different model"
            )
    if rank_a != rank_b:
        raise ValueError(
            f"tensors '{names['A']}' {list(tensors['A'].shape)} and '{names['B']}' {list(tensors['B'].shape)} "
            f"have different ranks: {rank_a[0]} and {rank_b[0]}"
        )
    return rank_a[0]


def _scaling(
    module: str, names: dict[str, str], tensors: dict[str, StoredTensor], config: PeftConfig | None, rank: int
) -> float:
    """alpha / rank. If neither the file nor PEFT's config gives alpha, it is the rank."""
    if "alpha" in tensors:
        if tensors["alpha"].shape not in ((), (1,)):
            raise ValueError(f"tensor '{names['alpha']}' is {list(tensors['alpha'].shape)}, expected a single number")
        return read(tensors["alpha"]).item() / rank
    if config is None:
        return 1.0
    try:
        return config.scaling(module, rank)
    except ValueError as error:
        raise ValueError(f"tensor '{names['A']}': {error}") from None
