"""Scenes of one or two colored shapes on a colored background: which exist, which are held out, their layout.

Centers are fractions of the picture's width and height, diameters are fractions of its shorter side.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

COLOURS = {
    "red": (205, 30, 45),
    "orange": (240, 125, 20),
    "yellow": (253, 222, 70),
    "green": (46, 160, 67),
    "blue": (38, 84, 210),
    "purple": (140, 60, 170),
    "white": (248, 248, 248),
    "black": (28, 28, 32),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (0.25, 0.28), "large": (0.38, 0.42)}
SMALL_BELOW = 0.33
CELLS = {
    "centre": (0.5, 0.5),
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}
RELATIONS = ("left of", "right of", "above", "below")  # of the first thing to the second
JITTER = 0.015  # largest random shift of a center along each axis

# (size, color, shape) that no training scene contains: an eighth of all combinations. Training still shows every size,
# color and shape in other combinations.
HELD_OUT = frozenset(
    (list(SIZES)[(i + i // 8) % 2], list(COLOURS)[i % 8], SHAPES[(5 * i + 1 + i // 8) % 6]) for i in range(12)
)


@dataclass(frozen=True)
class Thing:
    """A shape of a scene."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One or two things on a background."""

    things: tuple[Thing, ...]
    place: str
    """For one thing a key of `CELLS`; for two one of `RELATIONS`, of the first thing to the second."""
    background: str


@dataclass(frozen=True)
class Placed:
    """A thing with its exact center and diameter, for the renderer."""

    thing: Thing
    x: float
    y: float
    diameter: float


def is_held_out(scene: Scene) -> bool:
    """Whether any thing of the scene is in `HELD_OUT`."""
    return any((thing.size, thing.colour, thing.shape) in HELD_OUT for thing in scene.things)


def draw_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene without held-out things, or, if `held_out`, with at least one."""
    while True:
        background, *colours = rng.sample(list(COLOURS), 3)
        count = rng.choice((1, 2))
        things = tuple(Thing(rng.choice(SHAPES), colours[i], rng.choice(list(SIZES))) for i in range(count))
        scene = Scene(things, rng.choice(list(CELLS) if count == 1 else RELATIONS), background)
        if is_held_out(scene) == held_out:
            return scene


def lay_out(scene: Scene, rng: random.Random) -> list[Placed]:
    """Draw exact centers and diameters within the range that the scene's words allow."""
    if len(scene.things) == 1:
        centres = [CELLS[scene.place]]
    else:
        across = 0.5 + rng.uniform(-0.06, 0.06)
        near, far = (0.26, across), (0.74, 1.0 - across)
        if scene.place in ("right of", "below"):
            near, far = far, near
        centres = [near, far] if scene.place.endswith("of") else [near[::-1], far[::-1]]
    return [
        Placed(
            thing,
            x + rng.uniform(-JITTER, JITTER),
            y + rng.uniform(-JITTER, JITTER),
            rng.uniform(*SIZES[thing.size]),
        )
        for thing, (x, y) in zip(scene.things, centres, strict=True)
    ]
