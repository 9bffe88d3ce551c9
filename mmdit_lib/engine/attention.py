"""Attention of one device: FlashAttention-3 on a Hopper GPU if its package is there, else PyTorch's."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F

PACKAGE = "fa3_fwd"
"""The forward pass of FlashAttention-3, `pip install fa3-fwd`: https://github.com/Dao-AILab/flash-attention."""
LARGEST_HEAD = 256


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale q k^T) v.

    Args:
        q, k, v: [B, heads, tokens, head_size], in any order in memory that keeps each head's channels together.
        scale: factor of the products of queries and keys.

    Returns:
        [B, heads, tokens of q, head_size], on a GPU in the order of q in memory.
    """
    if has_flash_attention_3(q.device) and _supports(q):
        return _flash_attention_3(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


@cache
def has_flash_attention_3(device: torch.device) -> bool:
    """Whether the package is installed and the device is what its kernels are made for, a Hopper GPU.

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
    size = q.shape[-1]
    return q.dtype == torch.bfloat16 and size % 8 == 0 and size <= LARGEST_HEAD and not torch.compiler.is_compiling()


def _flash_attention_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    out = torch.empty_like(q)
    # Its tensors are [B, tokens, heads, head_size]. One split: each program sums over all keys, in a fixed order.
    tokens_first = (x.transpose(1, 2) for x in (q, k, v))
    torch.ops.fa3_fwd.fwd(*tokens_first, out=out.transpose(1, 2), softmax_scale=scale, num_splits=1)
    return out
