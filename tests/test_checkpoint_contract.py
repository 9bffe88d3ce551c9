"""The contents of a checkpoint, against TensorRT-LLM's contract and diffusers' model. Shapes only, no weights."""

import json

import pytest
import torch
import upstream
from diffusers import SD3Transformer2DModel

from mmdit_lib.checkpoint.manifest import checkpoint_config
from mmdit_lib.config import Layout
from mmdit_lib.sd3 import KNOWN_MODELS, SD3
from mmdit_lib.sd3.keys import from_diffusers, to_diffusers
from mmdit_lib.sd3.tensor_parallel import SHARDINGS
from mmdit_lib.sd3.transformer import MMDiT

MEDIUM = KNOWN_MODELS["stable-diffusion-3.5-medium"]


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [
        ("stable-diffusion-3-medium", 683, 2_028_328_000),
        ("stable-diffusion-3.5-medium", 909, 2_243_171_520),
        ("stable-diffusion-3.5-large", 1227, 8_056_627_520),
    ],
)
def test_published_models(name, tensors, parameters):
    config = KNOWN_MODELS[name]
    shapes = SD3.parameters(config)
    assert len(shapes) == tensors
    assert sum(torch.Size(s).numel() for n, s in shapes.items() if n != "pos_embed.pos_embed") == parameters
    with torch.device("meta"):
        reference = SD3Transformer2DModel(**config.to_diffusers()).state_dict()
    assert {to_diffusers(n): tuple(s) for n, s in shapes.items()} == {n: tuple(t.shape) for n, t in reference.items()}
    assert {from_diffusers(n) for n in reference} == shapes.keys()
    assert SD3.infer_config(shapes, None) == config


def test_key_table_is_two_way():
    for name in (
        "transformer_blocks.10.ff.net.2",
        "transformer_blocks.1.ff_context.net.2.bias",
        "pos_embed.proj.weight",
    ):
        assert to_diffusers(from_diffusers(name)) == name
    assert from_diffusers("transformer_blocks.0.ff.net.2.weight") == "transformer_blocks.0.ff.net.1.weight"
    assert to_diffusers("transformer_blocks.7.ff_context.net.1") == "transformer_blocks.7.ff_context.net.2"
    same = [p for p, _ in MMDiT(MEDIUM).named_modules() if not p.endswith(".net.1")]
    assert [to_diffusers(p) for p in same] == same
    with pytest.raises(ValueError, match="dropout"):
        from_diffusers("transformer_blocks.0.ff.net.1.weight")
    with pytest.raises(ValueError, match="number 1 here"):
        to_diffusers("transformer_blocks.0.ff.net.2")


def test_modules_have_diffusers_paths():
    with torch.device("meta"):
        reference = {path for path, _ in SD3Transformer2DModel(**MEDIUM.to_diffusers()).named_modules()}
    ours = {to_diffusers(path) for path, module in MMDiT(MEDIUM).named_modules() if path}
    assert ours <= reference


def megatron_part(name: str, row: upstream.Row, tp: int) -> tuple[int, ...]:
    """Attention as upstream, the MLP colwise then rowwise, everything else replicated."""
    if ".ff" in name and ".net.1." in name:
        return (row.shape[0], row.shape[1] // tp) if name.endswith("weight") else row.shape
    return row.local(tp) if ".attn" in name or ".net.0." in name else row.shape


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", upstream.PUBLISHED)
def test_tensor_parallel_shapes_of_the_published_models(name, tp):
    assert upstream.published_config(name) == KNOWN_MODELS[name].model_dump(mode="json")
    table, parameters = upstream.table(upstream.published_config(name)), SD3.parameters(KNOWN_MODELS[name])
    assert parameters == {tensor: row.shape for tensor, row in table.items()}
    for tensor, row in table.items():
        assert SHARDINGS["trtllm"].local_shape(tensor, row.shape, tp) == row.local(tp), tensor
        assert SHARDINGS["trtllm"].shard_dim(tensor) == row.dim, tensor
        assert SHARDINGS["megatron"].local_shape(tensor, row.shape, tp) == megatron_part(tensor, row, tp), tensor


@pytest.mark.parametrize("tp, cp", [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("name", upstream.PUBLISHED)
def test_config_of_the_published_models(name, tp, cp):
    found = checkpoint_config(SD3, KNOWN_MODELS[name], "bfloat16", Layout(tp_size=tp, cp_size=cp), "some/model", {})
    assert found.pop("mmdit_lib") == {}
    expected = upstream.config_json(upstream.published_config(name), "bfloat16", tp, cp, "some/model")
    assert json.dumps(found) == json.dumps(expected)  # keys, their order and values
