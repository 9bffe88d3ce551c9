"""The training set, made on the spot: scenes as numbers, captions as tokens, pictures rendered where they are used."""

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmdit_lib.tiny.captions import caption, words
from mmdit_lib.tiny.render import describe
from mmdit_lib.tiny.scenes import draw_scene
from mmdit_lib.tiny.tokenizers import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

CAPTION_LENGTH = 77  # T5 tokens kept; no caption is longer
CHUNK = 5000  # scenes per task; part of the seed, so do not tie it to the number of cores

# (height, width): share of the training scenes
BUCKETS = {
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
    """`numbers` [N, 11] are scenes for `render`; `clip` [N, 77] and `t5` [N, 77] are token ids of their captions."""

    numbers: Tensor
    clip: Tensor
    t5: Tensor

    def to(self, device) -> "Data":
        return Data(self.numbers.to(device), self.clip.to(device), self.t5.to(device))

    def buckets(self) -> dict[tuple[int, int], slice]:
        """Which scenes are drawn at which size: the first 44 % at 128 x 128, and so on."""
        edges = [round(x * len(self.numbers)) for x in np.cumsum([0.0, *BUCKETS.values()])]
        return {size: slice(a, b) for size, a, b in zip(BUCKETS, edges[:-1], edges[1:], strict=True)}


def make_data(count: int, seed: int, workers: int) -> Data:
    """`count` training scenes (none held out) with captions."""
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
    """CLIP and T5 ids, padded as `StableDiffusion3Pipeline.encode_prompt` pads them."""
    vocabulary = words()
    options = dict(padding="max_length", truncation=True, return_tensors="np")
    clip = clip_tokenizer(vocabulary)(texts, max_length=CLIP_LENGTH, **options).input_ids
    t5 = t5_tokenizer(vocabulary)(texts, max_length=CAPTION_LENGTH, **options).input_ids
    return clip.astype(np.int16), t5.astype(np.int16)
