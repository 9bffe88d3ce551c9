"""What is in a picture, from its pixels alone: no network, no prompt.

The background is what lines the border; everything else falls into connected components; a component's colour is the
palette colour of most of its inside, its shape the template that fits its bounding box best.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from mmdit_lib.tiny.render import DISTANCES
from mmdit_lib.tiny.scenes import CELLS, COLOURS, SHAPES, SMALL_BELOW

PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
FOREGROUND = 45.0  # RGB distance from the background colour; half of the least distance between palette colours
LEAST_AREA = 0.008  # of the shorter side squared; the smallest shape there is has 0.018
LEAST_SHARE = 0.2  # of a component's inside: a second colour that large is a second thing
LEAST_FIT = 0.75  # intersection over union with the template; less is no shape that has a name
MOST_STRETCH = 1.3  # of a bounding box against its template's


@dataclass(frozen=True)
class Found:
    """`shape` is None when nothing fits; x, y in fractions of width and height, diameter of the shorter side."""

    shape: str | None
    colour: str
    size: str
    x: float
    y: float
    diameter: float

    @property
    def cell(self) -> str:
        """The nearest key of CELLS."""
        return min(CELLS, key=lambda name: (CELLS[name][0] - self.x) ** 2 + (CELLS[name][1] - self.y) ** 2)


@dataclass(frozen=True)
class Sighting:
    background: str
    things: tuple[Found, ...]  # largest first


def look(picture: Image.Image | np.ndarray) -> Sighting:
    """Judge an RGB picture: PIL, or an array [H, W, 3] with values 0..1."""
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
    return Sighting(names[background], tuple(_describe(mask, names[colour]) for mask, colour in things))


def _neighbours(mask: np.ndarray) -> list[np.ndarray]:
    padded = np.pad(mask, 1)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Connected components (4 neighbours), each as a mask, grown from a seed pixel."""
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
    """A component with its colour, or several if things of different colours touch. Edges, blends of two colours,
    do not vote."""
    inside = _erode(_erode(component))
    inside = inside if inside.any() else component
    votes = np.bincount(nearest[inside], minlength=len(PALETTE))
    if (votes >= LEAST_SHARE * votes.sum()).sum() < 2:
        return [(component, int(votes.argmax()))]
    colours = np.flatnonzero(votes >= LEAST_SHARE * votes.sum())
    return [(part, int(c)) for c in colours for part in _components(component & (nearest == c))]


def _describe(mask: np.ndarray, colour: str) -> Found:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    diameter = max(bottom - top, right - left) / min(mask.shape)
    return Found(
        shape=_shape(mask[top:bottom, left:right]),
        colour=colour,
        size="small" if diameter < SMALL_BELOW else "large",
        x=float((left + right) / 2 / mask.shape[1]),
        y=float((top + bottom) / 2 / mask.shape[0]),
        diameter=float(diameter),
    )


def _templates() -> list[tuple[float, float, float, float]]:
    """Bounding boxes (left, right, top, bottom) of the shapes in the units of their formulas."""
    axis = torch.linspace(-1.2, 1.2, 481)
    boxes = []
    for distance in DISTANCES:
        inside = distance(axis[None, :].expand(481, 481), axis[:, None].expand(481, 481)) < 0
        columns, rows = axis[inside.any(0)], axis[inside.any(1)]
        boxes.append((columns[0].item(), columns[-1].item(), rows[0].item(), rows[-1].item()))
    return boxes


BOXES = _templates()


def _shape(mask: np.ndarray) -> str | None:
    """The template with the largest intersection over union, when stretched to the mask's bounding box."""
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
