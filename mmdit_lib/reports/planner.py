"""Which layouts fit into a GPU's memory, counted from graphs and configs, without weights or a GPU."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..architecture import ModelConfig
from ..config import TORCH_DTYPES, Dtype, Layout, Sizes
from ..sd3.companions import text_encoders, vae
from .step_time import rank_memory


@dataclass(frozen=True)
class Companions:
    """What runs beside the transformer, in bytes. In a layout of several ranks, rank 0 alone runs it."""

    encoders: Mapping[str, int]
    """Weights of each text encoder."""
    vae: int
    decoding: int
    """The VAE's peak beyond its weights, without what cuDNN reserves."""


@lru_cache(maxsize=32)
def companions(dtype: Dtype, height: int, width: int, images: int) -> Companions:
    kind = TORCH_DTYPES[dtype]
    with torch.device("meta"), torch.inference_mode():
        encoders = {name: weight_bytes(module) for name, module in text_encoders(kind).items()}
        decoder = vae(kind)
        factor = 2 ** (len(decoder.config.block_out_channels) - 1)
        latents = images, decoder.config.latent_channels, height // factor, width // factor
        with PeakBytes() as peak:
            decoder.decode(torch.empty(latents, dtype=kind))
    return Companions(encoders, weight_bytes(decoder), peak.nbytes)


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def bytes_of_rank_0(
    model: ModelConfig, layout: Layout, sizes: Sizes, dtype: Dtype, *, encoders: bool = True, images: int = 1
) -> int:
    """Weights of all parts, and the larger of a step's and the decoder's peak: they do not run at the same time.

    Args:
        encoders: whether the text encoders stay on the same GPU.
        images: decoded at once.

    Raises:
        ValueError: if the model does not support the layout or the sizes.
    """
    memory = rank_memory(model, layout, sizes, dtype)
    beside = companions(dtype, sizes.height, sizes.width, images)
    weights = memory.weights + beside.vae + (sum(beside.encoders.values()) if encoders else 0)
    return weights + memory.ahead + max(memory.activations + memory.exchange, beside.decoding)


def memory_plan(
    models: Mapping[str, ModelConfig],
    layouts: Mapping[str, Layout],
    sizes: Sizes,
    dtype: Dtype = "bfloat16",
    *,
    cards: Sequence[int] = (16, 24, 48, 80),
    images: int = 1,
) -> pd.DataFrame:
    """Gigabytes on rank 0 by model and layout, with and without text encoders, each with the smallest card that fits.

    A card of 24 GB has 24 x 2^30 bytes, 7 % more than 24 x 10^9: the rest is left to what CUDA, cuBLAS and cuDNN
    reserve. What a model does not support is '-'.
    """
    rows = {}
    for name, model in models.items():
        for encoders in (True, False):
            row = rows[name, "with" if encoders else "without"] = {}
            for label, layout in layouts.items():
                try:
                    needed = bytes_of_rank_0(model, layout, sizes, dtype, encoders=encoders, images=images) / 1e9
                except ValueError:
                    row[label] = "-"
                    continue
                card = next((f"{card} GB" for card in cards if needed <= card), "none")
                row[label] = f"{needed:.1f}: {card}"
    return pd.DataFrame(rows).T.rename_axis(index=["model", "text encoders"])


class PeakBytes(TorchDispatchMode):
    """Counts the tensors that are alive while operators run inside it; `nbytes` is the peak."""

    def __init__(self):
        super().__init__()
        self.nbytes = self._alive = 0
        self._tensors: Counter[int] = Counter()  # that share a storage, by the storage's address

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._hold(x)
        self.nbytes = max(self.nbytes, self._alive)
        return result

    def _hold(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()
        self._tensors[address] += 1
        self._alive += nbytes if self._tensors[address] == 1 else 0
        weakref.finalize(x, self._release, address, nbytes)

    def _release(self, address: int, nbytes: int) -> None:
        self._tensors[address] -= 1
        self._alive -= 0 if self._tensors[address] else nbytes
