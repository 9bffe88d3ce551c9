"""Stable Diffusion 3 / 3.5's transformer (the MMDiT) as TensorRT engines, on one GPU or many.

Typical use: `convert` a checkpoint, `build` an engine folder, `load_pipeline` with it, `compare_layers` with
diffusers. Names are imported on first use, so `import mmdit_lib` is fast.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*__all__, "__version__"]


def __dir__() -> list[str]:
    return __all__
