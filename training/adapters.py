"""Shared by the training of the LoRA and the ControlNet."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import gallery
from .data import CAPTION_LENGTH, Data, tokenize
from .train_flow import NO_PROMPT

SIDE = 128  # of the pictures, in pixels
STROKE = 0.18  # of outlines, in units of a shape's radius; the autoencoder blurs thinner ones
LENGTHS = (40, 77)  # T5 tokens per caption; one of them per batch
SHOWN = 8  # prompts in a sheet of samples


def batches(
    data: Data, clean: Tensor, batch: int, seed: int, control: Tensor | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Endless inputs of `flow_loss`, with an empty prompt in some samples. Also seeds torch.

    Args:
        data: scenes with captions.
        clean, control: [N, 16, h, w], half precision: latents of their pictures and, if any, of their control images.
        batch: samples per batch.
        seed: of the choice of scenes and of the noise.
    """
    torch.manual_seed(seed)
    rng, device = random.Random(seed), clean.device
    no_prompt = [torch.from_numpy(ids).to(device) for ids in tokenize([""])]
    keep_t5 = torch.ones(batch, 1, 1, device=device)
    while True:
        rows = torch.randint(len(clean), (batch,), device=device)
        dropped = torch.rand(batch, 1, device=device) < NO_PROMPT
        pairs = zip(no_prompt, (data.clip, data.t5), strict=True)
        clip, t5 = (torch.where(dropped, empty, ids[rows]).int() for empty, ids in pairs)
        t5 = F.pad(t5, (0, rng.choice(LENGTHS) - CAPTION_LENGTH))
        pictures, logit = clean[rows].float(), torch.randn(batch, device=device)
        inputs = pictures, torch.randn_like(pictures), logit, clip, t5, keep_t5
        yield inputs if control is None else (*inputs, control[rows].float())


def side_by_side(texts: Sequence[str], *columns: Sequence[Image.Image]) -> Image.Image:
    """The first pictures of all columns side by side, above their prompts."""
    strips = []
    for pictures in list(zip(*columns, strict=True))[:SHOWN]:
        strips.append(Image.new("RGB", (SIDE * len(pictures), SIDE)))
        for i, picture in enumerate(pictures):
            strips[-1].paste(picture, (i * SIDE, 0))
    return gallery.lay_out(strips, texts[: len(strips)], columns=2, width=gallery.SIDE * len(columns))
