"""Scores of how well a pipeline follows its prompts: `evaluate(pipe)`, or `python -m training.evaluation`."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from mmdit_lib import tiny
from mmdit_lib.config import Dtype, dtype_option

from .captions import Prompt, heldout_prompts
from .judge import Found, Sighting, look

GUIDANCE = 4.0
STEPS = 28


@dataclass(frozen=True)
class Scores:
    """Prompt-following scores.

    `colour`, `shape`, `position` and `size` are fractions of the things whose prompt specifies them; `background` and
    `count` are fractions of the pictures.
    """

    prompts: int
    objects: int
    """Things in all prompts."""
    colour: float
    shape: float
    position: float
    size: float
    background: float
    count: float
    """Pictures with as many things as their prompt."""
    seconds: float
    """Time to draw all pictures."""

    def __str__(self) -> str:
        names = ("colour", "shape", "position", "size", "background", "count")
        parts = "  ".join(f"{name} {getattr(self, name):.1%}" for name in names)
        return f"{parts}  ({self.prompts} prompts, {self.objects} objects, {self.seconds:.0f} s)"


def evaluate(
    pipe: StableDiffusion3Pipeline,
    prompts: Sequence[Prompt] | None = None,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    height: int = 128,
    width: int = 128,
    batch: int = 8,
    seed: int = 0,
    **call,
) -> Scores:
    """Draw every prompt and score the pictures.

    Args:
        pipe: `pipe.transformer` may be diffusers' own or an engine.
        prompts: `heldout_prompts(256)` if None.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        height, width: of the pictures, in pixels.
        batch: pictures per call of the pipeline.
        seed: the noise of prompt i is drawn on the CPU with seed + i.
        call: further arguments of `pipe(...)`, e.g. `max_sequence_length=77`.
    """
    prompts = list(heldout_prompts() if prompts is None else prompts)
    start = time.perf_counter()
    pictures = draw(pipe, [p.text for p in prompts], steps, guidance, height, width, batch, seed, **call)
    seconds = time.perf_counter() - start
    return score(prompts, map(look, pictures), seconds)


def draw(
    pipe: StableDiffusion3Pipeline,
    texts: Sequence[str],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    height: int = 128,
    width: int = 128,
    batch: int = 8,
    seed: int = 0,
    **call,
) -> list[Image.Image]:
    """Pictures of `texts`, drawn in batches. Arguments as in `evaluate`; the noise does not depend on `batch`."""
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        noise = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        pictures += pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            generator=noise,
            **call,
        ).images
    return pictures


def score(prompts: Iterable[Prompt], sightings: Iterable[Sighting], seconds: float = 0.0) -> Scores:
    """Score what was found in each picture against its prompt."""
    right = dict.fromkeys(("colour", "shape", "position", "size"), 0)
    asked = dict.fromkeys(right, 0)
    backgrounds, counts = [], []
    for prompt, sighting in zip(prompts, sightings, strict=True):
        says = dict(colour=True, shape=True, position=prompt.says_place, size=prompt.says_sizes)
        for verdict in judge(prompt, sighting):
            for name in right:
                asked[name] += says[name]
                right[name] += says[name] and verdict[name]
        counts.append(len(sighting.things) == len(prompt.scene.things))
        if prompt.says_background:
            backgrounds.append(sighting.background == prompt.scene.background)
    return Scores(
        prompts=len(counts),
        objects=asked["colour"],
        **{name: right[name] / max(1, asked[name]) for name in right},
        background=sum(backgrounds) / max(1, len(backgrounds)),
        count=sum(counts) / max(1, len(counts)),
        seconds=seconds,
    )


def judge(prompt: Prompt, sighting: Sighting) -> list[dict[str, bool]]:
    """What is right about each thing of the prompt, for the most favorable matching with the things found."""
    wanted = prompt.scene.things
    seen = list(sighting.things[: len(wanted) + 2]) + [None] * len(wanted)
    pairings = (_verdicts(prompt, pairing) for pairing in itertools.permutations(seen, len(wanted)))
    return max(pairings, key=lambda verdicts: sum(sum(v.values()) for v in verdicts))


def _verdicts(prompt: Prompt, found: Sequence[Found | None]) -> list[dict[str, bool]]:
    placed = _is_placed(prompt.scene.place, found)
    return [
        dict(
            colour=have is not None and have.colour == want.colour,
            shape=have is not None and have.shape == want.shape,
            position=placed,
            size=have is not None and have.size == want.size,
        )
        for want, have in zip(prompt.scene.things, found, strict=True)
    ]


def _is_placed(place: str, found: Sequence[Found | None]) -> bool:
    if None in found:
        return False
    if len(found) == 1:
        return found[0].cell == place
    dx, dy = found[1].x - found[0].x, found[1].y - found[0].y
    ahead = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[place]
    return ahead[0] > abs(ahead[1])


def load_pipeline(model_path: str | Path | None, dtype: Dtype, device: str | None = None) -> StableDiffusion3Pipeline:
    """A diffusers pipeline on `device`.

    Args:
        model_path: a diffusers SD3 folder; the model that ships with the package if None.
        dtype: of all components.
        device: if None, a GPU if there is one, else the CPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = model_path or tiny.model_path()
    return StableDiffusion3Pipeline.from_pretrained(folder, **dtype_option(getattr(torch, dtype))).to(device)


def main(
    *,
    model_path: str | None = None,
    dtype: Dtype = "float32",
    prompts: int = 256,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    height: int = 128,
    width: int = 128,
    batch: int = 8,
    seed: int = 0,
    max_sequence_length: int = 256,
    device: str | None = None,
) -> None:
    """Score a diffusers pipeline on held-out prompts. Prints the scores as text and as JSON.

    Args:
        model_path: a diffusers SD3 folder; the model that ships with the package if not given.
        dtype: of all components.
        prompts: number of held-out prompts.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        batch: pictures per call of the pipeline.
        seed: the noise of prompt i has the seed SEED + i.
        max_sequence_length: T5 tokens per prompt.
        device: cuda or cpu; if not given, a GPU if there is one.
    """
    scores = evaluate(
        load_pipeline(model_path, dtype, device),
        heldout_prompts(prompts),
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
        batch=batch,
        seed=seed,
        max_sequence_length=max_sequence_length,
    )
    print(scores)
    print(json.dumps(asdict(scores)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m training.evaluation")
