"""The tensor-parallel tables: every weight has a rule, and upstream's layout is TensorRT-LLM's."""

import json
from fnmatch import fnmatchcase
from types import MappingProxyType

import pytest
import torch
from helpers import random_transformer
from safetensors.torch import load_file

from mmdit_lib.checkpoint import Checkpoint, convert
from mmdit_lib.sd3 import KNOWN_MODELS
from mmdit_lib.sd3.keys import from_diffusers
from mmdit_lib.sd3.tensor_parallel import SHARDINGS
from mmdit_lib.sd3.transformer import MMDiT

MEDIUM = KNOWN_MODELS["stable-diffusion-3.5-medium"]
LAYERS, DUAL = 24, 13


def contract(d: int, text: int, pooled: int, positions: int) -> MappingProxyType:
    """Name -> (full shape, dimension sharded by tensor parallelism), as TensorRT-LLM 1.2.1 writes SD3.5-medium.

    Written out from the contract's table; nothing here comes from `sd3/tensor_parallel.py` or `sd3/transformer.py`.
    """
    found: dict[str, tuple[tuple[int, ...], int | None]] = {}

    def linear(name: str, rows: int, columns: int, split: str) -> None:
        weight, bias = {"column": (0, 0), "row": (1, None), "whole": (None, None)}[split]
        found[f"{name}.weight"] = (rows, columns), weight
        found[f"{name}.bias"] = (rows,), bias

    def attention(name: str, *, text_stream: bool, text_out: bool) -> None:
        for projection in ("to_q", "to_k", "to_v") + (
            ("add_q_proj", "add_k_proj", "add_v_proj") if text_stream else ()
        ):
            linear(f"{name}.{projection}", d, d, "column")
        for norm in ("norm_q", "norm_k") + (("norm_added_q", "norm_added_k") if text_stream else ()):
            found[f"{name}.{norm}.weight"] = (64 * d // 1536,), None
        linear(f"{name}.to_out.0", d, d, "row")
        if text_out:
            linear(f"{name}.to_add_out", d, d, "row")

    found["pos_embed.pos_embed"] = (1, positions, d), None
    found["pos_embed.proj.weight"] = (d, 16, 2, 2), None
    found["pos_embed.proj.bias"] = (d,), None
    for embedder, width in (("timestep_embedder", 256), ("text_embedder", pooled)):
        linear(f"time_text_embed.{embedder}.linear_1", d, width, "column")
        linear(f"time_text_embed.{embedder}.linear_2", d, d, "row")
    linear("context_embedder", d, text, "column")
    for i in range(LAYERS):
        block, last = f"transformer_blocks.{i}", i == LAYERS - 1
        linear(f"{block}.norm1.linear", (9 if i < DUAL else 6) * d, d, "column")
        linear(f"{block}.norm1_context.linear", (2 if last else 6) * d, d, "whole")
        attention(f"{block}.attn", text_stream=True, text_out=not last)
        if i < DUAL:
            attention(f"{block}.attn2", text_stream=False, text_out=False)
        for mlp in ("ff",) if last else ("ff", "ff_context"):
            linear(f"{block}.{mlp}.net.0.proj", 4 * d, d, "column")
            linear(f"{block}.{mlp}.net.1", d, 4 * d, "column")
    linear("norm_out.linear", 2 * d, d, "whole")
    linear("proj_out", 64, d, "column")
    return MappingProxyType(found)


def halved(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    return tuple(size // 2 if i == dim else size for i, size in enumerate(shape))


def test_upstream_layout_of_sd35_medium():
    expected = contract(1536, 4096, 2048, 384 * 384)
    assert len(expected) == 909
    full = MMDiT(MEDIUM).named_parameters()
    assert full == {name: shape for name, (shape, _) in expected.items()}
    for name, (shape, dim) in expected.items():
        assert SHARDINGS["trtllm"].local_shape(name, full[name], 2) == halved(shape, dim), name


def test_upstream_checkpoint_on_disk(tmp_path):
    """All 24 layers of SD3.5-medium, 1/48 as wide: each rank's file holds the halves that the contract specifies."""
    values = dict(num_attention_heads=4, attention_head_dim=8, caption_projection_dim=32, joint_attention_dim=64,
                  pooled_projection_dim=48, pos_embed_max_size=8)  # fmt: skip
    model = random_transformer(MEDIUM.model_copy(update=values))
    model.save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "out"), tp_size=2, tp_layout="trtllm", progress=False)
    expected = contract(32, 64, 48, 64)
    for name in [n for n in expected if ".norm_" in n]:
        expected = MappingProxyType({**expected, name: ((8,), None)})
    whole = {from_diffusers(name): tensor for name, tensor in model.state_dict().items()}
    ranks = [load_file(tmp_path / "out" / f"rank{r}.safetensors") for r in range(2)]
    for rank, tensors in enumerate(ranks):
        assert tensors.keys() == expected.keys()
        for name, (shape, dim) in expected.items():
            assert tuple(whole[name].shape) == shape, name
            part = whole[name] if dim is None else whole[name].chunk(2, dim)[rank]
            assert torch.equal(tensors[name], part), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mapping"]["tp_size"] == 2 and config["mapping"]["world_size"] == 2
    assert config["architecture"] == "SD3Transformer2DModel"
    # As written by upstream, without our key, it is still read as upstream's layout.
    del config["mmdit_lib"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(tmp_path / "out").layout.tp_layout == "trtllm"


@pytest.mark.parametrize("layout", SHARDINGS)
@pytest.mark.parametrize("model", KNOWN_MODELS)
def test_every_weight_has_a_rule_with_a_reason(model, layout):
    used = {
        SHARDINGS[layout].rule_for(name.rpartition(".")[0]) for name in MMDiT(KNOWN_MODELS[model]).named_parameters()
    }
    assert all(rule.reason for rule in used)
    idle = [rule.pattern for rule in SHARDINGS[layout].rules if rule not in used]
    # Rules that upstream's come before, and norms that SD3-medium has not.
    assert layout == "trtllm" or idle == ([] if KNOWN_MODELS[model].qk_norm else ["*.attn*.norm_*"])


def test_megatron_differs_only_in_what_it_gathers_less():
    """One all-reduce per MLP; otherwise blocks are sharded as upstream does."""
    patterns = {"*.ff*.net.1", "*.norm1.linear", "time_text_embed.*", "context_embedder", "proj_out"}
    full = MMDiT(MEDIUM).named_parameters()
    megatron, trtllm = (SHARDINGS[name].local_shapes(full, 2) for name in ("megatron", "trtllm"))
    differ = {n for n in full if megatron[n] != trtllm[n]}
    assert {p for p in patterns if any(fnmatchcase(n, f"{p}*") for n in differ)} == patterns
    assert all(any(fnmatchcase(n, f"{p}*") for p in patterns) for n in differ)


def test_unknown_module_is_refused():
    with pytest.raises(ValueError, match=r"no rule of the megatron sharding table covers 'controlnet.0'"):
        SHARDINGS["megatron"].rule_for("controlnet.0")
