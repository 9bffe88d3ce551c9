"""Captions for scenes, in varied wording, and the vocabulary they use."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

from .scenes import COLOURS, Scene, Thing, draw_scene

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "disk"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus"),
    "ring": ("ring", "ring", "hoop"),
}
COLOUR_WORDS = {name: (name,) for name in COLOURS} | {"purple": ("purple", "purple", "violet")}
CELL_WORDS = {
    "centre": ("in the centre", "in the center", "in the middle", "at the centre"),
    "left": ("on the left", "at the left", "on the left side", "to the left"),
    "right": ("on the right", "at the right", "on the right side", "to the right"),
    "top": ("at the top", "on top", "near the top"),
    "bottom": ("at the bottom", "near the bottom", "down at the bottom"),
} | {
    f"{row} {side}": (
        f"in the {row} {side} corner",
        f"at the {row} {side}",
        f"in the {other} {side} corner",
        f"in the {row} {side}",
    )
    for row, other in (("top", "upper"), ("bottom", "lower"))
    for side in ("left", "right")
}
RELATION_WORDS = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
SIDES = {
    "left of": ("on its left", "to its left"),
    "right of": ("on its right", "to its right"),
    "above": ("above it",),
    "below": ("below it", "under it"),
}
BACKGROUNDS = (
    "on a {} background",
    "on a {} background",
    "against a {} background",
    "on {}",
    "with a {} background",
    "over a {} background",
)
OPENINGS = ("",) * 12 + ("a picture of ", "a drawing of ", "an image of ", "there is ", "draw ", "please draw ")


@dataclass(frozen=True)
class Prompt:
    """A caption and the scene it describes."""

    text: str
    scene: Scene
    """Always complete, even if `text` omits something."""
    says_sizes: bool = True
    """Whether `text` gives the sizes."""
    says_place: bool = True
    """Whether `text` gives the position; always true for two things."""
    says_background: bool = True
    """Whether `text` gives the background color."""


def caption(scene: Scene, rng: random.Random, complete: bool = False) -> Prompt:
    """A random caption for `scene`. Unless `complete`, it omits the sizes, the place and the background with
    probability 0.16 each."""
    says_sizes, says_place, says_background = (complete or rng.random() > 0.16 for _ in range(3))
    says_place = says_place or len(scene.things) == 2
    things = [_phrase(thing, says_sizes, rng) for thing in scene.things]
    colour = rng.choice(COLOUR_WORDS[scene.background])
    background = rng.choice(BACKGROUNDS).format(colour) if says_background else ""
    if len(things) == 2:
        body = _relation(things, scene.place, rng)
        clauses = [body, background]
    else:
        place = rng.choice(CELL_WORDS[scene.place]) if says_place else ""
        clauses = [things[0], *rng.sample([place, background], 2)]
    text = rng.choice(OPENINGS) + " ".join(filter(None, clauses))
    if background and rng.random() < 0.25:  # background first
        text = " ".join(filter(None, [f"{background},", *(c for c in clauses if c is not background)]))
    elif background and rng.random() < 0.12:
        rest = " ".join(filter(None, (c for c in clauses if c is not background)))
        text = f"a {colour} background with {rest}"
    return Prompt(_articles(_flourish(text, rng)), scene, says_sizes, says_place, says_background)


def _phrase(thing: Thing, says_size: bool, rng: random.Random) -> str:
    """A noun phrase for `thing`: "a small red circle", or the same words in another order."""
    shape, colour = rng.choice(SHAPE_WORDS[thing.shape]), rng.choice(COLOUR_WORDS[thing.colour])
    size = rng.choice(SIZE_WORDS[thing.size]) if says_size else ""
    orders = [f"a {size} {colour} {shape}"] * 10 + [
        f"a {colour} {shape}, {size}," if size else f"a {shape}, {colour},",
        f"one {size} {colour} {shape}",
        f"a {size} {shape} in {colour}",
        f"a {size} {shape} that is {colour}",
        f"the {size} {colour} {shape}",
        f"{size} {colour} {shape}",
    ]
    return " ".join(rng.choice(orders).split())


def _relation(things: list[str], place: str, rng: random.Random) -> str:
    first, second = things
    form = rng.random()
    if form < 0.7:
        return f"{first} {rng.choice(RELATION_WORDS[place])} {second}"
    if form < 0.85:
        return f"{rng.choice(RELATION_WORDS[place])} {second} there is {first}"
    return f"{second} with {first} {rng.choice(SIDES[place])}"


def _flourish(text: str, rng: random.Random) -> str:
    """`text` with, at random, a made-up word, a capital letter or a full stop."""
    if rng.random() < 0.03:
        words = text.split(" ")
        nonsense = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 8)))
        words.insert(rng.randint(0, len(words)), nonsense)
        text = " ".join(words)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.15 else "")


def _articles(text: str) -> str:
    text = re.sub(r"\b([aA]) (?=orange\b)", r"\1n ", text)
    return re.sub(r",+(?=[.,]|$)", "", text).replace(", ,", ",")


def words() -> list[str]:
    """Every word that a caption can contain, in lower case, except the made-up ones of `_flourish`."""
    rng = random.Random(0)
    texts = [caption(draw_scene(rng, held_out), rng).text for _ in range(2000) for held_out in (False, True)]
    tables = [SIZE_WORDS, SHAPE_WORDS, COLOUR_WORDS, CELL_WORDS, RELATION_WORDS, SIDES]
    texts += [" ".join(phrase for phrases in table.values() for phrase in phrases) for table in tables]
    counts = Counter(word for text in texts for word in re.findall("[a-z]+", text.lower()))
    tabled = set(re.findall("[a-z]+", " ".join(texts[-len(tables) :])))
    return sorted(word for word, count in counts.items() if count > 8 or word in tabled)


def heldout_prompts(count: int = 256, seed: int = 1000) -> list[Prompt]:
    """`count` complete prompts, each with at least one (size, color, shape) that is absent from training."""
    rng = random.Random(seed)
    return [caption(draw_scene(rng, held_out=True), rng, complete=True) for _ in range(count)]
