"""A grid of pictures with their prompts: `python -m training.gallery --output gallery.png`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import tyro
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .evaluation import Drawing, Pipeline, draw

EXAMPLES = (
    "a small red circle to the left of a large blue triangle on a yellow background",
    "a large yellow star on a purple background",
    "a small white ring above a large orange square on a black background",
    "a huge green cross in the centre on a white background",
    "a tiny purple star in the top left corner on an orange background",
    "a big black ring to the right of a tiny green circle on a white background",
    "on a blue background, a large orange triangle below a small white star",
    "a little yellow square at the bottom on a green background",
    "a large white circle on the left on a red background",
    "a green background with a big red star above a big yellow ring",
    "a small blue cross in the lower right corner on a white background",
    "a huge purple square with a tiny yellow triangle on its right on a black background",
    "an orange ring in the middle on a blue background",
    "a large red cross to the left of a large white cross on a blue background",
    "Against a black background, a small orange circle below a large green triangle.",
    "a tiny black triangle in the upper right corner on a yellow background",
)


COLUMNS, SIDE, MARGIN, TEXT_HEIGHT = 4, 224, 16, 58  # the grid; sizes in pixels


def gallery_of(pipe: StableDiffusion3Pipeline, **options) -> Image.Image:
    """Draw `EXAMPLES` with `pipe`, and lay the pictures out in a grid. `options` are fields of `evaluation.Drawing`."""
    return lay_out(draw(pipe, EXAMPLES, **options), EXAMPLES)


def lay_out(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = COLUMNS, width: int = SIDE
) -> Image.Image:
    """A grid of pictures, each above its caption in a frame of `width` by SIDE pixels."""
    rows = -(-len(pictures) // columns)
    size = (MARGIN + columns * (width + MARGIN), MARGIN + rows * (SIDE + TEXT_HEIGHT + MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = MARGIN + i % columns * (width + MARGIN)
        y = MARGIN + i // columns * (SIDE + TEXT_HEIGHT + MARGIN)
        shrunk = ImageOps.contain(picture, (width, SIDE), Image.Resampling.BICUBIC)
        frame = (x + (width - shrunk.width) // 2, y + (SIDE - shrunk.height) // 2)
        sheet.paste(shrunk, frame)
        corners = (frame[0] - 1, frame[1] - 1, frame[0] + shrunk.width, frame[1] + shrunk.height)
        pen.rectangle(corners, outline="#bbbbbb")
        pen.multiline_text(
            (x, y + SIDE + 4), textwrap.fill(caption, 34 * width // SIDE), fill="black", font=font, spacing=2
        )
    return sheet


def main(pipeline: Pipeline, how: Drawing, *, output: Path = Path("gallery.png")) -> None:
    """Draw the example prompts with a diffusers pipeline, as one grid of pictures.

    Args:
        output: the picture file to write.
    """
    gallery_of(pipeline.load(), **asdict(how)).save(output)
    print(f"{len(EXAMPLES)} pictures: {output}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m training.gallery", config=(tyro.conf.OmitArgPrefixes,))
