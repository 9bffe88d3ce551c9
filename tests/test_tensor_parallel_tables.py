"""The tensor-parallel tables: every weight has a rule, and upstream's layout is TensorRT-LLM's."""

import json
import os
from fnmatch import fnmatchcase

import pytest
import torch
import upstream
from helpers import random_transformer
from safetensors import safe_open
from safetensors.torch import load_file

from mmdit_lib.checkpoint import Checkpoint, convert
from mmdit_lib.checkpoint.quantization import stored_tensors
from mmdit_lib.checkpoint.tensor_file import TensorFileWriter
from mmdit_lib.config import Layout
from mmdit_lib.sd3 import KNOWN_MODELS, SD3, SD3Config
from mmdit_lib.sd3.tensor_parallel import SHARDINGS
from mmdit_lib.sd3.transformer import MMDiT

MEDIUM = KNOWN_MODELS["stable-diffusion-3.5-medium"]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", upstream.PUBLISHED)
def test_every_tensor_of_the_published_models_on_disk(tmp_path, name, tp):
    """What `convert --tp_layout trtllm` declares in rank files of the full size, as the safetensors package reads it.

    The files have holes instead of weights, so they take no space on disk.
    """
    model, layout = KNOWN_MODELS[name], Layout(tp_size=tp, tp_layout="trtllm")
    stored = stored_tensors(SD3, model, layout, "float16")
    with TensorFileWriter(tmp_path / "rank0.safetensors", stored) as writer:
        os.truncate(tmp_path / "rank0.safetensors", writer.nbytes)
    table = upstream.table(upstream.published_config(name))
    assert len(table) == upstream.PUBLISHED[name][-1]
    with safe_open(tmp_path / "rank0.safetensors", framework="pt") as file:
        assert set(file.keys()) == table.keys()
        for tensor, row in table.items():
            found = file.get_slice(tensor)
            assert tuple(found.get_shape()) == row.local(tp), tensor
            assert found.get_dtype() == "F16", tensor


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", upstream.PUBLISHED)
def test_every_rank_file_holds_what_tensorrt_llm_would_write(tmp_path, name, tp):
    """Every layer of the published models, a few channels wide: bytes and config, from `convert` and the stand-in."""
    config = upstream.narrow(upstream.published_config(name))
    model = random_transformer(SD3Config(**config))
    model.save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "out"), tp_size=tp, tp_layout="trtllm", progress=False)
    expected = upstream.convert_like_upstream(model, tmp_path / "expected", dtype="float32", tp=tp)
    for rank in range(tp):
        found, wanted = (load_file(f / f"rank{rank}.safetensors") for f in (tmp_path / "out", expected))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) and found[n].dtype == wanted[n].dtype for n in wanted)
    found, wanted = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", expected))
    # TensorRT-LLM keeps unknown keys, so ours does not disturb it.
    assert found.pop("mmdit_lib")["tp_layout"] == "trtllm"
    assert found | {"model_path": "source"} == wanted and list(found) == list(wanted)
    # Without our key, it is still read as upstream's layout.
    assert Checkpoint.open(expected).layout == Layout(tp_size=tp, tp_layout="trtllm" if tp > 1 else "megatron")


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
