"""The training set: scenes as numbers and captions as tokens. Pictures are rendered on the fly during training."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .captions import caption, words
from .render import describe
from .scenes import draw_scene
from .tokenizers import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

CAPTION_LENGTH = 77  # T5 tokens per caption; no caption is longer
CHUNK = 5000  # scenes per task; fixed, because each task's seed and so the data depend on it

BUCKETS = {  # (height, width) in pixels: share of the training scenes
    (128, 128): 0.44,
    (96, 96): 0.08,
    (160, 160): 0.08,
    (192, 192): 0.08,
    (96, 128): 0.04,
    (128, 96): 0.04,
    (112, 144): 0.04,
    (144, 112): 0.04,
    (128, 192): 0.04,
    (192, 128): 0.04,
    (96, 192): 0.04,
    (192, 96): 0.04,
}


@dataclass(frozen=True)
class Data:
    """N scenes with one caption each."""

    numbers: Tensor
    """[N, 11], float32: scenes as `render` takes them."""
    clip: Tensor
    """[N, 77], int16: CLIP token ids of the captions."""
    t5: Tensor
    """[N, 77], int16: T5 token ids of the captions."""

    def to(self, device: torch.device) -> Data:
        return Data(self.numbers.to(device), self.clip.to(device), self.t5.to(device))

    def buckets(self) -> dict[tuple[int, int], slice]:
        """Which scenes are drawn at which (height, width): the first 44% at 128x128, and so on."""
        edges = [round(x * len(self.numbers)) for x in np.cumsum([0.0, *BUCKETS.values()])]
        return {size: slice(a, b) for size, a, b in zip(BUCKETS, edges[:-1], edges[1:], strict=True)}


def make_data(count: int, seed: int, workers: int) -> Data:
    """`count` random scenes, none of them held out, with captions.

    Args:
        count: number of scenes.
        seed: determines all scenes and captions, whatever `workers` is.
        workers: processes to use.
    """
    tasks = [(seed * 1_000_003 + first, min(CHUNK, count - first)) for first in range(0, count, CHUNK)]
    if workers > 1:
        with ProcessPoolExecutor(workers) as executor:
            chunks = list(executor.map(_make_chunk, tasks))
    else:
        chunks = [_make_chunk(task) for task in tasks]
    return Data(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*chunks, strict=True)))


def _make_chunk(task: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    seed, count = task
    rng = random.Random(seed)
    scenes = [draw_scene(rng) for _ in range(count)]
    numbers = np.array([describe(scene, rng) for scene in scenes], dtype=np.float32)
    return numbers, *tokenize([caption(scene, rng).text for scene in scenes])


def tokenize(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """CLIP and T5 token ids, [N, 77] int16 each, padded as in `StableDiffusion3Pipeline.encode_prompt`."""
    vocabulary = words()
    options = dict(padding="max_length", truncation=True, return_tensors="np")
    clip = clip_tokenizer(vocabulary)(texts, max_length=CLIP_LENGTH, **options).input_ids
    t5 = t5_tokenizer(vocabulary)(texts, max_length=CAPTION_LENGTH, **options).input_ids
    return clip.astype(np.int16), t5.astype(np.int16)
