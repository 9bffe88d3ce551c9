"""Which step of an image a call is, without reading from the GPU."""

from __future__ import annotations

import torch


def place_in(timestep: torch.Tensor, timesteps: torch.Tensor) -> int | None:
    """The index in `timesteps` [steps] of the one element that `timestep` is a view of, or None.

    A pipeline of diffusers gives its transformer such a view, `t.expand(batch)` for each `t` of its scheduler's
    timesteps; a copy, for instance in another dtype or on another device, is not one.
    """
    if timesteps.dim() != 1 or timesteps.stride(0) == 0 or timestep.dtype != timesteps.dtype:
        return None
    one = all(size == 1 or stride == 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))
    if not one or timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    place, left = divmod(timestep.storage_offset() - timesteps.storage_offset(), timesteps.stride(0))
    return place if left == 0 and 0 <= place < len(timesteps) else None
