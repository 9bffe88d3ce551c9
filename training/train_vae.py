"""First stage, `train_vae`: the autoencoder learns to encode pictures as 16-channel latents at an eighth of the size.

Last stage, `train_decoder`: only the decoder is trained, with more weight on the things than on the background. The
encoder is frozen, because the transformer was trained on its latents.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .data import Data
from .optimise import fit
from .render import render
from .schedule import Budget, Log

KL_WEIGHT = 1e-4  # relative to the mean absolute error of pixels with values -1..1
LATENT_NOISE = 0.05  # of the latents' standard deviation: makes the decoder robust to small errors
PEAK_RATE, DECODER_RATE = 1.5e-3, 5e-4
SIZES = ((128, 128), (96, 192), (192, 96))  # (height, width) in pixels


def train_vae(vae: AutoencoderKL, data: Data, budget: Budget, batch: int, seed: int, log: Log) -> None:
    """Train in place, then set `scaling_factor` and `shift_factor` so that latents have mean 0 and deviation 1."""
    vae.to(data.numbers.device)
    batches = ((2 * render(numbers, *size) - 1,) for numbers, size in _scenes(data, batch, seed + budget.step))
    options = dict(adam_rate=PEAK_RATE, warmup=100, memory_format=torch.channels_last)
    fit("vae", vae, lambda pictures: _loss(vae, pictures), batches, budget, log, **options)
    latents = torch.cat([encode(vae, part, 128, 128).flatten() for part in data.numbers[:512].split(64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def _scenes(data: Data, batch: int, seed: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Endless random scenes [batch, 11], and the size to draw them at. Seeds torch, too."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    while True:
        picked = torch.randint(len(data.numbers), (batch,), device=data.numbers.device)
        yield data.numbers[picked], rng.choice(SIZES)


def _loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    posterior = vae.encode(pictures.to(vae.dtype)).latent_dist
    latents = posterior.sample()
    latents = latents + LATENT_NOISE * latents.detach().std() * torch.randn_like(latents)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
    return F.l1_loss(vae.decode(latents).sample.float(), pictures) + KL_WEIGHT * kl


def train_decoder(vae: AutoencoderKL, data: Data, budget: Budget, batch: int, seed: int, log: Log) -> None:
    """Train `vae.decoder` in place."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for numbers, size in _scenes(data, batch, seed + budget.step):
            latents = encode(vae, numbers, *size)
            latents = latents + LATENT_NOISE * torch.randn_like(latents)
            latents = latents / vae.config.scaling_factor + vae.config.shift_factor
            yield latents, 2 * render(numbers, *size) - 1

    decoder = vae.to(data.numbers.device).decoder
    options = dict(adam_rate=DECODER_RATE, warmup=50, memory_format=torch.channels_last)
    fit("decoder", decoder, lambda *pair: _things_loss(decoder, *pair), batches(), budget, log, **options)


def _things_loss(decoder: nn.Module, latents: Tensor, pictures: Tensor) -> Tensor:
    """Mean absolute error over all pixels, plus the same over the pixels in and near each picture's things."""
    error = (decoder(latents.to(decoder.conv_in.weight.dtype)).float() - pictures).abs().mean(1, keepdim=True)
    things = ((pictures - pictures[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.02).float()
    things = F.max_pool2d(things, 5, stride=1, padding=2)
    return error.mean() + ((error * things).sum((1, 2, 3)) / things.sum((1, 2, 3))).mean()


@torch.no_grad()
def encode(vae: AutoencoderKL, numbers: Tensor, height: int, width: int, stroke: float | None = None) -> Tensor:
    """Latents [B, 16, height / 8, width / 8] of rendered scenes, float32, shifted and scaled for the transformer."""
    pictures = 2 * render(numbers, height, width, stroke) - 1
    latents = vae.encode(pictures.to(vae.dtype)).latent_dist.mode().float()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor
