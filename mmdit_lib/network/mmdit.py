"""The MMDiT of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206, figure 2).

Every module has the name and the parameters of its counterpart in diffusers'
`SD3Transformer2DModel`, except that a feed-forward's second linear layer is `net.1`, as in
TensorRT-LLM's checkpoints.
"""

from __future__ import annotations

from ..config import ModelConfig
from . import functional as F
from .attention import Attention
from .context_parallel import Stream, gather_output, split_batch
from .embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from .layers import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    FeedForward,
    LayerNorm,
    Linear,
    SD35AdaLayerNormZeroX,
    modulate,
)
from .module import Module, ModuleList


class JointTransformerBlock(Module):
    """Image stream x, text stream c. The last block (`context_pre_only`) only reads the text."""

    def __init__(self, config: ModelConfig, index: int):
        dim, head_dim, qk_norm = config.hidden_size, config.attention_head_dim, config.qk_norm
        self.dual = index in config.dual_attention_layers
        self.context_pre_only = index == config.num_layers - 1
        self.norm1 = SD35AdaLayerNormZeroX(dim) if self.dual else AdaLayerNormZero(dim)
        self.norm1_context = AdaLayerNormContinuous(dim) if self.context_pre_only else AdaLayerNormZero(dim)
        self.attn = Attention(dim, head_dim, qk_norm, "keys" if self.context_pre_only else "full")
        if self.dual:
            self.attn2 = Attention(dim, head_dim, qk_norm, "none")
        self.norm2 = LayerNorm()
        self.ff = FeedForward(dim)
        if not self.context_pre_only:
            self.norm2_context = LayerNorm()
            self.ff_context = FeedForward(dim)

    def forward(self, network, x, c, temb, *, image: Stream, text: Stream):
        x_in, gate_msa, shift_mlp, scale_mlp, gate_mlp, *second = self.norm1(x, temb)
        if self.context_pre_only:
            c_in = self.norm1_context(c, temb)
        else:
            c_in, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(c, temb)

        x_attn, c_attn = self.attn(x_in, c_in, streams=[image, text])

        x = x + gate_msa * x_attn
        if self.dual:
            x_in2, gate_msa2 = second
            x = x + gate_msa2 * self.attn2(x_in2, streams=[image])
        x = x + gate_mlp * self.ff(modulate(self.norm2(x), shift_mlp, scale_mlp))
        if self.context_pre_only:
            return None, x
        c = c + c_gate_msa * c_attn
        c = c + c_gate_mlp * self.ff_context(modulate(self.norm2_context(c), c_shift_mlp, c_scale_mlp))
        # diffusers keeps the text stream finite in float16.
        return (F.clip(c, -65504.0, 65504.0) if c.dtype == "float16" else c), x


class MMDiT(Module):
    """The whole transformer. Without TensorRT it still tells its parameters (`named_parameters`)."""

    def __init__(self, config: ModelConfig):
        self.config = config
        dim = config.hidden_size
        self.pos_embed = PatchEmbed(config.in_channels, dim, config.patch_size, config.pos_embed_max_size)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(dim, config.pooled_projection_dim)
        self.context_embedder = Linear(config.joint_attention_dim, dim)
        self.transformer_blocks = ModuleList(JointTransformerBlock(config, i) for i in range(config.num_layers))
        self.norm_out = AdaLayerNormContinuous(dim)
        self.proj_out = Linear(dim, config.patch_size**2 * config.out_channels)
        self.assign_paths()

    def forward(
        self,
        network,
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        timestep,
        *,
        max_patches: tuple[int, int],
    ):
        """latents [B, C, H, W], text [B, T, J], pooled [B, P], timestep [B] float32 -> [B, C, H, W]."""
        rows, columns = (F.size(hidden_states, i) // self.config.patch_size for i in (2, 3))
        image = Stream.cut(rows * columns, network.mapping.cp_size)
        text = Stream.cut(F.size(encoder_hidden_states, 1), network.mapping.cp_size)

        x = image.split(self.pos_embed(split_batch(hidden_states), max_patches=max_patches))
        c = self.context_embedder(split_batch(text.split(encoder_hidden_states)))
        temb = self.time_text_embed(split_batch(timestep), split_batch(pooled_projections))
        for block in self.transformer_blocks:
            c, x = block(x, c, temb, image=image, text=text)
        patches = self.proj_out(self.norm_out(x, temb))
        return self.unpatchify(gather_output(patches, image), rows, columns)

    def unpatchify(self, x, rows: F.Size, columns: F.Size):
        """[B, rows * columns, p * p * C] -> [B, C, rows * p, columns * p]."""
        p, channels = self.config.patch_size, self.config.out_channels
        x = F.reshape(x, (F.size(x, 0), rows, columns, p, p, channels))
        return F.reshape(F.transpose(x, 0, 5, 1, 3, 2, 4), (F.size(x, 0), channels, rows * p, columns * p))
