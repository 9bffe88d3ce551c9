"""How well a pipeline draws what prompts ask for: `evaluate(pipe)`, also `python -m mmdit_lib.tiny.evaluation`."""

import argparse
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from mmdit_lib.tiny.captions import Prompt, heldout_prompts
from mmdit_lib.tiny.judge import Found, Sighting, look

GUIDANCE = 4.0
STEPS = 28


@dataclass(frozen=True)
class Scores:
    """Fractions of the objects asked for; `background` and `count` (as many things as asked for) of the pictures."""

    prompts: int
    objects: int
    colour: float
    shape: float
    position: float
    size: float
    background: float
    count: float
    seconds: float  # for all pictures

    def __str__(self) -> str:
        names = ("colour", "shape", "position", "size", "background", "count")
        parts = "  ".join(f"{name} {getattr(self, name):.1%}" for name in names)
        return f"{parts}  ({self.prompts} prompts, {self.objects} objects, {self.seconds:.0f} s)"


def evaluate(
    pipe,
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
    """Draw every prompt (noise of prompt i: seed + i, made on the CPU) and judge the pixels.

    Args:
        pipe: a `StableDiffusion3Pipeline`, whatever is in `pipe.transformer`.
        prompts: default `heldout_prompts(256)`.
        call: further arguments of `pipe(...)`, e.g. `max_sequence_length=77`.
    """
    prompts = list(heldout_prompts() if prompts is None else prompts)
    start = time.perf_counter()
    pictures = draw(pipe, [p.text for p in prompts], steps, guidance, height, width, batch, seed, **call)
    seconds = time.perf_counter() - start
    return score(prompts, map(look, pictures), seconds)


def draw(pipe, texts, steps=STEPS, guidance=GUIDANCE, height=128, width=128, batch=8, seed=0, **call) -> list:
    """PIL pictures of `texts`, in batches; a text's noise depends on its own number only."""
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
    """Compare what was asked for with what was seen."""
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
    """For each thing of the prompt, what is right about it, in the pairing with seen things that speaks best for it."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", help="a diffusers SD3 folder; default: the model in this package")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_sequence_length", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args())
    from diffusers import StableDiffusion3Pipeline

    from mmdit_lib.tiny.package import model_path

    folder, dtype = options.pop("model_path") or model_path(), getattr(torch, options.pop("dtype"))
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype).to(options.pop("device"))
    scores = evaluate(pipe, heldout_prompts(options.pop("prompts")), **options)
    print(scores)
    print(json.dumps(asdict(scores)))


if __name__ == "__main__":
    main()
