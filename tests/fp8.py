"""Small quantized models, and FP8 in diffusers' transformer, written a second time."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from unittest.mock import patch

import helpers
import torch

from mmdit_lib import Checkpoint, build, convert
from mmdit_lib.sd3.keys import to_diffusers
from training.random_pipeline import make_random_pipeline

PROMPTS = ("a red circle", "the blue square on a green background")
MODELS = {
    # The three published architectures, scaled down; widths are multiples of 16, as FP8 tensor cores need.
    "sd3-medium": dict(qk_norm=None, dual_attention_layers=()),
    "sd3.5-medium": dict(dual_attention_layers=(0, 1)),
    "sd3.5-large": dict(dual_attention_layers=(), num_layers=4),
}
SIZES = dict(
    num_layers=3, num_attention_heads=4, attention_head_dim=16, joint_attention_dim=64,
    pooled_projection_dim=48, sample_size=8, pos_embed_max_size=24, qk_norm="rms_norm",
)  # fmt: skip


@cache
def pipeline(name: str) -> Path:
    """A pipeline folder with random weights."""
    return make_random_pipeline(Path(helpers._folders.name, f"fp8-{name}"), **SIZES | MODELS[name])


def named(options: dict) -> str:
    return "".join(f"-{name}-{value}" for name, value in options.items())


@cache
def checkpoint(name: str, dtype: str = "float32", **options) -> Path:
    output = Path(helpers._folders.name, f"fp8-{name}-{dtype}" + named(options))
    options |= dict(quantization="fp8", calibration_prompts=PROMPTS, progress=False)
    return convert(pipeline(name), output, dtype=dtype, **options)


@cache
def engine(name: str, dtype: str = "float32", *, plan: bool = False, converted: tuple = (), **options) -> Path:
    """`converted`: options of `convert`, as pairs."""
    folder = checkpoint(name, dtype, **dict(converted))
    output = folder.parent / f"{folder.name}-{'plan' if plan else 'engine'}" / f"engine{named(options)}"
    output.parent.mkdir(exist_ok=True)
    sizes = dict(min_resolution="32", opt_resolution="64", max_resolution="128", max_batch_size=2)
    return build(folder, output, plan=plan, progress=False, **sizes | options)


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale.to(x.dtype)


def quantized_reference(reference: torch.nn.Module, folder: Path, *, attention: bool = False) -> torch.nn.Module:
    """A copy of diffusers' transformer that rounds what a checkpoint says; with `attention`, in attention too."""
    opened = Checkpoint.open(folder)
    weights, reference = opened.weights(), copy.deepcopy(reference)
    for module in opened.quantization.modules(opened.architecture, opened.model):
        linear = reference.get_submodule(to_diffusers(module))
        value = weights[f"{module}.weight"].float() * weights[f"{module}.weights_scaling_factor"]
        linear.weight.data.copy_(value)
        scale = weights[f"{module}.activation_scaling_factor"]
        linear.register_forward_pre_hook(lambda _, inputs, scale=scale: (rounded(inputs[0], scale), *inputs[1:]))
    for path, module in reference.named_modules() if attention else ():
        if hasattr(module, "to_q"):
            scales = [weights.get(f"{path}.{name}.activation_scaling_factor") for name in ("to_out.0", "to_add_out")]
            module.processor = AttentionInFp8(module.processor, 8 * max(x.item() for x in scales if x is not None))
    return reference


class AttentionInFp8:
    """A processor of diffusers that runs another one, with everything that its attention multiplies in FP8."""

    def __init__(self, processor, value_scale: float):
        self.processor, self.value_scale = processor, torch.tensor(value_scale)

    def __call__(self, *args, **kwargs):
        with patch("torch.nn.functional.scaled_dot_product_attention", self.attention):
            return self.processor(*args, **kwargs)

    def attention(self, q, k, v, dropout_p, is_causal):
        assert not dropout_p and not is_causal
        one = torch.tensor(1.0)
        q, k, v = rounded(q, one), rounded(k, one), rounded(v, self.value_scale)
        probabilities = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5, -1)
        return rounded(probabilities, torch.tensor(1 / 256)) @ v
