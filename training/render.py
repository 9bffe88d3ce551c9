"""Render scenes as antialiased pictures from signed distance functions, in batches and on any device.

Formulas: Inigo Quilez, "2D distance functions" (iquilezles.org). A shape of radius 1 is centered at the origin; y
points down.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .scenes import COLOURS, SHAPES, Placed, Scene, lay_out

PALETTE = torch.tensor(list(COLOURS.values())) / 255
RING = SHAPES.index("ring")
NUMBERS = 5  # per thing: shape, color, x, y, diameter; shape -1 means no thing


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.88


def triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, side 2, on its base."""
    flanks = (math.sqrt(3) * x.abs() - y) / 2 - math.sqrt(3) / 4
    return torch.maximum(flanks, y - math.sqrt(3) / 2)


def star(x: Tensor, y: Tensor) -> Tensor:
    """Five-pointed, one point up."""
    radius, waist = 1.08, 0.45
    y = -(y - 0.06)
    x = x.abs()
    for sign in (1, -1):  # fold the five points onto one
        nx, ny = sign * 0.809016994375, -0.587785252292
        inside = 2 * torch.clamp(nx * x + ny * y, min=0)
        x, y = x - inside * nx, y - inside * ny
    x, y = x.abs(), y - radius
    bx, by = waist * 0.587785252292, waist * 0.809016994375 - 1
    along = torch.clamp((x * bx + y * by) / (bx * bx + by * by), min=0, max=radius)
    distance = torch.hypot(x - bx * along, y - by * along)
    return distance * torch.sign(y * bx - x * by)


def cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 1, y - 0.32), torch.maximum(x - 0.32, y - 1))


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.74).abs() - 0.26


DISTANCES = [{f.__name__: f for f in (circle, square, triangle, star, cross, ring)}[name] for name in SHAPES]


def describe(scene: Scene, rng: random.Random) -> list[float]:
    """Lay out a scene and encode it as 1 + 2 x 5 numbers: the background, then `NUMBERS` for each of two things."""
    return encode_placed(scene.background, lay_out(scene, rng))


def encode_placed(background: str, things: Sequence[Placed]) -> list[float]:
    """One or two placed things as 1 + 2 x 5 numbers."""
    numbers = [float(list(COLOURS).index(background))]
    for placed in things:
        thing = placed.thing
        numbers += [SHAPES.index(thing.shape), list(COLOURS).index(thing.colour), placed.x, placed.y, placed.diameter]
    return numbers + [-1.0, 0.0, 0.0, 0.0, 1.0] * (2 - len(things))


def render(numbers: Tensor, height: int, width: int, stroke: float | None = None) -> Tensor:
    """Render scenes on the device of `numbers`.

    Args:
        numbers: [B, 11], rows made by `describe`.
        height, width: in pixels.
        stroke: draw outlines of this width, in units of a shape's radius, instead of filled shapes.

    Returns:
        [B, 3, height, width], float32, values 0..1.
    """
    palette = PALETTE.to(numbers.device)
    picture = palette[numbers[:, 0].long()][:, :, None, None].expand(-1, -1, height, width)
    rows = torch.arange(height, device=numbers.device).view(1, -1, 1) + 0.5
    columns = torch.arange(width, device=numbers.device).view(1, 1, -1) + 0.5
    for first in (1, 1 + NUMBERS):
        shape, colour, x, y, diameter = numbers[:, first : first + NUMBERS, None, None].unbind(1)
        radius = diameter * min(height, width) / 2
        u, v = (columns - x * width) / radius, (rows - y * height) / radius
        outside = torch.full_like(u, 1.0)
        for i, distance in enumerate(DISTANCES):
            outside = torch.where(shape == i, distance(u, v), outside)
        if stroke is not None:  # a ring is an outline already
            outside = torch.where(shape == RING, outside, torch.maximum(outside, -outside - stroke))
        cover = torch.clamp(0.5 - outside * radius, 0, 1)[:, None]
        paint = palette[colour.flatten().long()][:, :, None, None]
        picture = picture + cover * (paint - picture)
    return picture


def picture_of(scene: Scene, height: int = 128, width: int = 128, seed: int = 0) -> Image.Image:
    """Render one scene as a PIL image; `seed` determines its layout."""
    pixels = render(torch.tensor([describe(scene, random.Random(seed))]), height, width)[0]
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
