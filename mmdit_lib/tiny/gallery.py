"""A grid of pictures, each above its prompt: `python -m mmdit_lib.tiny.gallery --output gallery.png`."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from mmdit_lib.tiny.evaluation import GUIDANCE, STEPS, draw

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


def gallery_of(pipe, prompts: Sequence[str] = EXAMPLES, columns: int = 4, **options) -> Image.Image:
    """Draw `prompts` with `pipe` (`options` as in `evaluation.draw`) and lay them out `columns` to a row."""
    pictures = draw(pipe, list(prompts), **{"batch": 4, **options})
    return lay_out(pictures, prompts, columns)


def lay_out(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, side: int = 224) -> Image.Image:
    margin, text_height = 16, 58
    rows = -(-len(pictures) // columns)
    size = (margin + columns * (side + margin), margin + rows * (side + text_height + margin))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = margin + i % columns * (side + margin)
        y = margin + i // columns * (side + text_height + margin)
        shrunk = picture.copy()
        shrunk = shrunk.resize([round(n * side / max(picture.size)) for n in picture.size], Image.Resampling.BICUBIC)
        frame = (x + (side - shrunk.width) // 2, y + (side - shrunk.height) // 2)
        sheet.paste(shrunk, frame)
        corners = (frame[0] - 1, frame[1] - 1, frame[0] + shrunk.width, frame[1] + shrunk.height)
        pen.rectangle(corners, outline="#bbbbbb")
        pen.multiline_text((x, y + side + 4), textwrap.fill(caption, 34), fill="black", font=font, spacing=2)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gallery.png"))
    parser.add_argument("--model_path", help="a diffusers SD3 folder; default: the model in this package")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from diffusers import StableDiffusion3Pipeline

    from mmdit_lib.tiny.package import model_path

    folder = options.model_path or model_path()
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    sheet = gallery_of(pipe, steps=options.steps, guidance=options.guidance, seed=options.seed)
    sheet.save(options.output)
    print(f"{len(EXAMPLES)} pictures in {options.output}")


if __name__ == "__main__":
    main()
