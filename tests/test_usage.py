"""How Stable Diffusion 3.5 is used, with the runner in place: each way equals diffusers' pipeline with its own
transformer, in float32. Latents are compared, and the pictures that they decode to."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from helpers import mmdit, relative_error
from ranks import run_on_ranks

from mmdit_lib import MMDiTRunner, build, convert, load_pipeline
from mmdit_lib.engine.folder import EngineFolder
from mmdit_lib.generate import converted_from, generate
from mmdit_lib.models import KNOWN_MODELS
from mmdit_lib.sd3.pipelines import decode
from training.random_pipeline import make_random_pipeline

LATENTS = 5e-6
"""Norm of the difference divided by the norm, after all steps: the limit of one step in tests/test_network.py."""
CALL = dict(prompt="a red circle", num_inference_steps=3, guidance_scale=4.0, height=64, width=96)
LONG = "a red circle on the left of a blue square, " * 60  # 12 tokens each: more than the 512 that T5 reads
TURBO = dict(num_inference_steps=4, guidance_scale=0.0)
NO_ENCODERS = dict.fromkeys(
    ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
)
NO_T5 = dict(text_encoder_3=None, tokenizer_3=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_random_pipeline(tmp_path_factory.mktemp("usage") / "model")


@pytest.fixture(scope="module")
def checkpoint(model) -> Path:
    return convert(model, model.parent / "checkpoint", progress=False)


def engine_of(checkpoint: Path, name: str, **options) -> Path:
    return build(checkpoint, checkpoint.parent / name, plan=False, progress=False, **options)


@pytest.fixture(scope="module")
def engine(checkpoint) -> Path:
    return engine_of(checkpoint, "engine", max_batch_size=8)


def load(model: Path, engine: Path, **options) -> StableDiffusion3Pipeline:
    pipe = load_pipeline(model, engine, device="cpu", runner_options={"backend": "pytorch"}, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes(model, engine) -> tuple:
    """diffusers' pipeline, and the same with the runner."""
    theirs = StableDiffusion3Pipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    return theirs, load(model, engine)


def latents(pipe, **call) -> torch.Tensor:
    return pipe(**CALL | call, output_type="latent", generator=torch.Generator().manual_seed(7)).images


def pixels(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def same(theirs, ours, **call) -> list[dict]:
    """Compare the two pipelines; returns the shapes that the runner was given at each step, and the timesteps."""
    expected = latents(theirs, **call)
    with mock.patch.object(MMDiTRunner, "run", autospec=True, side_effect=MMDiTRunner.run) as run:
        found = latents(ours, **call)
    assert found.shape == expected.shape and relative_error(found, expected) <= LATENTS
    ours, theirs = (pixels(decode(ours, x)) for x in (found, expected))
    assert np.abs(ours - theirs).max() <= 1 and theirs.std() > 5  # rounding to 8 bits may fall on either side
    return [step.args[1] for step in run.call_args_list]


def text_of(steps: list[dict]) -> tuple[int, ...]:
    return tuple(steps[0]["encoder_hidden_states"].shape)


@pytest.mark.parametrize(
    ("call", "rows", "tokens"),
    [
        (dict(prompt=LONG, max_sequence_length=512), 2, 589),
        (dict(num_images_per_prompt=3), 6, 333),
        (dict(negative_prompt="a green square"), 2, 333),
        (dict(negative_prompt="blue", negative_prompt_2="a triangle", negative_prompt_3="on the left"), 2, 333),
        (dict(prompt_2="a square", prompt_3="a blue triangle", clip_skip=1), 2, 333),
        (
            dict(prompt=["a circle", "a square"], negative_prompt=["red", "blue"], num_images_per_prompt=2)
            | dict(max_sequence_length=77),
            8,
            154,
        ),
    ],
    ids=["long prompt", "three images", "negative", "three negatives", "three prompts", "two prompts, two images"],
)
@pytest.mark.filterwarnings("ignore")  # transformers: the long prompt is cut
def test_prompts(pipes, call, rows, tokens):
    theirs, _ = pipes
    assert text_of(same(*pipes, **call))[:2] == (rows, tokens)
    plain, changed = latents(theirs), latents(theirs, **call)
    # Every option has an effect, so a runner that ignored it would not agree.
    assert plain.shape != changed.shape or relative_error(changed, plain) > 10 * LATENTS


def test_without_t5(model, engine):
    theirs = StableDiffusion3Pipeline.from_pretrained(model, **NO_T5)
    theirs.set_progress_bar_config(disable=True)
    step, *_ = same(theirs, load(model, engine, **NO_T5))
    text = step["encoder_hidden_states"]
    assert text.shape[1] > 77 and not text[:, 77:].any() and text[:, :77].any()  # zeros in the place of T5's


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_prompt_embeddings(pipes, model, engine, guidance):
    """The pipeline with the runner has no text encoders at all."""
    theirs, _ = pipes
    given = embeddings(theirs, guidance > 1)
    ours = load(model, engine, **NO_ENCODERS)
    steps = same(theirs, ours, prompt=None, guidance_scale=guidance, **given)
    rows = torch.cat([given[name] for name in ("negative_prompt_embeds", "prompt_embeds") if name in given])
    assert all(torch.equal(step["encoder_hidden_states"], rows) for step in steps)
    with pytest.raises(ValueError, match=r"the batch differs between inputs: .*'hidden_states': \d, ") as error:
        latents(ours, prompt=None, guidance_scale=guidance, num_images_per_prompt=2, **given)  # diffusers repeats none
    assert "\n" not in str(error.value)


def embeddings(pipe, guidance: bool) -> dict[str, torch.Tensor]:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.inference_mode():
        found = pipe.encode_prompt(
            "a blue square", None, None, negative_prompt="red", do_classifier_free_guidance=guidance
        )
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def test_transformers_advice_on_torchvision_is_silenced():
    code = "from mmdit_lib.models import SD3; print(SD3.pipelines.default_class().__name__)"
    plain = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    run = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert run.stdout == "StableDiffusion3Pipeline\n" and "torchvision" not in run.stderr


# Long prompts and the profile ------------------------------------------------------------------------


def test_engines_take_long_prompts_by_default():
    default = {name: x.default for name, x in inspect.signature(build).parameters.items()}
    assert (default["min_text_tokens"], default["max_text_tokens"]) == (77, 77 + 512)


def test_an_engine_for_short_prompts(model, checkpoint):
    ours = load(model, engine_of(checkpoint, "short", min_text_tokens=100, max_text_tokens=333))
    assert latents(ours, num_inference_steps=1).isfinite().all()
    said = "589 text tokens are outside the engine's 100 to 333; build with --max_text_tokens 589"
    with pytest.raises(ValueError, match=f"^{said}$"):
        latents(ours, max_sequence_length=512)
    with pytest.raises(ValueError, match=r"78 text tokens .*; build with --min_text_tokens 78$"):
        latents(ours, max_sequence_length=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--guidance_scale", 1, "--max_sequence_length", 512), "589 text tokens are outside the engine's 77 to 333"),
        ((), "batch 2 is outside the engine's 1 to 1 (guidance doubles the batch)"),
        (("--max_sequence_length", 600), "max_sequence_length 600: diffusers' pipelines allow at most 512"),
    ],
)
def test_generate_refuses_before_it_loads_anything(checkpoint, tmp_path, options, said):
    folder = engine_of(checkpoint, "one row", max_text_tokens=333, max_batch_size=1)
    where = ["--model_path", tmp_path / "missing", "--engine_dir", folder, "--output", tmp_path / "picture.png"]
    code, _, error = mmdit("generate", "a circle", "--resolution", 64, *where, *options)
    assert code == 1 and said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "picture.png").exists()


def test_generate_draws_one_image(model, engine):
    said = "^num_images_per_prompt 2: generate draws one image; for several, use load_pipeline$"
    with pytest.raises(ValueError, match=said):
        generate("a circle", model.parent / "missing", engine, num_images_per_prompt=2)


def test_a_pipeline_that_does_not_fit_is_refused_before_it_is_loaded(model, engine):
    said = r"^the pipeline \S+ does not fit \S+: encoder_hidden_states has joint_attention_dim 256 there, \d+ in the"
    with pytest.raises(ValueError, match=said):
        generate("a circle", "tiny", engine)
    with pytest.raises(ValueError, match=r"transformer is not a pipeline: it has no model_index\.json; give"):
        generate("a circle", model / "transformer", engine)
    with pytest.raises(ValueError, match=r"^nowhere does not exist and is not a hub id"):
        generate("a circle", "nowhere", engine)


def test_only_the_sizes_of_the_pipelines_transformer_matter(model, engine, tmp_path):
    """The engine takes its place, so what else is in its config need not be known here."""
    copy = Path(shutil.copytree(model, tmp_path / "quantized"))
    config = json.loads((copy / "transformer/config.json").read_text())
    changed = config | {"quantization_config": {"quant_method": "bitsandbytes"}, "sample_size": None}
    (copy / "transformer/config.json").write_text(json.dumps(changed))
    assert load(copy, engine).transformer.folder.path == engine


def test_where_the_hub_keeps_its_files_is_left_to_diffusers(engine, tmp_path):
    """Asking the hub first, with other options, could refuse what diffusers finds."""
    with pytest.raises(OSError):
        load("someone/model", engine, cache_dir=tmp_path, local_files_only=True)


def test_the_pipeline_is_by_default_the_one_that_was_converted(model, engine, monkeypatch):
    folder = EngineFolder.open(engine)
    assert converted_from(folder) == (str(model), None)

    def recorded(name: str, revision: str | None) -> EngineFolder:
        config = folder.config | {"pretrained_config": folder.config["pretrained_config"] | {"model_path": name}}
        return replace(folder, config=config, checkpoint=folder.checkpoint.model_copy(update={"revision": revision}))

    assert converted_from(recorded("tiny", None))[0].endswith("weights")
    assert converted_from(recorded("owner/name", "0123abc")) == ("owner/name", "0123abc")
    with pytest.raises(ValueError, match="was converted from models/m, which is not there: use mmdit generate --model"):
        converted_from(recorded("models/m", None))  # anyone may own that name on the hub
    with pytest.raises(ValueError, match="does not name its pipeline: use mmdit generate --model_path"):
        converted_from(recorded("", None))
    picture = generate("a circle", None, engine, resolution=64, num_inference_steps=1, device="cpu")
    assert picture.image.size == (64, 64)


@pytest.mark.slow
def test_generate_with_a_long_prompt(model, engine, tmp_path):
    where = ["--model_path", model, "--engine_dir", engine, "--output", tmp_path / "picture.png"]
    short = ["--resolution", 64, "--num_inference_steps", 1, "--max_sequence_length", 512, "--device", "cpu"]
    with mock.patch.object(MMDiTRunner, "run", autospec=True, side_effect=MMDiTRunner.run) as run:
        code, _, error = mmdit("generate", LONG, *where, *short)
    assert code == 0, error
    assert text_of([run.call_args.args[1]])[:2] == (2, 589)


# SD3.5-large-turbo -----------------------------------------------------------------------------------


def test_turbo_is_known():
    assert KNOWN_MODELS["stable-diffusion-3.5-large-turbo"] == KNOWN_MODELS["stable-diffusion-3.5-large"]


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_turbo(pipes, model, checkpoint, guidance):
    """Four steps of one row each, in an engine for one row, at the noise levels of a shift of 3."""
    theirs, _ = pipes
    assert theirs.scheduler.config.shift == 3.0
    ours = load(model, engine_of(checkpoint, "turbo", max_batch_size=1))
    steps = same(theirs, ours, **TURBO | dict(guidance_scale=guidance))
    assert [step["hidden_states"].shape for step in steps] == [(1, 16, 8, 12)] * 4
    found = torch.cat([step["timestep"] for step in steps])
    torch.testing.assert_close(found, torch.tensor([1000.0, 857.7, 602.2, 8.9]), rtol=0, atol=0.1)
    with pytest.raises(ValueError, match=r"batch 2 is outside the engine's 1 to 1 \(guidance doubles the batch\)"):
        latents(ours)


# Saving ----------------------------------------------------------------------------------------------


def refuses_to_save(pipe, folder: Path, engine: Path) -> None:
    with pytest.raises(ValueError, match=r"save_pretrained: .* load_pipeline, or write .* with mmdit export$") as error:
        pipe.save_pretrained(folder)
    assert str(engine) in str(error.value) and "\n" not in str(error.value)


def test_a_pipeline_with_a_runner_is_not_saved(model, engine, tmp_path):
    pipe = load(model, engine)
    refuses_to_save(pipe, tmp_path / "saved", engine)
    assert not (tmp_path / "saved").exists()
    # diffusers' constructor knows nothing of the refusal: what it saves first is not a pipeline.
    refuses_to_save(StableDiffusion3Img2ImgPipeline(**pipe.components), tmp_path / "other", engine)
    assert not (tmp_path / "other" / "model_index.json").exists()


def test_a_pipeline_with_diffusers_transformer_again_is_saved(pipes, model, engine, tmp_path):
    theirs, _ = pipes
    pipe = load(model, engine)
    pipe.transformer = theirs.transformer
    pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again), latents(theirs))


# Several ranks ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
def test_cfg_parallelism_on_ranks(pipes, model, checkpoint, tmp_path, world):
    """`sample` on two ranks, of which only rank 0 has text encoders."""
    pytest.importorskip("mpi4py")
    theirs, _ = pipes
    calls = {
        "long prompt": dict(prompt=LONG, max_sequence_length=512),
        "three images": dict(num_images_per_prompt=3),
        "negatives": dict(negative_prompt="blue", negative_prompt_2="a square", negative_prompt_3="on the left"),
        "turbo": TURBO,
        "embeddings": dict(prompt=None, **embeddings(theirs, True)),
    }
    torch.save({name: CALL | call for name, call in calls.items()}, tmp_path / "calls.pt")
    folder = engine_of(checkpoint, "cfg2", max_batch_size=6, cfg_size=world)
    task = {"kind": "usage", "model": str(model), "engine": str(folder), "calls": str(tmp_path / "calls.pt"),
            "output": str(tmp_path / "pictures.pt")}  # fmt: skip
    run_on_ranks(world, {"usage": task})
    found = torch.load(tmp_path / "pictures.pt", weights_only=True)
    for name, call in calls.items():
        expected = pixels(theirs(**CALL | call, generator=torch.Generator().manual_seed(7)).images)
        assert np.abs(found[name].numpy().astype(int) - expected).max() <= 1, name
