"""The trained pipeline that ships with the package follows its prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageOps
from safetensors.torch import save_file

from mmdit_lib import Checkpoint, build, convert, load_pipeline, tiny
from mmdit_lib.files import FileRecord
from mmdit_lib.files.records import to_json
from training.captions import heldout_prompts
from training.evaluation import Drawing, draw, evaluate
from training.gallery import EXAMPLES, MARGIN, SIDE


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny.model_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size_and_features(pipe):
    files = [path for path in tiny.model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    config = pipe.transformer.config
    assert config.dual_attention_layers and config.qk_norm == "rms_norm"
    assert config.pos_embed_max_size > config.sample_size // config.patch_size
    assert pipe.transformer.transformer_blocks[-1].context_pre_only
    assert config.num_attention_heads % 4 == 0 and pipe.transformer.inner_dim % 16 == 0


@pytest.mark.slow
def test_draws_heldout_prompts(pipe):
    scores = evaluate(pipe, heldout_prompts(4), steps=10, max_sequence_length=77)
    assert min(scores.colour, scores.shape, scores.position) >= 0.85, scores


@pytest.mark.slow
def test_the_gallery_is_what_the_model_draws(pipe):
    """Checks the second image. Another processor changes only the last bits; a retrained model changes whole shapes."""
    (drawn,) = draw(pipe, EXAMPLES[1:2], seed=Drawing.seed + 1)
    left = MARGIN + SIDE + MARGIN
    shown = Image.open(Path(__file__).parents[1] / "docs/gallery.png").crop((left, MARGIN, left + SIDE, MARGIN + SIDE))
    wanted = ImageOps.contain(drawn, (SIDE, SIDE), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(shown, float) - np.asarray(wanted, float)).mean() < 1


def test_another_size(pipe):
    scores = evaluate(pipe, heldout_prompts(2), steps=8, height=96, width=160, max_sequence_length=77)
    assert min(scores.colour, scores.position) >= 0.5, scores


@pytest.mark.parametrize("text", ["", "a small red circle " * 100, "xylophone zebra 日本語 %$#"])
@pytest.mark.filterwarnings("ignore")
def test_odd_prompts_give_a_picture(pipe, text):
    assert draw(pipe, [text], steps=2)[0].size == (128, 128)


@pytest.mark.slow
def test_a_broken_conversion_shows(tmp_path):
    """Swapping two weights of a converted checkpoint keeps all names and shapes, but the scores collapse."""
    checkpoint = convert(str(tiny.model_path()), str(tmp_path / "checkpoint"), dtype="float32", progress=False)
    prompts, call = heldout_prompts(4), {"steps": 10, "max_sequence_length": 77}

    def scores(name: str):
        engine = build(str(checkpoint), str(tmp_path / name), max_batch_size=16, plan=False, progress=False)
        return evaluate(load_pipeline(tiny.model_path(), engine), prompts, **call)

    whole = scores("whole")
    weights = Checkpoint.open(checkpoint).weights()
    a, b = (f"transformer_blocks.2.{part}.weight" for part in ("attn.to_v", "attn.to_out.0"))
    swapped = {name: tensor.clone() for name, tensor in weights.items()} | {
        a: weights[b].clone(),
        b: weights[a].clone(),
    }
    save_file(swapped, checkpoint / "rank0.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    config["mmdit_lib"]["files"] = to_json({"rank0.safetensors": FileRecord.of(checkpoint / "rank0.safetensors")})
    (checkpoint / "config.json").write_text(json.dumps(config))

    broken = scores("broken")  # opens, builds and runs: only the pictures are wrong
    assert min(whole.colour, whole.shape, whole.position) >= 0.85, whole
    assert broken.shape <= whole.shape / 2, broken
