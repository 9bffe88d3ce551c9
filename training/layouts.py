"""Scenes whose things can be anywhere. An image of their outlines shows the ControlNet where; captions do not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .adapters import SIDE, STROKE
from .captions import Prompt, caption
from .judge import BOXES, Found, look
from .render import encode_placed, render
from .scenes import CELLS, COLOURS, RELATIONS, SHAPES, SIZES, Placed, Scene, draw_scene

MARGIN = 0.24  # from a center to the picture's edges: a large thing fits
NEAR = 0.05  # a thing is in the right place if its center is this close, as a fraction of the side ...
LIKE = 0.15  # ... and its diameter differs by at most this share


@dataclass(frozen=True)
class Layout:
    """A caption, and the places of its things."""

    prompt: Prompt
    things: tuple[Placed, ...]


@dataclass(frozen=True)
class Placing:
    """Shares of the things that are in the right place, and that also have the right shape and color."""

    things: int
    placed: float
    placed_shape: float
    placed_shape_colour: float

    def __str__(self) -> str:
        names = ("placed", "placed_shape", "placed_shape_colour")
        return "  ".join(f"{name.replace('_', ' + ')} {getattr(self, name):.1%}" for name in names)


def draw_layout(rng: random.Random, held_out: bool = False) -> Layout:
    """Random places for the things of a random scene. The caption of a single thing does not say where it is."""
    scene = draw_scene(rng, held_out)
    while True:
        things = tuple(
            Placed(thing, *(rng.uniform(MARGIN, 1 - MARGIN) for _ in range(2)), rng.uniform(*SIZES[thing.size]))
            for thing in scene.things
        )
        if len(things) == 1:
            scene = Scene(scene.things, min(CELLS), scene.background)
            break
        dx, dy = things[1].x - things[0].x, things[1].y - things[0].y
        apart = (things[0].diameter + things[1].diameter) / 2 + 0.02
        if max(abs(dx), abs(dy)) > apart and abs(abs(dx) - abs(dy)) > 0.05:
            right, below = dx > 0, dy > 0
            place = RELATIONS[1 - right] if abs(dx) > abs(dy) else RELATIONS[3 - below]
            scene = Scene(scene.things, place, scene.background)
            break
    prompt = caption(scene, rng)
    while len(things) == 1 and prompt.says_place:
        prompt = caption(scene, rng)
    return Layout(prompt, things)


def heldout_layouts(count: int, seed: int = 2000) -> list[Layout]:
    """Layouts of things that are absent from training."""
    rng = random.Random(seed)
    return [draw_layout(rng, held_out=True) for _ in range(count)]


def outlines(numbers: Tensor) -> Tensor:
    """The same scenes in white on black; `render` draws outlines if it is given a stroke."""
    numbers = numbers.clone()
    numbers[:, 0] = list(COLOURS).index("black")
    numbers[:, [2, 7]] = float(list(COLOURS).index("white"))
    return numbers


def control_picture(layout: Layout) -> Image.Image:
    """What the ControlNet sees: white outlines on black."""
    numbers = torch.tensor([encode_placed(layout.prompt.scene.background, layout.things)])
    pixels = render(outlines(numbers), SIDE, SIDE, STROKE)[0]
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def judge_layouts(layouts: Sequence[Layout], pictures: Sequence[Image.Image]) -> Placing:
    """Judge pictures from their pixels alone."""
    verdicts = [verdict for pair in zip(layouts, pictures, strict=True) for verdict in _verdicts(*pair)]
    shares = (sum(verdict[i] for verdict in verdicts) / len(verdicts) for i in range(3))
    return Placing(len(verdicts), *shares)


def _verdicts(layout: Layout, picture: Image.Image) -> list[tuple[bool, bool, bool]]:
    """For each thing, for the most favorable matching with the things found: placed, and shape, and color."""
    wanted = layout.things
    seen = list(look(picture).things[: len(wanted) + 2]) + [None] * len(wanted)
    pairings = itertools.permutations(seen, len(wanted))
    judged = ([_verdict(*pair) for pair in zip(wanted, found, strict=True)] for found in pairings)
    return max(judged, key=lambda verdicts: sum(map(sum, verdicts)))


def _verdict(wanted: Placed, found: Found | None) -> tuple[bool, bool, bool]:
    if found is None:
        return False, False, False
    # A bounding box is not centered at its shape's center: a triangle reaches further up than down.
    left, right, top, bottom = BOXES[SHAPES.index(wanted.thing.shape)]
    radius = wanted.diameter / 2
    x, y = wanted.x + radius * (left + right) / 2, wanted.y + radius * (top + bottom) / 2
    diameter = radius * max(right - left, bottom - top)
    placed = max(abs(found.x - x), abs(found.y - y)) <= NEAR and abs(found.diameter / diameter - 1) <= LIKE
    alike = placed and found.shape == wanted.thing.shape
    return placed, alike, alike and found.colour == wanted.thing.colour
