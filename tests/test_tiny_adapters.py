"""The LoRA and the ControlNet that ship beside the tiny model, and what trains them."""

import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file

from mmdit_lib import tiny
from mmdit_lib.config import dtype_option
from training import controlnet, lora
from training.adapters import SIDE, STROKE
from training.captions import CELL_WORDS, RELATION_WORDS
from training.evaluation import Pipeline, draw
from training.judge import look
from training.layouts import control_picture, draw_layout, heldout_layouts, judge_layouts
from training.random_pipeline import make_random_pipeline
from training.render import describe, encode_placed, render
from training.scenes import is_held_out


def pixels(numbers, stroke=None) -> np.ndarray:
    return render(torch.tensor([numbers]), SIDE, SIDE, stroke)[0].permute(1, 2, 0).numpy()


# Outlines --------------------------------------------------------------------------------------------


def test_outlines_are_told_from_filled_shapes():
    for i, prompt in enumerate(lora.prompts_without_rings(40)):
        numbers = describe(prompt.scene, random.Random(i))
        filled, outlined = look(pixels(numbers), fill=True), look(pixels(numbers, STROKE), fill=True)
        assert all(thing.hollow == 0 for thing in filled.things)
        assert all(thing.hollow >= lora.HOLLOW for thing in outlined.things)
        shapes = [[thing.shape for thing in sighting.things] for sighting in (filled, outlined)]
        assert sorted(shapes[0]) == sorted(shapes[1]) == sorted(thing.shape for thing in prompt.scene.things)


def fused(pipe: StableDiffusion3Pipeline, scale: float) -> None:
    """Add the shipped LoRA's update to the weights; diffusers would need peft."""
    weights = load_file(tiny.lora_path())
    names = sorted({name.partition(".lora_")[0] for name in weights})
    with torch.no_grad():
        for name in names:
            down, up = (weights[f"{name}.lora_{which}.weight"].float() for which in "AB")
            pipe.transformer.get_submodule(name.removeprefix("transformer.")).weight += scale * up @ down


def test_the_lora_is_small_and_of_the_tiny_model():
    assert tiny.lora_path().stat().st_size < 1_000_000
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny.model_path())
    before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    fused(pipe, 1.0)
    changed = {name for name, x in pipe.transformer.state_dict().items() if not torch.equal(x, before[name])}
    assert len(changed) == len(load_file(tiny.lora_path())) // 2


@pytest.mark.slow
def test_the_lora_draws_outlines():
    pipe, prompts = StableDiffusion3Pipeline.from_pretrained(tiny.model_path()), lora.prompts_without_rings(4)
    outlines = []
    for scale in (0.0, 1.0):
        fused(pipe, scale)
        style = lora.judge_style(prompts, draw(pipe, [p.text for p in prompts], steps=10, max_sequence_length=77))
        assert min(style.scores.position, style.scores.background) >= 0.7, style
        outlines.append(style.outlines)
    assert outlines[0] == 0 and outlines[1] >= 0.5, outlines


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="training a LoRA needs peft")
def test_training_a_lora(tmp_path):
    how = dict(steps=2, batch=2, scenes=8, prompts=1, rank=2)
    lora.train(Pipeline(), lora.Options(tmp_path / "lora", **how))
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert all(x.dtype == torch.float16 and 2 in x.shape for x in weights.values())
    assert any(x.any() for name, x in weights.items() if "lora_B" in name)  # it starts at zero
    assert set(json.loads((tmp_path / "lora" / "scores.json").read_text())) == {"without", "with", "log"}


# Layouts ---------------------------------------------------------------------------------------------


def test_captions_do_not_give_places_away():
    rng = random.Random(0)
    relations = {word for words in RELATION_WORDS.values() for word in words}
    cells = {word for words in CELL_WORDS.values() for word in words} - relations
    for _ in range(200):
        layout = draw_layout(rng)
        assert not is_held_out(layout.prompt.scene)
        if len(layout.things) == 1:
            assert not any(word in layout.prompt.text for word in cells), layout.prompt.text


def test_layouts_are_judged():
    layouts = heldout_layouts(30)
    drawn = [pixels(encode_placed(x.prompt.scene.background, x.things)) for x in layouts]
    right = judge_layouts(layouts, drawn)
    assert right.placed == right.placed_shape == right.placed_shape_colour == 1.0
    shifted = judge_layouts(layouts, [np.roll(picture, 10, axis=1) for picture in drawn])
    assert shifted.placed == 0
    other = judge_layouts(layouts, drawn[1:] + drawn[:1])
    assert other.placed_shape_colour < 0.1
    assert all(np.unique(np.asarray(control_picture(x)), axis=None).size > 2 for x in layouts)


# The ControlNet --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    model = make_random_pipeline(tmp_path_factory.mktemp("controlnet") / "model")
    return StableDiffusion3Pipeline.from_pretrained(model)


def test_control_images_are_encoded_as_in_the_pipeline(pipe):
    layout, seen = heldout_layouts(1)[0], []
    net = controlnet.make_controlnet(pipe.transformer, 2)
    net.register_forward_pre_hook(lambda _, a, given: seen.append(given["controlnet_cond"]), with_kwargs=True)
    controlled = StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=net)
    draw(controlled, [layout.prompt.text], [control_picture(layout)], steps=1, max_sequence_length=77)
    numbers = torch.tensor([encode_placed(layout.prompt.scene.background, layout.things)])
    expected = controlnet.encode_control(pipe.vae, numbers)
    # The pipeline samples the latents from a distribution of which this is the mode, and its image has 8 bits.
    torch.testing.assert_close(seen[0][:1], expected, rtol=0, atol=6 * noise_of(pipe, numbers))


def noise_of(pipe, numbers) -> float:
    """Standard deviation of the latents of a control image."""
    picture = 2 * render(controlnet.outlines(numbers), SIDE, SIDE, STROKE) - 1
    with torch.no_grad():
        return pipe.vae.encode(picture).latent_dist.std.max().item() * pipe.vae.config.scaling_factor


def test_an_untrained_controlnet_changes_nothing(pipe):
    layout = heldout_layouts(1)[0]
    net = controlnet.make_controlnet(pipe.transformer, 2)
    controlled = StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=net)
    how = dict(steps=1, max_sequence_length=77)
    with_it = draw(controlled, [layout.prompt.text], [control_picture(layout)], **how)
    (plain,) = draw(pipe, [layout.prompt.text], **how)
    assert np.array_equal(np.asarray(with_it[0]), np.asarray(plain))


@pytest.mark.slow
def test_the_controlnet_puts_things_in_their_places():
    path = tiny.controlnet_path()
    assert sum(file.stat().st_size for file in path.iterdir()) < 6_000_000
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny.model_path())
    net = SD3ControlNetModel.from_pretrained(path, **dtype_option(torch.float32))
    layouts, how = heldout_layouts(4), dict(steps=10, max_sequence_length=77)
    texts = [x.prompt.text for x in layouts]
    without = judge_layouts(layouts, draw(pipe, texts, **how))
    controlled = StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=net)
    placed = judge_layouts(layouts, draw(controlled, texts, [control_picture(x) for x in layouts], **how))
    assert placed.placed >= 0.6 > 0.4 >= without.placed, (placed, without)


@pytest.mark.slow
def test_training_a_controlnet(tmp_path):
    pipeline, how = Pipeline(), dict(layers=2, batch=2, scenes=8, prompts=1)
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        controlnet.train(pipeline, controlnet.Options(tmp_path, resume=True, **how))
    controlnet.train(pipeline, controlnet.Options(tmp_path, steps=2, **how))
    facts = json.loads((tmp_path / "checkpoint" / "facts.json").read_text())
    assert facts["step"] == 2
    net = SD3ControlNetModel.from_pretrained(tmp_path / "controlnet")
    assert all(block.weight.any() for block in net.controlnet_blocks)  # they start at zero
    with pytest.raises(ValueError, match="does not match the model; use the same --layers"):
        controlnet.train(pipeline, controlnet.Options(tmp_path, resume=True, **how | dict(layers=1)))
    controlnet.train(pipeline, controlnet.Options(tmp_path, resume=True, steps=3, **how))
    assert json.loads((tmp_path / "checkpoint" / "facts.json").read_text())["step"] == 3
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"without", "with"}
    assert torch.get_float32_matmul_precision() == "highest", "training has changed the precision of this process"
