"""The judge on rendered scenes, whose content is known."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from training.captions import Prompt, caption
from training.card import loss_curve
from training.evaluation import score
from training.judge import look
from training.render import describe, picture_of, render
from training.scenes import CELLS, COLOURS, RELATIONS, SHAPES, Scene, Thing, draw_scene


def prompts(count: int, seed: int = 7) -> list[Prompt]:
    rng = random.Random(seed)
    return [caption(draw_scene(rng, held_out=bool(i % 2)), rng, complete=True) for i in range(count)]


def stated(scores) -> list[float]:
    return [scores.colour, scores.shape, scores.position, scores.size, scores.background, scores.count]


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(96, 96), (128, 128), (96, 192), (192, 96), (144, 112), (192, 192)])
def test_right_on_clean_pictures(height, width):
    asked = prompts(60)
    seen = [look(picture_of(p.scene, height, width, seed=i)) for i, p in enumerate(asked)]
    assert min(stated(score(asked, seen))) == 1.0


def test_right_on_blurred_noisy_pictures():
    """Similar to the output of a lossy decoder."""
    asked, rng = prompts(60), np.random.default_rng(0)
    pictures = [picture_of(p.scene, seed=i).filter(ImageFilter.GaussianBlur(1.0)) for i, p in enumerate(asked)]
    noisy = [np.asarray(p) / 255 + rng.normal(0, 0.03, (128, 128, 3)) for p in pictures]
    assert min(stated(score(asked, map(look, noisy)))) >= 0.97


def test_wrong_pictures_score_low():
    """Images of other scenes match only by chance."""
    asked = prompts(60)
    seen = [look(picture_of(p.scene)) for p in asked[1:] + asked[:1]]
    scores = score(asked, seen)
    assert scores.colour < 0.5 and scores.shape < 0.6 and scores.position < 0.6


@pytest.mark.parametrize("attribute", ["colour", "shape", "size", "position", "background"])
def test_each_error_is_seen(attribute):
    right = Scene((Thing("star", "red", "small"),), "top left", "white")
    wrong = {
        "colour": Scene((Thing("star", "blue", "small"),), "top left", "white"),
        "shape": Scene((Thing("cross", "red", "small"),), "top left", "white"),
        "size": Scene((Thing("star", "red", "large"),), "top left", "white"),
        "position": Scene((Thing("star", "red", "small"),), "left", "white"),
        "background": Scene((Thing("star", "red", "small"),), "top left", "yellow"),
    }[attribute]
    scores = score([Prompt("", right)], [look(picture_of(wrong))])
    names = ("colour", "shape", "size", "position", "background")
    assert [name for name in names if getattr(scores, name) < 1] == [attribute]


def test_swapped_relation_is_seen():
    first, second = Thing("star", "red", "small"), Thing("ring", "blue", "large")
    for place in RELATIONS:
        right, wrong = Scene((first, second), place, "white"), Scene((second, first), place, "white")
        scores = score([Prompt("", right)], [look(picture_of(wrong))])
        assert (scores.colour, scores.shape, scores.position) == (1, 1, 0)


def test_nothing_and_noise():
    assert look(Image.new("RGB", (128, 128), COLOURS["green"])).things == ()
    noise = look(np.random.default_rng(0).random((96, 96, 3)))
    assert all(thing.shape is None for thing in noise.things)


def test_touching_things_are_told_apart():
    picture = Image.new("RGB", (128, 128), COLOURS["white"])
    picture.paste(COLOURS["red"], (20, 40, 60, 80))
    picture.paste(COLOURS["blue"], (60, 40, 100, 80))
    assert sorted((t.colour, t.shape) for t in look(picture).things) == [("blue", "square"), ("red", "square")]


def test_every_word_of_a_scene_can_be_seen():
    for shape in SHAPES:
        for place in CELLS:
            thing = look(picture_of(Scene((Thing(shape, "purple", "small"),), place, "black"), 96, 96)).things[0]
            assert (thing.shape, thing.colour, thing.size, thing.cell) == (shape, "purple", "small", place)


@pytest.mark.parametrize("log", [[], [["vae", 50, 1.0, 0.5], ["flow", 50, 1.0, 0.4], ["flow", 100, 2.0, 0.3]]])
def test_loss_curve(tmp_path, log):
    """A run of fewer than 50 steps has no losses."""
    loss_curve(log, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").width >= 320


def test_render_is_a_batch_of_single_pictures():
    rng = random.Random(0)
    numbers = torch.tensor([describe(draw_scene(rng), rng) for _ in range(5)])
    together = render(numbers, 96, 128)
    assert together.shape == (5, 3, 96, 128) and 0 <= together.min() and together.max() <= 1
    assert all(torch.equal(together[i : i + 1], render(numbers[i : i + 1], 96, 128)) for i in range(5))
