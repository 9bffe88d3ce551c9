"""Scenes and captions: what is held out, and captions that match their scenes."""

import random

import pytest

from training.captions import COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, caption, heldout_prompts, words
from training.data import make_data, tokenize
from training.scenes import COLOURS, HELD_OUT, SHAPES, SIZES, draw_scene, is_held_out
from training.tokenizers import clip_tokenizer, t5_tokenizer


def test_training_and_heldout_share_no_combination():
    rng = random.Random(0)
    seen = {(t.size, t.colour, t.shape) for _ in range(3000) for t in draw_scene(rng).things}
    assert len(HELD_OUT) == 12 and seen.isdisjoint(HELD_OUT)
    assert len(seen) == len(SIZES) * len(COLOURS) * len(SHAPES) - len(HELD_OUT)
    assert all(is_held_out(prompt.scene) for prompt in heldout_prompts(256))


def test_heldout_prompts_are_fixed_complete_and_varied():
    prompts = heldout_prompts(256)
    assert prompts == heldout_prompts(256)
    assert all(p.says_sizes and p.says_place and p.says_background for p in prompts)
    assert len({p.text for p in prompts}) > 250
    things = [t for p in prompts for t in p.scene.things]
    assert {(t.size, t.colour, t.shape) for t in things} >= HELD_OUT


def test_captions_name_what_is_there():
    rng = random.Random(1)
    for _ in range(500):
        prompt = caption(draw_scene(rng), rng, complete=True)
        text = prompt.text.lower()
        for thing in prompt.scene.things:
            for table, name in ((SHAPE_WORDS, thing.shape), (COLOUR_WORDS, thing.colour), (SIZE_WORDS, thing.size)):
                assert any(word in text for word in table[name]), text
        assert any(word in text for word in COLOUR_WORDS[prompt.scene.background]), text


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer])
def test_known_words_are_one_token_and_no_text_fails(make):
    vocabulary = words()
    tokenizer = make(vocabulary)
    for word in vocabulary:
        assert len(tokenizer.tokenize(word)) == 1, word
    for text in ("", "zebra-crossing", "日本語 ü 🎨", "a " * 1000):
        ids = tokenizer(text, truncation=True, max_length=77).input_ids
        assert 1 <= len(ids) <= 77 and max(ids) < len(tokenizer)


def test_no_caption_is_cut_in_training():
    rng = random.Random(2)
    _, t5 = tokenize([caption(draw_scene(rng), rng).text for _ in range(2000)])
    assert (t5 != 0).sum(1).max() <= 40  # the shortest text length in training


def test_data_is_seeded():
    one, two = make_data(20, seed=3, workers=1), make_data(20, seed=3, workers=1)
    assert one.numbers.equal(two.numbers) and one.clip.equal(two.clip) and one.t5.equal(two.t5)
    assert not one.numbers.equal(make_data(20, seed=4, workers=1).numbers)
