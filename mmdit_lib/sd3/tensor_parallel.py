"""The two tensor-parallel tables: which linear layer is sharded along which dimension, and why."""

from __future__ import annotations

from ..config import TpLayout
from ..network.tensor_parallel import Rule, Sharding

HEADS = "every rank holds its own heads"
MODULATION = "a vector per sample: costs every rank memory, but next to no time"
MEGATRON: tuple[Rule, ...] = (
    Rule("*.attn*.to_[qkv]", "colwise", HEADS),
    Rule("*.attn.add_[qkv]_proj", "colwise", HEADS),
    Rule("*.attn*.to_out.0", "rowwise", "one all-reduce sums the heads' contributions"),
    Rule("*.attn.to_add_out", "rowwise", "one all-reduce sums the heads' contributions"),
    Rule("*.attn*.norm_*", "replicated", "one weight per head channel, the same for every head"),
    Rule("*.ff*.net.0.proj", "colwise", "GELU acts element by element, so the hidden features stay sharded"),
    Rule("*.ff*.net.1", "rowwise", "one all-reduce per MLP"),
    Rule("*.norm1*.linear", "replicated", MODULATION),
    Rule("norm_out.linear", "replicated", MODULATION),
    Rule("time_text_embed.*", "replicated", "a vector per sample: reducing it costs more than computing it"),
    Rule("context_embedder", "replicated", "its output is the text stream, which every tp rank needs in full"),
    Rule("pos_embed*", "replicated", "its output is the image stream, which every tp rank needs in full"),
    Rule("proj_out", "replicated", "patch_size^2 * channels rows: too few to shard"),
)

# TensorRT-LLM <= 1.2.1: an all-gather after nearly every layer, 2.5 times the MLP's traffic and 1.6 to
# 1.8 times a full step's (`mmdit traffic`). Supported for compatibility with its checkpoints.
TRTLLM: tuple[Rule, ...] = (
    Rule("*.ff*.net.0.proj", "colwise_gather", "upstream"),
    Rule("*.ff*.net.1", "colwise_gather", "upstream"),
    Rule("*.norm1.linear", "colwise_gather", "upstream"),
    Rule("time_text_embed.*.linear_1", "colwise", "upstream"),
    Rule("time_text_embed.*.linear_2", "rowwise", "upstream"),
    Rule("context_embedder", "colwise_gather", "upstream"),
    Rule("proj_out", "colwise_gather", "upstream"),
    *MEGATRON,
)

SHARDINGS: dict[TpLayout, Sharding] = {
    "megatron": Sharding("megatron", MEGATRON),
    "trtllm": Sharding("trtllm", TRTLLM),
}
