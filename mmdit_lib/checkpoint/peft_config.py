"""PEFT's `LoraConfig`: its scaling, and what requires more than a low-rank update."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..config import FileConfig, Text, shown
from ..files import parse_json, read_json

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"
"""diffusers stores PEFT's config under this key of the file's metadata."""
HARMLESS_INITS = (None, True, False, "gaussian", "orthogonal")
"""Others also change the base weights."""
REFUSED = (
    "modules_to_save", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "target_parameters",
    "kasa_config",
)  # fmt: skip

Rank = Annotated[int, Field(ge=1, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Pattern = Annotated[str, Field(max_length=4096, pattern=r"^\^?[\w.]+$")]
"""The end of a module's path, or all of it after a '^'. PEFT takes any regular expression; files have these."""


class PeftConfig(FileConfig):
    """The fields of PEFT's `LoraConfig` that matter when a LoRA is fused."""

    r: Rank
    lora_alpha: Number = 8
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, Number] | None = None
    use_rslora: bool = False
    peft_type: Text | None = "LORA"
    init_lora_weights: Any = True
    modules_to_save: Any = None
    layer_replication: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: Any = None
    use_bdlora: Any = None
    target_parameters: Any = None
    kasa_config: Any = None

    @classmethod
    def read(cls, path: Path, metadata: dict[str, str], prefixes: tuple[str, ...]) -> PeftConfig | None:
        """The config in the metadata of a LoRA file, or in `adapter_config.json` beside PEFT's; None if neither.

        Args:
            prefixes: of the keys, in order of preference: diffusers' pipelines store one config for each model.

        Raises:
            ValueError: if it is damaged, or specifies what cannot be fused.
        """
        where: object = f"{path}: {METADATA_KEY}"
        content: object = None
        if METADATA_KEY in metadata:
            try:
                content = parse_json(metadata[METADATA_KEY].encode())
            except ValueError as error:
                raise ValueError(f"{where} does not parse: {error}") from None
        elif path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file():
            where = path.parent / PEFT_CONFIG
            content = read_json(where)
        if isinstance(content, dict):
            found = ({k.removeprefix(p): v for k, v in content.items() if k.startswith(p)} for p in prefixes)
            content = next((fields for fields in found if "r" in fields), None)
        if content is None:
            return None
        config = cls.parse(content, where)
        config._check(where)
        return config

    def _check(self, where: object) -> None:
        if self.peft_type not in (None, "LORA"):
            raise ValueError(f"{where}: peft_type {shown(self.peft_type)}: only LORA can be fused")
        if self.init_lora_weights not in HARMLESS_INITS:
            raise ValueError(
                f"{where}: init_lora_weights {shown(self.init_lora_weights)} also changes the base weights: "
                "have PEFT convert it to a plain LoRA when saving (path_initial_model_for_weight_conversion)"
            )
        for name in REFUSED:
            if getattr(self, name):
                raise ValueError(f"{where}: {name} {shown(getattr(self, name))} cannot be fused")

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B A. Raises `ValueError` if the tensors' rank differs from the config's."""
        expected = _of_pattern(self.rank_pattern, module, self.r)
        if expected != rank:
            raise ValueError(f"its rank is {rank}, but its config has {expected}")
        return _of_pattern(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _of_pattern(patterns: dict | None, module: str, default):
    for pattern, value in (patterns or {}).items():
        if pattern in (module, f"^{module}") or module.endswith(f".{pattern}"):
            return value
    return default
