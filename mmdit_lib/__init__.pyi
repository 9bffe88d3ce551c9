"""The public names, for editors and type checkers and for `lazy_loader`, which imports them on first use."""

from . import parallel, tiny
from .checkpoint import Checkpoint, convert, export
from .config import Layout, PlanOptions, Resolution
from .engine.backend import RunnerOptions
from .engine.build import build
from .engine.folder import EngineFolder
from .engine.onnx_file import export_onnx
from .pipeline import install, load_pipeline, sample
from .reports.parity import compare_layers
from .runner import MMDiTRunner

__version__: str

__all__ = [
    "Checkpoint",
    "EngineFolder",
    "Layout",
    "MMDiTRunner",
    "PlanOptions",
    "Resolution",
    "RunnerOptions",
    "__version__",
    "build",
    "compare_layers",
    "convert",
    "export",
    "export_onnx",
    "install",
    "load_pipeline",
    "parallel",
    "sample",
    "tiny",
]
