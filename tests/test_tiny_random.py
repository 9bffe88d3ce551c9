"""The random pipeline is complete and deterministic, and its output depends on every weight of the transformer."""

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from training.random_pipeline import make_random_pipeline


def load(folder: Path, **kwargs) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_random_pipeline(tmp_path_factory.mktemp("tiny") / "random")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes(folder, tmp_path):
    assert digests(make_random_pipeline(tmp_path / "again")) == digests(folder)
    other = digests(make_random_pipeline(tmp_path / "other", seed=1))
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert other[name] != digests(folder)[name]


@pytest.mark.parametrize("text", [77, 256, 512])
def test_makes_a_picture(folder, text):
    pipe = load(folder)
    picture = pipe("a red circle", num_inference_steps=2, max_sequence_length=text, height=64, width=96).images[0]
    assert picture.size == (96, 64)


def test_default_call(folder):
    pixels = load(folder)("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert pixels.shape == (128, 128, 3) and pixels.std() > 0.05


def test_every_transformer_weight_matters(folder):
    model = load(folder).transformer
    torch.manual_seed(0)
    inputs = dict(
        hidden_states=torch.randn(1, 16, 8, 12),
        encoder_hidden_states=torch.randn(1, 154, 64),
        pooled_projections=torch.randn(1, 64),
        timestep=torch.tensor([500.0]),
    )
    model(**inputs, return_dict=False)[0].square().mean().backward()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    unread = ("transformer_blocks.2.attn.add_q_proj", "transformer_blocks.2.attn.norm_added_q")  # context_pre_only
    for name, parameter in model.named_parameters():
        if name.startswith(unread):
            continue
        key_bias = name.endswith(("to_k.bias", "add_k_proj.bias"))  # softmax cancels most of it
        assert parameter.grad.abs().max() > (1e-7 if key_bias else 1e-5) * largest, name


@pytest.mark.parametrize(
    "overrides",
    [
        dict(qk_norm=None, dual_attention_layers=()),
        dict(num_layers=2, num_attention_heads=8, joint_attention_dim=96, pooled_projection_dim=96),
    ],
)
def test_overrides(tmp_path, overrides):
    pipe = load(make_random_pipeline(tmp_path / "other", **overrides))
    assert pipe("a square", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


def test_refusals(folder, tmp_path):
    with pytest.raises(ValueError, match="already exists"):
        make_random_pipeline(folder)
    with pytest.raises(ValueError, match="unknown transformer arguments"):
        make_random_pipeline(tmp_path / "x", layers=2)
    with pytest.raises(ValueError, match="joint_attention_dim is 48"):
        make_random_pipeline(tmp_path / "x", joint_attention_dim=48)
    assert list(tmp_path.iterdir()) == []
