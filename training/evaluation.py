"""Scores of how well a pipeline follows its prompts: `evaluate(pipe)`, or `python -m training.evaluation`."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
import tyro
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from mmdit_lib import tiny
from mmdit_lib.config import Dtype, dtype_option

from .captions import Prompt, heldout_prompts
from .judge import Found, Sighting, look

ASPECTS = ("colour", "shape", "position", "size", "background", "count")
"""What is scored."""


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline on a device."""

    model_path: str | None = None
    """A diffusers SD3 folder; the model that ships with the package if not given."""
    dtype: Dtype = "float32"
    """Of all components."""
    device: str | None = None
    """cuda or cpu; if not given, a GPU if there is one."""

    def load(self) -> StableDiffusion3Pipeline:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        options = dtype_option(getattr(torch, self.dtype))
        return StableDiffusion3Pipeline.from_pretrained(self.model_path or tiny.model_path(), **options).to(device)


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn."""

    steps: int = 28
    """Denoising steps."""
    guidance: float = 4.0
    """Scale of classifier-free guidance."""
    height: int = 128
    """Of the pictures, in pixels."""
    width: int = 128
    """Of the pictures, in pixels."""
    batch: int = 8
    """Pictures per call of the pipeline; the noise does not depend on it."""
    seed: int = 0
    """The noise of picture i is drawn on the CPU with seed + i."""
    max_sequence_length: int = 256
    """T5 tokens per prompt."""


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
        parts = "  ".join(f"{name} {getattr(self, name):.1%}" for name in ASPECTS)
        return f"{parts}  ({self.prompts} prompts, {self.objects} objects, {self.seconds:.0f} s)"


def evaluate(pipe: StableDiffusion3Pipeline, prompts: Sequence[Prompt] | None = None, **options) -> Scores:
    """Draw every prompt and score the pictures.

    Args:
        pipe: `pipe.transformer` may be diffusers' own or an engine.
        prompts: `heldout_prompts()` if None.
        options: fields of `Drawing`.
    """
    prompts = heldout_prompts() if prompts is None else prompts
    start = time.perf_counter()
    pictures = draw(pipe, [p.text for p in prompts], **options)
    seconds = time.perf_counter() - start
    return score(prompts, map(look, pictures), seconds)


def draw(
    pipe: StableDiffusion3Pipeline, texts: Sequence[str], control: Sequence[Image.Image] | None = None, **options
) -> list[Image.Image]:
    """Pictures of `texts`, drawn in batches.

    Args:
        control: for a pipeline with a ControlNet, what it sees for each text.
        options: fields of `Drawing`.
    """
    how = Drawing(**options)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, len(texts), how.batch):
        part = list(texts[first : first + how.batch])
        pictures += pipe(
            part,
            num_inference_steps=how.steps,
            guidance_scale=how.guidance,
            height=how.height,
            width=how.width,
            max_sequence_length=how.max_sequence_length,
            generator=[torch.Generator().manual_seed(how.seed + first + i) for i in range(len(part))],
            **({"control_image": list(control[first : first + how.batch])} if control else {}),
        ).images
    return pictures


def score(prompts: Iterable[Prompt], sightings: Iterable[Sighting], seconds: float = 0.0) -> Scores:
    """Score what was found in each picture against its prompt."""
    asked, right = Counter(), Counter()
    for prompt, sighting in zip(prompts, sightings, strict=True):
        scene = prompt.scene
        verdicts = [
            ("count", True, len(sighting.things) == len(scene.things)),
            ("background", prompt.says_background, sighting.background == scene.background),
        ]
        says = dict(colour=True, shape=True, position=prompt.says_place, size=prompt.says_sizes)
        verdicts += [(name, says[name], fine) for thing in judge(prompt, sighting) for name, fine in thing.items()]
        for name, said, fine in verdicts:
            asked[name] += said
            right[name] += said and fine
    shares = {name: right[name] / max(1, asked[name]) for name in ASPECTS}
    return Scores(prompts=asked["count"], objects=asked["colour"], **shares, seconds=seconds)


def judge(prompt: Prompt, sighting: Sighting) -> list[dict[str, bool]]:
    """What is right about each thing of the prompt, for the most favorable matching with the things found."""
    wanted = prompt.scene.things
    seen = list(sighting.things[: len(wanted) + 2]) + [None] * len(wanted)
    pairings = (_verdicts(prompt, pairing) for pairing in itertools.permutations(seen, len(wanted)))
    return max(pairings, key=lambda verdicts: sum(sum(v.values()) for v in verdicts))


def _verdicts(prompt: Prompt, found: Sequence[Found | None]) -> list[dict[str, bool]]:
    placed = _is_placed(prompt.scene.place, found)
    same = (
        {name: have is not None and getattr(have, name) == getattr(want, name) for name in ("colour", "shape", "size")}
        for want, have in zip(prompt.scene.things, found, strict=True)
    )
    return [{**verdict, "position": placed} for verdict in same]


def _is_placed(place: str, found: Sequence[Found | None]) -> bool:
    if None in found:
        return False
    if len(found) == 1:
        return found[0].cell == place
    dx, dy = found[1].x - found[0].x, found[1].y - found[0].y
    ahead = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[place]
    return ahead[0] > abs(ahead[1])


def main(pipeline: Pipeline, how: Drawing, *, prompts: int = 256) -> None:
    """Score a diffusers pipeline on held-out prompts. Prints the scores as text and as JSON.

    Args:
        prompts: number of held-out prompts.
    """
    scores = evaluate(pipeline.load(), heldout_prompts(prompts), **asdict(how))
    print(scores)
    print(json.dumps(asdict(scores)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m training.evaluation", config=(tyro.conf.OmitArgPrefixes,))
