"""Converting diffusers checkpoints to TensorRT-LLM's checkpoint folders and back, and reading such folders."""

from .conversion import convert
from .exporting import export
from .folder import Checkpoint

__all__ = ["Checkpoint", "convert", "export"]
