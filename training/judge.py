"""Recognize the scene in a picture from its pixels alone, without a neural network and without the prompt.

The background is the most frequent palette color along the border. Pixels of other colors form connected components:
each takes the most frequent palette color of its interior, and the shape whose template, stretched to its bounding
box, overlaps it best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .render import DISTANCES
from .scenes import CELLS, COLOURS, SHAPES, SMALL_BELOW

PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
FOREGROUND = 45.0  # RGB distance from the background; half the smallest distance between two palette colors
LEAST_AREA = 0.008  # of the shorter side squared; the smallest shape covers 0.024
LEAST_SHARE = 0.2  # of a component's interior: a second color with this share is a second thing
LEAST_FIT = 0.75  # intersection over union with the template; below it, the shape is None
MOST_STRETCH = 1.3  # ratio of a bounding box's aspect ratio to the template's


@dataclass(frozen=True)
class Found:
    """A thing that was found in a picture."""

    shape: str | None
    """One of `SHAPES`; None if no template fits."""
    colour: str
    size: str
    x: float
    """Center, as a fraction of the picture's width."""
    y: float
    """Center, as a fraction of the picture's height."""
    diameter: float
    """Longer side of the bounding box, as a fraction of the picture's shorter side."""
    hollow: float = 0.0
    """Share of the area within its outer edge that it does not cover: 0 if filled, and about a quarter for a ring."""

    @property
    def cell(self) -> str:
        """The key of `CELLS` nearest to the center."""
        return min(CELLS, key=lambda name: (CELLS[name][0] - self.x) ** 2 + (CELLS[name][1] - self.y) ** 2)


@dataclass(frozen=True)
class Sighting:
    """Everything that was found in a picture."""

    background: str
    things: tuple[Found, ...]
    """Largest first."""


def look(picture: Image.Image | np.ndarray, fill: bool = False) -> Sighting:
    """Find the background and the things in an RGB picture.

    Args:
        picture: a PIL image, or an array [H, W, 3] with values 0..1.
        fill: recognize shapes by their outer edge, for things that are drawn as outlines.
    """
    pixels = np.asarray(picture, dtype=np.float32) * (1 if isinstance(picture, Image.Image) else 255)
    nearest = np.linalg.norm(pixels[:, :, None] - PALETTE, axis=-1).argmin(-1)
    edges = nearest[:2], nearest[-2:], nearest[:, :2], nearest[:, -2:]
    border = np.concatenate([edge.ravel() for edge in edges])
    background = np.bincount(border).argmax()
    foreground = np.linalg.norm(pixels - PALETTE[background], axis=-1) > FOREGROUND
    least = LEAST_AREA * min(foreground.shape) ** 2
    things = [
        (mask, colour)
        for component in _components(foreground)
        if component.sum() >= least
        for mask, colour in _split(component, nearest)
        if mask.sum() >= least
    ]
    things.sort(key=lambda thing: -thing[0].sum())
    names = list(COLOURS)
    return Sighting(names[background], tuple(_describe(mask, names[colour], fill) for mask, colour in things))


def _neighbours(mask: np.ndarray) -> list[np.ndarray]:
    padded = np.pad(mask, 1)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Connected components (4-connectivity), one mask each."""
    left, found = mask.copy(), []
    while left.any():
        grown = np.zeros_like(mask)
        grown.flat[left.argmax()] = True
        size = 0
        while size != (size := grown.sum()):
            grown = (grown | np.logical_or.reduce(_neighbours(grown))) & left
        left &= ~grown
        found.append(grown)
    return found


def _erode(mask: np.ndarray) -> np.ndarray:
    return mask & np.logical_and.reduce(_neighbours(mask))


def _split(component: np.ndarray, nearest: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """(mask, color) of a component, or of its parts if things of different colors touch.

    Only the interior votes: antialiased edges are blends of two colors.
    """
    inside = _erode(_erode(component))
    inside = inside if inside.any() else component
    votes = np.bincount(nearest[inside], minlength=len(PALETTE))
    if (votes >= LEAST_SHARE * votes.sum()).sum() < 2:
        return [(component, int(votes.argmax()))]
    colours = np.flatnonzero(votes >= LEAST_SHARE * votes.sum())
    return [(part, int(c)) for c in colours for part in _components(component & (nearest == c))]


def _describe(mask: np.ndarray, colour: str, fill: bool) -> Found:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    diameter = max(bottom - top, right - left) / min(mask.shape)
    inside = mask[top:bottom, left:right]
    filled = _fill(inside)
    return Found(
        shape=_shape(filled if fill else inside),
        colour=colour,
        size="small" if diameter < SMALL_BELOW else "large",
        x=float((left + right) / 2 / mask.shape[1]),
        y=float((top + bottom) / 2 / mask.shape[0]),
        diameter=float(diameter),
        hollow=float(1 - inside.sum() / filled.sum()),
    )


def _fill(mask: np.ndarray) -> np.ndarray:
    """The mask without its holes: all but the part of its complement that reaches the edge."""
    around = _components(~np.pad(mask, 1))[0]  # the first component contains the first pixel, which is padding
    return ~around[1:-1, 1:-1]


def _templates() -> list[tuple[float, float, float, float]]:
    """Bounding boxes (left, right, top, bottom) of the shapes, in the units of `DISTANCES`."""
    axis = torch.linspace(-1.2, 1.2, 481)
    boxes = []
    for distance in DISTANCES:
        inside = distance(axis[None, :].expand(481, 481), axis[:, None].expand(481, 481)) < 0
        columns, rows = axis[inside.any(0)], axis[inside.any(1)]
        boxes.append((columns[0].item(), columns[-1].item(), rows[0].item(), rows[-1].item()))
    return boxes


BOXES = _templates()


def _shape(mask: np.ndarray) -> str | None:
    """The shape whose template, stretched to the mask's bounding box, has the largest intersection over union."""
    height, width = mask.shape
    fits = []
    for distance, (left, right, top, bottom) in zip(DISTANCES, BOXES, strict=True):
        x = left + (right - left) * (torch.arange(width) + 0.5) / width
        y = top + (bottom - top) * (torch.arange(height) + 0.5) / height
        template = (distance(x[None, :].expand(height, -1), y[:, None].expand(-1, width)) < 0).numpy()
        stretch = (width / height) / ((right - left) / (bottom - top))
        fit = (mask & template).sum() / (mask | template).sum()
        fits.append(fit if 1 / MOST_STRETCH < stretch < MOST_STRETCH else 0.0)
    best = int(np.argmax(fits))
    return SHAPES[best] if fits[best] >= LEAST_FIT else None
