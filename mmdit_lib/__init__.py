"""Stable Diffusion 3 / 3.5's transformer (the MMDiT) as TensorRT engines, on one GPU or many.

The road through the library: `convert` a checkpoint, `build` an engine folder, `load_pipeline` with it,
`compare_layers` with diffusers. Each name is imported at its first use, so `import mmdit_lib` is quick.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*__all__, "__version__"]


def __dir__() -> list[str]:
    return __all__
