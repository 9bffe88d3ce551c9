"""From diffusers' checkpoints to TensorRT-LLM's checkpoint folder, and reading such a folder."""

from .conversion import convert
from .folder import Checkpoint

__all__ = ["Checkpoint", "convert"]
