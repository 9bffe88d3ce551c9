"""Attention of one device: FlashAttention-3 on a Hopper GPU if its package is installed, else PyTorch's."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from .capability import slow_on_cpu

PACKAGE = "fa3_fwd"
"""The forward pass of FlashAttention-3, `pip install fa3-fwd`: https://github.com/Dao-AILab/flash-attention."""
LARGEST_HEAD = 256
"""Channels of a head that its kernels are built for."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v.

    Args:
        q, k, v: [B, heads, tokens, head_size], in any order in memory that keeps each head's channels together; in
            FP8 only with FlashAttention-3.
        scale: factor of the products of queries and keys.
        v_scale: scale of v if it is FP8, a float32 scalar; that of q and k is 1.
        out: where FlashAttention-3 writes the result.

    Returns:
        [B, heads, tokens of q, head_size], in bfloat16 if q is FP8. With FlashAttention-3 the tokens come first in
        memory; otherwise the order is that of q.
    """
    if _supports(q) and has_flash_attention_3(q.device):  # in this order, so that `torch.compile` sees only the first
        return _flash_attention_3(q, k, v, scale, v_scale, out)
    if slow_on_cpu(q):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


@cache
def has_flash_attention_3(device: torch.device) -> bool:
    """Whether the package is installed and the device is a Hopper GPU, for which its kernels are made.

    Raises `ImportError` if it is installed but does not fit the installed torch.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0) or find_spec(PACKAGE) is None:
        return False
    try:
        import fa3_fwd._C  # noqa: F401  registers the operator
    except (ImportError, OSError) as error:
        raise ImportError(
            f"fa3-fwd is installed but does not load with torch {torch.__version__}: install the version for it, or "
            f"uninstall fa3-fwd to use PyTorch's attention ({error})"
        ) from error
    return True


def _supports(q: torch.Tensor) -> bool:
    """fa3-fwd is built without float16; `torch.compile` does not know its operator."""
    size, dtypes = q.shape[-1], (torch.bfloat16, torch.float8_e4m3fn)
    return q.dtype in dtypes and size % 16 == 0 and size <= LARGEST_HEAD and not torch.compiler.is_compiling()


def _flash_attention_3(q, k, v, scale: float, v_scale: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    batch, heads, tokens, size = q.shape
    if out is None:
        out = torch.empty(tokens, batch, heads, size, dtype=torch.bfloat16, device=q.device).permute(1, 2, 0, 3)
    # Its tensors are [B, tokens, heads, head_size]. One split: each program sums over all keys, in a fixed order.
    torch.ops.fa3_fwd.fwd(
        *(x.transpose(1, 2) for x in (q, k, v)), out=out.transpose(1, 2), softmax_scale=scale, num_splits=1,
        v_descale=None if v_scale is None else v_scale.expand(batch, heads),
    )  # fmt: skip
    return out
