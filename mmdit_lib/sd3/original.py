"""Stability AI's single-file layout: `model.diffusion_model.joint_blocks...`."""

from __future__ import annotations

import torch

from ..architecture import SingleFile


def to_diffusers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' own conversion. Raises `ValueError` if diffusers is not installed."""
    try:
        from diffusers.loaders import single_file_utils
    except ImportError:
        raise ValueError(
            "a checkpoint in the original single-file layout needs diffusers: pip install diffusers"
        ) from None
    return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(tensors)


SINGLE_FILE = SingleFile(prefix="model.diffusion_model.", marker="joint_blocks.", to_diffusers=to_diffusers)
