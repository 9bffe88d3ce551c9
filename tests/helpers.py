"""Small models for the tests of networks, engines and runners, and the folders made from them."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from mmdit_lib.checkpoint import convert
from mmdit_lib.config import ModelConfig
from mmdit_lib.engine.build import build
from mmdit_lib.pipeline import MMDiTRunner

# These models are too small for threads to help, and threads that wait for a busy core cost a hundredfold.
torch.set_num_threads(1)


def model_config(heads: int = 4, head_dim: int = 16, **fields) -> ModelConfig:
    values = dict(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=head_dim,
        num_attention_heads=heads, joint_attention_dim=40, caption_projection_dim=heads * head_dim,
        pooled_projection_dim=48, pos_embed_max_size=24, dual_attention_layers=(), qk_norm="rms_norm",
    )  # fmt: skip
    return ModelConfig(**values | fields)


MODELS = {
    # The three published architectures: the same flags, few layers, small widths.
    "sd3-medium": model_config(qk_norm=None),
    "sd3.5-medium": model_config(dual_attention_layers=(0, 1), pos_embed_max_size=48),
    "sd3.5-large": model_config(heads=2, head_dim=24, num_layers=4),
    # Two that nothing was written for.
    "three-heads-of-8": model_config(
        heads=3, head_dim=8, num_layers=2, dual_attention_layers=(1,), in_channels=5, out_channels=7
    ),
    "patch-3-table-20": model_config(
        heads=5, head_dim=12, patch_size=3, pos_embed_max_size=20, sample_size=30, qk_norm=None,
        dual_attention_layers=(0, 2),
    ),
}  # fmt: skip


def random_transformer(config: ModelConfig, seed: int = 0) -> SD3Transformer2DModel:
    """Every parameter random (biases and norms too), activations near unit size: each weight shows in the output."""
    model = SD3Transformer2DModel(**config.to_diffusers()).eval()
    generator = torch.Generator().manual_seed(seed)
    tensors = {**dict(model.named_parameters()), "pos_embed.pos_embed": model.pos_embed.pos_embed}
    with torch.no_grad():
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name == "pos_embed.pos_embed":
                tensor.copy_(0.7 * noise)  # the size of sines and cosines
            elif name.endswith("bias"):
                tensor.copy_(0.3 * noise)
            elif tensor.dim() == 1:  # norms
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise / math.sqrt(tensor[0].numel()))
    return model


@dataclass
class Case:
    """A model and, made when first asked for, what comes of it: diffusers' folder, checkpoints, engines, runners."""

    config: ModelConfig
    root: Path
    _cache: dict = field(default_factory=dict)

    @cached_property
    def reference(self) -> SD3Transformer2DModel:
        return random_transformer(self.config)

    def reference_in(self, dtype: str) -> SD3Transformer2DModel:
        if dtype == "float32":
            return self.reference
        return self._once(("reference", dtype), lambda: random_transformer(self.config).to(getattr(torch, dtype)))

    @cached_property
    def transformer(self) -> Path:
        self.reference.save_pretrained(self.root / "transformer")
        return self.root / "transformer"

    def checkpoint(self, dtype: str = "float32") -> Path:
        output = self.root / f"checkpoint-{dtype}"
        return self._once(output, lambda: convert(str(self.transformer), str(output), dtype=dtype, progress=False))

    @property
    def step(self) -> int:
        return 8 * self.config.patch_size

    def engine(self, dtype: str = "float32") -> Path:
        output = self.root / f"engine-{dtype}"
        options = dict(
            max_batch_size=3, min_resolution=str(2 * self.step), opt_resolution=str(8 * self.step),
            max_resolution=str(20 * self.step), progress=False,
        )  # fmt: skip
        return self._once(output, lambda: build(str(self.checkpoint(dtype)), str(output), **options))

    def runner(self, dtype: str = "float32") -> MMDiTRunner:
        return self._once(("runner", dtype), lambda: self.open(dtype))

    def open(self, dtype: str = "float32", **options) -> MMDiTRunner:
        return MMDiTRunner.from_engine(self.engine(dtype), **{"backend": "pytorch", "device": "cpu"} | options)

    def inputs(
        self, *, patches=(8, 8), tokens: int = 154, batch: int = 2, seed: int = 0, dtype: str = "float32"
    ) -> dict:
        """Inputs by name, `patches` rows by columns; `timestep` fractional."""
        p, config = self.config.patch_size, self.config
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

        return {
            "hidden_states": draw(batch, config.in_channels, patches[0] * p, patches[1] * p),
            "encoder_hidden_states": draw(batch, tokens, config.joint_attention_dim),
            "pooled_projections": draw(batch, config.pooled_projection_dim),
            "timestep": 1000 * torch.rand(batch, generator=generator),
        }

    def _once(self, key, make):
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


_folders = tempfile.TemporaryDirectory(prefix="mmdit-test-")  # removed when the tests end


@cache
def case(name: str) -> Case:
    """One of `MODELS`; everything made from it is made once for all tests."""
    root = Path(_folders.name, name)
    root.mkdir()
    return Case(MODELS[name], root)


@torch.inference_mode()
def diffusers_output(model: SD3Transformer2DModel, inputs: dict) -> torch.Tensor:
    moved = {name: value if name == "timestep" else value.to(model.dtype) for name, value in inputs.items()}
    return model(**moved, return_dict=False)[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()
