"""Second stage: the transformer and the three text encoders are trained together on the latents of scenes.

Rectified flow with logit-normal timesteps as in Stable Diffusion 3 (arXiv 2403.03206, sections 2 and 3.1), with the
scheduler's timestep shift.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import CAPTION_LENGTH, Data, tokenize
from .optimise import fit
from .schedule import Budget, Log
from .train_vae import encode

NO_PROMPT = 0.1  # share of samples with an empty prompt, for classifier-free guidance
NO_T5 = 0.05  # share of samples with zeros for T5 embeddings, as in a pipeline without T5
T5_LENGTHS = {40: 0.76, 96: 0.06, 160: 0.06, 256: 0.1, 512: 0.02}  # `max_sequence_length`: share of batches
ADAM_RATE, MUON_RATE = 1e-3, 3e-3


def learners(parts: dict) -> nn.ModuleDict:
    """The modules that this stage trains."""
    return nn.ModuleDict(
        {name: parts[name] for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")}
    )


def initialise(parts: dict) -> None:
    """Initialize every block as the identity and the output as zero (DiT, arXiv 2212.09748, section 3.2).

    CLIP embeddings are enlarged to about the size of T5's, because CLIP states reach the transformer unnormalized.
    """
    nn.init.zeros_(parts["transformer"].proj_out.weight)
    for module in parts["transformer"].modules():
        if type(module).__name__.startswith(("AdaLayerNorm", "SD35AdaLayerNorm")):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
    for name in ("text_encoder", "text_encoder_2"):
        embeddings = parts[name].text_model.embeddings
        nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.2)


def train_flow(
    parts: dict,
    data: Data,
    budget: Budget,
    batch: int,
    seed: int,
    log: Log,
    checkpoint: Callable[[], None],
) -> None:
    """Train `learners(parts)` in place. They hold the averaged weights during `checkpoint()` and at the end.

    Args:
        parts: as `make_parts` returns them, with a trained autoencoder.
        data: on the device to train on.
        budget: when to stop.
        batch: samples per step.
        seed: of batches and noise; a resumed run adds its first step.
        log: gets the losses.
        checkpoint: called about once a minute.
    """
    torch.manual_seed(seed + budget.step)
    model = learners(parts).to(data.numbers.device)
    batches = _batches(data, _all_latents(parts["vae"], data), batch, random.Random(seed + budget.step))
    options = dict(adam_rate=ADAM_RATE, muon_rate=MUON_RATE, warmup=200, checkpoint=checkpoint)
    fit("flow", model, lambda *inputs: flow_loss(parts, *inputs), batches, budget, log, **options)


def _all_latents(vae, data: Data) -> dict[tuple[int, int], Tensor]:
    """The latents of all scenes by size, each scene at its bucket's size, float16."""
    vae = fast_encoder(vae, data.numbers.device)
    return {
        size: torch.cat([encode(vae, part, *size).half() for part in data.numbers[rows].split(1024)])
        for size, rows in data.buckets().items()
    }


def fast_encoder(vae, device: torch.device):
    """A copy of the autoencoder on `device`; on a GPU in bfloat16."""
    vae = copy.deepcopy(vae).to(device)
    return vae.to(dtype=torch.bfloat16, memory_format=torch.channels_last) if device.type == "cuda" else vae


def _batches(data: Data, latents: dict[tuple[int, int], Tensor], batch: int, rng: random.Random):
    """Endless inputs of `flow_loss`. Long texts are used with 128x128 only, to limit the number of CUDA graphs."""
    device = data.numbers.device
    buckets = data.buckets()
    no_prompt = [torch.from_numpy(ids).to(device) for ids in tokenize([""])]
    while True:
        length = rng.choices(list(T5_LENGTHS), list(T5_LENGTHS.values()))[0]
        size = rng.choices(list(buckets), [rows.stop - rows.start for rows in buckets.values()])[0]
        size = size if length == min(T5_LENGTHS) else (128, 128)
        picked = torch.randint(len(latents[size]), (batch,), device=device)
        dropped = torch.rand(batch, 1, device=device) < NO_PROMPT
        rows = picked + buckets[size].start
        clip = torch.where(dropped, no_prompt[0], data.clip[rows]).int()
        t5 = torch.where(dropped, no_prompt[1], data.t5[rows]).int()
        t5 = F.pad(t5, (0, length - CAPTION_LENGTH))
        keep_t5 = (torch.rand(batch, 1, 1, device=device) >= NO_T5).float()
        clean = latents[size][picked].float()
        yield clean, torch.randn_like(clean), torch.randn(batch, device=device), clip, t5, keep_t5


def embed(parts: dict, clip: Tensor, t5: Tensor, keep_t5: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt embeddings as in `StableDiffusion3Pipeline.encode_prompt`, with gradients.

    Returns:
        States [B, 77 + length, joint_attention_dim] and pooled projections [B, pooled_projection_dim].
    """
    outputs = [parts[name](clip, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    late = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    states = parts["text_encoder_3"](t5)[0]
    states = states * keep_t5.to(states.dtype)
    late = F.pad(late, (0, states.shape[-1] - late.shape[-1])).to(states.dtype)
    return torch.cat([late, states], dim=1), torch.cat([output.text_embeds for output in outputs], dim=-1)


def flow_loss(
    parts: dict,
    clean: Tensor,
    noise: Tensor,
    logit: Tensor,
    clip: Tensor,
    t5: Tensor,
    keep_t5: Tensor,
    control: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity.

    Args:
        parts: the pipeline's components.
        clean, noise: [B, 16, h, w]: latents and standard normal noise.
        logit: [B], standard normal; its sigmoid is the noise level before the shift.
        clip, t5: token ids, [B, 77] and [B, length].
        keep_t5: [B, 1, 1]: 0 replaces the T5 embeddings of a sample with zeros, 1 keeps them.
        control: [B, 16, h, w]: latents of the images that `parts["controlnet"]` sees, as
            `StableDiffusion3ControlNetPipeline` makes them.
    """
    states, pooled = embed(parts, clip, t5, keep_t5)
    shift = parts["scheduler"].config.shift
    sigma = torch.sigmoid(logit)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    mixed = torch.lerp(clean, noise, sigma[:, None, None, None]).to(states.dtype)
    residuals = None
    if control is not None:  # without text and pooled projections, as in that pipeline
        timestep = dict(timestep=1000 * sigma, pooled_projections=torch.zeros_like(pooled))
        residuals = parts["controlnet"](mixed, control.to(mixed.dtype), **timestep, return_dict=False)[0]
    velocity = parts["transformer"](mixed, states, pooled, 1000 * sigma, residuals, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - clean)
