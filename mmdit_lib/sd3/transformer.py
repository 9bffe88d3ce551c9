"""The MMDiT of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206, figure 2).

Every module has the name and the parameters of its counterpart in diffusers'
`SD3Transformer2DModel`, except that a feed-forward's second linear layer is `net.1`, as in
TensorRT-LLM's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from ..config import BuildConfig
from ..network import functional as F
from ..network.context_parallel import Stream, gather_output, split_batch
from ..network.layers import FeedForward, LayerNorm, Linear
from ..network.module import Module, ModuleList
from ..network.network import Tensor
from .attention import Attention
from .config import SD3Config
from .embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from .inputs import residual_inputs
from .modulation import AdaLayerNormContinuous, AdaLayerNormZero


class JointTransformerBlock(Module):
    """Image stream x, text stream c. The last block (`context_pre_only`) only attends to the text."""

    def __init__(self, config: SD3Config, index: int):
        dim, head_dim, qk_norm = config.hidden_size, config.attention_head_dim, config.qk_norm
        self.dual = index in config.dual_attention_layers
        self.context_pre_only = index == config.num_layers - 1
        self.norm1 = AdaLayerNormZero(dim, self.dual)
        self.norm1_context = AdaLayerNormContinuous(dim) if self.context_pre_only else AdaLayerNormZero(dim)
        self.attn = Attention(dim, head_dim, qk_norm, "keys" if self.context_pre_only else "full")
        if self.dual:
            self.attn2 = Attention(dim, head_dim, qk_norm, "none")
        self.norm2 = LayerNorm()
        self.ff = FeedForward(dim)
        if not self.context_pre_only:
            self.norm2_context = LayerNorm()
            self.ff_context = FeedForward(dim)

    def forward(self, x, c, temb, *, image: Stream, text: Stream):
        """x [B, N, D], c [B, T, D], temb [B, D] -> (c, x); c is None after the last block."""
        norm = self.norm1(x, temb)
        norm_c = self.norm1_context(c, temb)
        c_in = norm_c if self.context_pre_only else norm_c.attn.x

        x_attn, c_attn = self.attn(norm.attn.x, c_in, streams=[image, text])

        x = x + norm.attn.gate * x_attn
        if self.dual:
            x = x + norm.attn2.gate * self.attn2(norm.attn2.x, streams=[image])
        x = x + norm.mlp.gate * self.ff(norm.mlp.modulate(self.norm2(x)))
        if self.context_pre_only:
            return None, x
        c = c + norm_c.attn.gate * c_attn
        c = c + norm_c.mlp.gate * self.ff_context(norm_c.mlp.modulate(self.norm2_context(c)))
        # As in diffusers, to keep the text stream finite in float16.
        return (F.clip(c, -65504.0, 65504.0) if c.dtype == "float16" else c), x


class MMDiT(Module):
    """The full transformer. `named_parameters` works without TensorRT."""

    def __init__(self, config: SD3Config):
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
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        timestep,
        kept_layers=None,
        *,
        residuals: Sequence[Tensor | None] = (),
        max_patches: tuple[int, int],
    ):
        """latents [B, C, H, W], text [B, T, J], pooled [B, P], timestep [B] float32 -> [B, C, H, W].

        Args:
            kept_layers: bool [blocks], false for a block that is skipped: its result is replaced by its input.
            residuals: a ControlNet's output [B, N, D] to add after each block, or None.
            max_patches: rows and columns of the largest image, in patches.
        """
        cp_size = hidden_states.network.mapping.cp_size
        rows, columns = (F.size(hidden_states, i) // self.config.patch_size for i in (2, 3))
        image = Stream.split_over(rows * columns, cp_size)
        text = Stream.split_over(F.size(encoder_hidden_states, 1), cp_size)

        x = image.split(self.pos_embed(split_batch(hidden_states), max_patches=max_patches))
        c = self.context_embedder(split_batch(text.split(encoder_hidden_states)))
        temb = self.time_text_embed(split_batch(timestep), split_batch(pooled_projections))
        local = {residual: image.split(split_batch(residual)) for residual in residuals if residual is not None}
        for i, (block, residual) in enumerate(zip_longest(self.transformer_blocks, residuals)):
            after = block(x, c, temb, image=image, text=text)
            c, x = after if kept_layers is None else kept(F.narrow(kept_layers, 0, i, 1), after, (c, x))
            if residual is not None:
                x = x + local[residual]
        patches = self.proj_out(self.norm_out(x, temb))
        return self.unpatchify(gather_output(patches, image), rows, columns)

    def unpatchify(self, x, rows: F.Size, columns: F.Size):
        """[B, rows * columns, p * p * C] -> [B, C, rows * p, columns * p]."""
        p, channels = self.config.patch_size, self.config.out_channels
        x = F.reshape(x, (F.size(x, 0), rows, columns, p, p, channels))
        return F.reshape(F.transpose(x, 0, 5, 1, 3, 2, 4), (F.size(x, 0), channels, rows * p, columns * p))


def kept(keep: Tensor, after: tuple[Tensor | None, Tensor], before: tuple[Tensor, Tensor]):
    """A block's results, or its inputs if `keep` [1] is false. (The last block returns no text.)"""
    keep = F.reshape(keep, (1, 1, 1))
    return tuple(new if new is None else F.select(keep, new, old) for new, old in zip(after, before, strict=True))


def define(config: SD3Config, inputs: dict[str, Tensor], build: BuildConfig) -> Tensor:
    """Add the full network, with the part of the position table that the largest resolution needs."""
    step, largest = config.pixel_step(build.vae_scale_factor), build.max_resolution
    names = residual_inputs(config, build)
    residuals = [inputs.get(name) for name in names]
    others = {name: x for name, x in inputs.items() if name not in names}
    max_patches = (largest.height // step, largest.width // step)
    return MMDiT(config)(**others, residuals=residuals, max_patches=max_patches)
