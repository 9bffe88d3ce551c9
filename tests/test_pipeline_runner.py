"""The runner in diffusers' pipelines, and its errors."""

import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import load_file

from mmdit_lib import MMDiTRunner, install, load_pipeline
from mmdit_lib.checkpoint import convert
from mmdit_lib.engine.build import build
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.files import FileRecord
from training.random_pipeline import make_random_pipeline

CALL = dict(prompt="a small red circle", num_inference_steps=3, guidance_scale=4.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_random_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def engine(model) -> Path:
    convert(str(model), str(model.parent / "checkpoint"), progress=False)
    return build(
        str(model.parent / "checkpoint"), str(model.parent / "engine"), max_batch_size=4, plan=False, progress=False
    )


@pytest.fixture(scope="module")
def pipes(model, engine):
    """kind -> (diffusers' pipeline, the same with the runner)."""
    theirs = StableDiffusion3Pipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    ours = load_pipeline(model, engine, device="cpu", dtype=torch.float32, runner_options={"backend": "pytorch"})
    ours.set_progress_bar_config(disable=True)

    def get(kind):
        return [
            pipe if kind is StableDiffusion3Pipeline else _quiet(kind(**pipe.components)) for pipe in (theirs, ours)
        ]

    return get


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def grey_levels(pipes, **call) -> int:
    """The largest difference between the two images, in any channel of any pixel; they must not be blank."""
    a, b = (
        np.asarray(pipe(**CALL | call, generator=torch.Generator().manual_seed(7)).images[0]).astype(int)
        for pipe in pipes
    )
    assert a.shape == b.shape and a.std() > 5
    return np.abs(a - b).max()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (128, 128, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "call",
    [
        {},
        dict(height=64, width=160),
        dict(guidance_scale=1.0),
        dict(max_sequence_length=512),
        dict(num_images_per_prompt=2, height=64, width=64),
    ],
    ids=["default", "wide", "without guidance", "589 tokens", "two images"],
)
def test_text_to_image(pipes, call):
    assert grey_levels(pipes(StableDiffusion3Pipeline), **call) <= 1


def test_img2img(pipes):
    assert grey_levels(pipes(StableDiffusion3Img2ImgPipeline), image=picture(1), strength=0.7) <= 1


def test_inpainting(pipes):
    mask = Image.fromarray(np.pad(np.full((64, 64), 255, np.uint8), 32))
    size = dict(height=128, width=128)  # its default is the model's, 128 latent pixels
    assert (
        grey_levels(pipes(StableDiffusion3InpaintPipeline), image=picture(2), mask_image=mask, strength=0.8, **size)
        <= 1
    )


def test_without_t5(model, engine):
    """diffusers replaces T5's part of the text with zeros."""
    theirs = _quiet(StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None))
    ours = StableDiffusion3Pipeline(**theirs.components)
    ours = install(_quiet(ours), MMDiTRunner.from_engine(engine, backend="pytorch", device="cpu"))
    assert grey_levels((theirs, ours)) <= 1


def test_the_pictures_can_differ(pipes, engine):
    """The comparison above detects a wrong transformer."""
    theirs, ours = pipes(StableDiffusion3Pipeline)
    runner = ours.transformer
    weights = dict(runner.folder.open_checkpoint().weights())
    weights["proj_out.bias"] = weights["proj_out.bias"] + 0.1
    ours.transformer = MMDiTRunner(runner.folder, PyTorchBackend(runner.backend.graph, weights), "changed")
    try:
        assert grey_levels((theirs, ours)) > 1
    finally:
        ours.transformer = runner


def test_offloading_keeps_the_runner_and_the_image(model, engine):
    """`enable_model_cpu_offload` hooks the other components; with the CPU as its device, this runs anywhere."""
    plain, offloaded = (
        _quiet(load_pipeline(model, engine, device="cpu", dtype=torch.float32, runner_options={"backend": "pytorch"}))
        for _ in range(2)
    )
    offloaded.enable_model_cpu_offload(device="cpu")
    assert offloaded.transformer.backend.name == "pytorch" and hasattr(offloaded.vae, "_hf_hook")
    assert grey_levels((plain, offloaded)) == 0


def test_load_pipeline_does_not_read_diffusers_weights(model, engine, monkeypatch):
    monkeypatch.setattr(SD3Transformer2DModel, "from_pretrained", lambda *a, **k: pytest.fail("read the transformer"))
    pipe = load_pipeline(model, engine, pipeline_class=StableDiffusion3Img2ImgPipeline, device="cpu")
    assert isinstance(pipe, StableDiffusion3Img2ImgPipeline) and isinstance(pipe.transformer, MMDiTRunner)
    assert (pipe.patch_size, pipe.default_sample_size) == (2, 16)
    assert pipe.dtype == torch.float32 and pipe.vae.dtype == torch.float32


def test_torch_dtype_is_diffusers_older_name_of_dtype(model, engine):
    pipe = load_pipeline(model, engine, device="cpu", torch_dtype=torch.bfloat16)
    assert pipe.vae.dtype == torch.bfloat16 and pipe.transformer.dtype == torch.float32
    with pytest.raises(ValueError, match=r"^dtype torch.float32 and torch_dtype torch.bfloat16: give only dtype$"):
        load_pipeline(model, engine, dtype=torch.float32, torch_dtype=torch.bfloat16)


def test_a_model_in_the_home_folder(model, engine, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    assert load_pipeline(f"~/{model.name}", engine, device="cpu").vae.dtype == torch.float32


def test_no_pickle_is_loaded(model, engine, tmp_path):
    shutil.copytree(model, tmp_path / "pickled")
    vae = tmp_path / "pickled" / "vae"
    torch.save(load_file(vae / "diffusion_pytorch_model.safetensors"), vae / "diffusion_pytorch_model.bin")
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_pipeline(tmp_path / "pickled", engine, device="cpu")


# The runner on its own -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case() -> helpers.Case:
    return helpers.case("sd3.5-medium")


def call(case, **changes):
    return case.runner()(**case.inputs(patches=(4, 6)) | changes)


def test_what_it_returns(case):
    inputs = case.inputs(patches=(4, 6))
    plain = call(case, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 1
    assert torch.equal(call(case).sample, plain[0])
    assert call(case, hidden_states=inputs["hidden_states"].bfloat16()).sample.dtype == torch.bfloat16
    runner = case.runner()
    assert runner.config.in_channels == runner.config["in_channels"] == 16
    assert (runner.dtype, runner.device) == (torch.float32, torch.device("cpu"))
    with runner.cache_context("cond"):
        pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(skip_layers=[7, 8]), r"skip_layers=\[7, 8\]: the engine always runs every layer"),
        (dict(block_controlnet_hidden_states=[torch.zeros(1)]), "block_controlnet_hidden_states: .* ControlNet"),
        (dict(joint_attention_kwargs={"scale": 0.5}), r"joint_attention_kwargs\['scale'\]: .* LoRA scale"),
        (
            dict(joint_attention_kwargs={"ip_adapter_image_embeds": 0}),
            r"joint_attention_kwargs\['ip_adapter_image_embeds'\]",
        ),
        (dict(encoder_hidden_states=None), "missing input encoder_hidden_states"),
        (dict(timestep=None, pooled_projections=None), "missing input pooled_projections, timestep"),
    ],
)
def test_refused_arguments(case, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        call(case, **changes)
    assert "\n" not in str(error.value)


def test_arguments_are_bound_as_by_python(case):
    inputs = case.inputs(patches=(4, 6))
    assert torch.equal(case.runner()(*inputs.values(), None, None, False)[0], call(case).sample)
    with pytest.raises(TypeError, match=r"^9 positional arguments: give at most 8, hidden_states, .*, skip_layers$"):
        case.runner()(*inputs.values(), None, None, True, None, None)
    with pytest.raises(TypeError, match=r"^got multiple values for argument 'timestep'$"):
        case.runner()(*inputs.values(), timestep=inputs["timestep"])


def test_unknown_inputs(case):
    given = case.inputs() | {"guidance": torch.ones(2)}
    known = "hidden_states, encoder_hidden_states, pooled_projections, timestep"
    with pytest.raises(ValueError, match=f"^unknown input guidance: the engine's inputs are {known}$"):
        case.runner().run(given)
    residual = "block_controlnet_hidden_states_0"
    words = f"^unknown input {residual}: .* controlnet_residuals=0; build with --controlnet_residuals N$"
    with pytest.raises(ValueError, match=words):
        case.runner().run(case.inputs() | {residual: torch.ones(1)})


def test_only_what_needs_weights_reads_the_checkpoint(case, tmp_path, monkeypatch):
    """It verifies checksums only if `verify` is set; attributes that need no weights work without a checkpoint."""
    monkeypatch.setattr(FileRecord, "verify", lambda *_: pytest.fail("read the whole file"))
    assert case.open(verify=False).pos_embed.proj.weight.isfinite().all()
    runner = case.open(verify=False)
    runner.checkpoint_dir = tmp_path / "gone"
    assert runner.inner_dim == case.config.hidden_size
    assert not hasattr(runner, "pos_embed")
    with pytest.raises(AttributeError, match=r"pos_embed: weights are read from .*; give its path with"):
        runner.pos_embed  # noqa: B018


def test_harmless_arguments(case):
    expected = call(case).sample
    for harmless in (
        dict(skip_layers=None),
        dict(skip_layers=[]),
        dict(joint_attention_kwargs={}),
        dict(joint_attention_kwargs={"scale": 1.0}),
    ):
        assert torch.equal(call(case, **harmless).sample, expected)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            dict(batch=4),
            r"batch 4 is outside the engine's 1 to 3 \(guidance doubles the batch\); build with --max_batch_size 4",
        ),
        (dict(batch=0), "batch 0 is outside"),
        (dict(tokens=76), "76 text tokens are outside the engine's 77 to 589"),
        (dict(tokens=590), "590 text tokens are outside the engine's 77 to 589"),
        (dict(patches=(1, 8)), "height 16 is outside the engine's 32 to 320 pixels"),
        (dict(patches=(8, 21)), "width 336 is outside the engine's 32 to 320 pixels"),
        (dict(patches=(0, 8)), "height 0 is outside the engine's 32 to 320 pixels"),
        (dict(patches=(8192, 2)), "height 131072 is outside the engine's 32 to 320 pixels"),
    ],
)
def test_outside_the_profile(case, sizes, words):
    with pytest.raises(ValueError, match=words) as error:
        case.runner().run(case.inputs(**sizes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("hidden_states", (2, 16, 17, 16), "resolution 136x128: height and width must be multiples of 16 pixels"),
        ("hidden_states", (2, 16, 16, 5), "resolution 128x40: height and width must be multiples of 16 pixels"),
        ("hidden_states", (2, 4, 16, 16), "hidden_states: expected in_channels 16, got 4"),
        ("hidden_states", (16, 16, 16), "hidden_states must have 4 dimensions"),
        ("encoder_hidden_states", (2, 154, 41), "encoder_hidden_states: expected joint_attention_dim 40, got 41"),
        ("pooled_projections", (2, 47), "pooled_projections: expected pooled_projection_dim 48, got 47"),
        ("timestep", (), "timestep must have 1 dimensions"),
        ("timestep", (3,), "the batch differs between inputs"),
    ],
)
def test_wrong_shapes(case, name, shape, words):
    with pytest.raises(ValueError, match=words) as error:
        case.runner().run(case.inputs() | {name: torch.zeros(shape)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(case, name, value):
    inputs = case.inputs()
    inputs[name].view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"{name}.* contains? NaN or infinity"):
        case.runner().run(inputs)


def overflowing(case, dtype: str) -> MMDiTRunner:
    """Weights that are finite, and activations beyond float16's 65504."""
    runner = case.runner(dtype)
    weights = dict(runner.folder.open_checkpoint().weights())
    weights["transformer_blocks.1.ff.net.0.proj.weight"] = weights["transformer_blocks.1.ff.net.0.proj.weight"] * 6e4
    return MMDiTRunner(runner.folder, PyTorchBackend(runner.backend.graph, weights), "changed")


def test_float16_overflow_names_bfloat16(case):
    with pytest.raises(ValueError, match="float16 overflowed in the network; convert with --dtype bfloat16"):
        overflowing(case, "float16").run(case.inputs(dtype="float16"))
    assert overflowing(case, "bfloat16").run(case.inputs(dtype="bfloat16")).isfinite().all()


def test_checks_can_be_switched_off(case):
    runner = case.open(check_finite=False)
    assert runner.run(case.inputs() | {"timestep": torch.full((2,), float("nan"))}).isnan().any()


def test_output_that_is_not_finite_in_float32(case):
    runner = case.runner()
    weights = dict(runner.folder.open_checkpoint().weights())
    weights["proj_out.bias"] = weights["proj_out.bias"] * float("nan")
    with pytest.raises(ValueError, match=r"^output contains NaN or infinity"):
        MMDiTRunner(runner.folder, PyTorchBackend(runner.backend.graph, weights), "changed").run(case.inputs())
