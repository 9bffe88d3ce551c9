"""Converting diffusers checkpoints to TensorRT-LLM's checkpoint folders, and reading such folders."""

from .conversion import convert
from .folder import Checkpoint

__all__ = ["Checkpoint", "convert"]
