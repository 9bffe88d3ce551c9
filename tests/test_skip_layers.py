"""Skip-layer guidance: an engine that can skip blocks against diffusers' `skip_layers`, and what is refused.

Tolerances as in test_network: float32 5e-6 of the norm; float16 and bfloat16 no further from float32 than diffusers.
"""

import json
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from helpers import MODELS, case, mmdit, relative_error

from mmdit_lib import EngineFolder, MMDiTRunner, export_onnx, load_pipeline
from mmdit_lib.engine.folder import plan_file
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.engine.kernel_passes import KERNELS
from mmdit_lib.engine.lowering import lower
from mmdit_lib.engine.outline import outline_blocks
from mmdit_lib.engine.passes import NUMERICS, SPEED, apply
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.parity import all_ok, compare, verdict
from mmdit_lib.tiny import model_path

FLOAT32_LIMIT, HALF_RATIO = 5e-6, 1.1
SIZES = [((5, 7), 1), ((3, 4), 2), ((2, 9), 3)]
"""Rows and columns of patches, batch."""


def folder(name: str, dtype: str = "float32", plan: bool = False, **options) -> Path:
    return case(name).engine(dtype, plan=plan, skip_layers=True, **options)


@cache
def opened(name: str, dtype: str = "float32", **options) -> MMDiTRunner:
    return MMDiTRunner.from_engine(folder(name, dtype, **options), backend="pytorch", device="cpu")


@torch.inference_mode()
def by_diffusers(reference, inputs: dict, **arguments) -> torch.Tensor:
    moved = {name: value if name == "timestep" else value.to(reference.dtype) for name, value in inputs.items()}
    return reference(**moved, **arguments, return_dict=False)[0]


def subsets(name: str) -> list[list[int]]:
    """None, each end, two in the middle of the network, all; the last block has no text output."""
    last = MODELS[name].num_layers - 1
    return [[], [0], [last], [0, last], list(range(last + 1))]


@pytest.mark.parametrize("attention_layer", [True, False], ids=["attention layer", "TensorRT 10"])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_diffusers(name, attention_layer):
    c, runner = case(name), opened(name, attention_layer=attention_layer)
    for patches, batch in SIZES:
        inputs = c.inputs(patches=patches, batch=batch, tokens=97)
        results = []
        for skipped in subsets(name):
            results.append(runner(**inputs, skip_layers=skipped).sample)
            expected = by_diffusers(c.reference, inputs, skip_layers=skipped)
            assert relative_error(results[-1], expected) <= FLOAT32_LIMIT, (patches, skipped)
        assert all(relative_error(found, results[0]) > 0.01 for found in results[1:]), "each of these blocks matters"


def test_nothing_skipped_changes_no_bit():
    c, runner = case("sd3.5-medium"), opened("sd3.5-medium")
    inputs = c.inputs(patches=(5, 7))
    expected = c.runner()(**inputs).sample
    for harmless in ({}, dict(skip_layers=None), dict(skip_layers=[]), dict(skip_layers=())):
        assert torch.equal(runner(**inputs, **harmless).sample, expected)
    assert torch.equal(runner(*inputs.values(), None, None, False, [])[0], expected)  # by position, as in diffusers
    assert "kept_layers" not in {x.name for x in c.runner().backend.graph.inputs}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_no_further_from_float32_than_diffusers(dtype):
    c, runner, ours, theirs = case("sd3.5-medium"), opened("sd3.5-medium", dtype), [], []
    for seed in range(3):
        inputs = c.inputs(seed=seed, tokens=333, dtype=dtype)
        wide = {key: value.float() for key, value in inputs.items()}
        exact = by_diffusers(c.reference, wide, skip_layers=[1])
        ours.append(relative_error(runner(**inputs, skip_layers=[1]).sample, exact))
        theirs.append(relative_error(by_diffusers(c.reference_in(dtype), inputs, skip_layers=[1]), exact))
    assert sum(ours) <= HALF_RATIO * sum(theirs), (ours, theirs)


def test_a_skipped_block_may_overflow():
    """Its result is dropped, not multiplied by zero: diffusers does not compute it at all."""
    c, runner = case("sd3.5-medium"), opened("sd3.5-medium", "float16")
    inputs, weights = c.inputs(dtype="float16"), dict(runner.folder.open_checkpoint().weights())
    expected = runner(**inputs, skip_layers=[1]).sample
    weights["transformer_blocks.1.ff.net.0.proj.weight"] = weights["transformer_blocks.1.ff.net.0.proj.weight"] * 6e4
    broken = MMDiTRunner(runner.folder, PyTorchBackend(runner.backend.graph, weights), "changed")
    with pytest.raises(ValueError, match="float16 overflowed"):
        broken(**inputs)
    assert torch.equal(broken(**inputs, skip_layers=[1]).sample, expected)


@pytest.mark.parametrize(
    ("skipped", "words"),
    [
        ([3], r"skip_layers=\[3\]: the model's blocks are 0 to 2"),
        ([-1], r"skip_layers=\[-1\]: the model's blocks are 0 to 2"),
        ([1, 1], r"skip_layers=\[1, 1\]: give each block once"),
        ([1.0], r"skip_layers=\[1.0\]: give block numbers"),
        ([True], r"skip_layers=\[True\]: give block numbers"),
        (["1"], r"skip_layers=\['1'\]: give block numbers"),
        ("1", "skip_layers='1': give a list"),
        (1, "skip_layers=1: give a list"),
        ([7] * 100, r"skip_layers=\[7, 7, 7, 7, \.\.\.\]: the model's blocks are 0 to 2"),
    ],
)
def test_refused(skipped, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        opened("sd3.5-medium")(**case("sd3.5-medium").inputs(), skip_layers=skipped)


def test_an_engine_without_the_input_says_how_to_build_one():
    c = case("sd3.5-medium")
    with pytest.raises(ValueError, match=r"^skip_layers=\[1\]: .* every layer; build with --skip_layers$"):
        c.runner()(**c.inputs(), skip_layers=[1])
    said = "^unknown input kept_layers: the engine was built with skip_layers=False; build with --skip_layers$"
    for function in (c.runner().run, c.open(check_finite=False).run, c.runner().intermediates):
        with pytest.raises(ValueError, match=said):
            function(c.inputs() | {"kept_layers": torch.ones(3)})
    with pytest.raises(ValueError, match=r"kept_layers: expected num_layers 3, got 4"):
        opened("sd3.5-medium").run(c.inputs() | {"kept_layers": torch.ones(4)})


# The graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_passes_match_inside_blocks(name):
    """A block's first norms read the results of selects, so GATED_NORM is found only inside a block."""
    config, graph = MODELS[name], opened(name).backend.graph
    found = Counter(layer.type for layer in apply(graph, NUMERICS + SPEED + KERNELS))
    blocks, dual = config.num_layers, len(config.dual_attention_layers)
    assert found["SELECT"] == 2 * blocks - 1
    assert found["PROJECTED_ATTENTION"] == blocks + dual and found["ATTENTION"] == 0
    assert not any(found[kind] for kind in ("NORMALIZATION", "MODULATE", "RMS_NORM"))
    assert found["GATED_NORM"] == 2 * blocks - 1
    assert found["GATED_SUM"] == 2 * blocks - 1 + dual


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium"])
def test_passes_keep_the_numbers_and_the_kinds_of_block(name):
    c, runner, inputs = case(name), opened(name), case(name).inputs(patches=(5, 7))
    weights = runner.folder.open_checkpoint(verify=False).weights()
    fused = PyTorchBackend(runner.backend.graph, weights, passes=NUMERICS + SPEED + KERNELS)
    inputs |= {"kept_layers": torch.tensor([True, False, True])}
    assert relative_error(fused(inputs), by_diffusers(c.reference, c.inputs(patches=(5, 7)), skip_layers=[1])) <= 5e-6
    kinds = [
        len(list(outline_blocks(lower(graph, weights, passes=NUMERICS + SPEED), "transformer_blocks").children()))
        for graph in (runner.backend.graph, c.runner().backend.graph)
    ]
    assert kinds[0] == kinds[1]


def test_onnx_and_parity_and_inspect(tmp_path):
    c, runner = case("sd3.5-medium"), opened("sd3.5-medium")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = export_onnx(runner.folder.path, tmp_path / "onnx", progress=False) / "model.onnx"
    inputs = c.inputs(patches=(5, 7)) | {"kept_layers": torch.tensor([True, False, True])}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(["output"], {name: value.numpy() for name, value in inputs.items()})
    assert relative_error(torch.from_numpy(found), runner.run(inputs)) <= FLOAT32_LIMIT
    assert sample_inputs(runner.folder)["kept_layers"].all()
    code, out, _ = mmdit("parity", "--model_path", c.transformer, "--engine_dir", runner.folder.path)
    assert code == 0 and "values of" in out, out
    table = compare(c.reference, runner, sample_inputs(runner.folder))
    assert all_ok(table), verdict(table)
    code, out, _ = mmdit("inspect", runner.folder.path)
    assert code == 0 and "kept_layers" in out and "bool" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [("sd3-medium", "float32"), ("sd3.5-medium", "float16"), ("sd3.5-large", "bfloat16")]
)
def test_a_plan_is_built(name, dtype):
    """Each model and each dtype once; test_network says where the other pairs are."""
    found = EngineFolder.open(folder(name, dtype, plan=True))
    weights = sum(t.numel() * t.element_size() for t in found.open_checkpoint().weights().values())
    assert found.files[plan_file(0)].nbytes > 0.3 * weights


# Folders and commands --------------------------------------------------------------------------------


def test_older_folders_lack_the_options(tmp_path):
    c = case("sd3.5-medium")
    shutil.copytree(c.engine(plan=False), tmp_path / "engine")
    file = tmp_path / "engine" / "config.json"
    config = json.loads(file.read_text())
    for name, default in {"skip_layers": False, "controlnet_residuals": 0}.items():
        assert config["build_config"].pop(name) == default
    file.write_text(json.dumps(config))
    assert EngineFolder.open(tmp_path / "engine").build_config == EngineFolder.open(c.engine(plan=False)).build_config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"skip_layers": 1}, "build_config.skip_layers"),
        ({"skip_layers": False}, "input 'kept_layers' bool"),
        ({"controlnet_residuals": -1}, "build_config.controlnet_residuals"),
        ({"controlnet_residuals": 10**9}, "build_config.controlnet_residuals"),
        ({"controlnet_residuals": 2}, "has no input block_controlnet_hidden_states_0: build it again"),
    ],
    ids=str,
)
def test_a_changed_config_is_one_line(tmp_path, changes, words):
    shutil.copytree(folder("sd3.5-medium"), tmp_path / "engine")
    file = tmp_path / "engine" / "config.json"
    config = json.loads(file.read_text())
    config["build_config"] |= changes
    file.write_text(json.dumps(config))
    checkpoint = case("sd3.5-medium").checkpoint()
    with pytest.raises(ValueError, match=words) as error:
        MMDiTRunner.from_engine(tmp_path / "engine", backend="pytorch", device="cpu", checkpoint_dir=checkpoint)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    assert mmdit("convert", "--model_path", "tiny", "--dtype", "float32", "--output_dir", root / "checkpoint")[0] == 0
    for name, options in {"engine": ["--skip_layers"], "plain": []}.items():
        words = ["--checkpoint_dir", root / "checkpoint", "--output_dir", root / name, "--no-plan", *options]
        assert mmdit("build", *words)[0] == 0
    return root


def test_skip_layer_guidance_in_the_pipeline(tiny):
    """The extra call of a step has half the batch, so one image needs a batch of 2 and of 1."""
    call = dict(
        prompt="a red circle", num_inference_steps=4, guidance_scale=4.0, output_type="latent", height=64, width=96,
        skip_layer_guidance_stop=0.8,
    )  # fmt: skip
    theirs = StableDiffusion3Pipeline.from_pretrained(model_path())
    ours = load_pipeline(model_path(), tiny / "engine", device="cpu", runner_options={"backend": "pytorch"})

    def latents(pipe, **options) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(**call, **options, generator=torch.Generator().manual_seed(0)).images

    expected, plain = latents(theirs, skip_guidance_layers=[1, 2]), latents(theirs)
    # The errors of four steps, magnified by guidance.
    assert relative_error(latents(ours, skip_guidance_layers=[1, 2]), expected) <= 1e-4
    assert relative_error(plain, expected) > 1e-2
    assert relative_error(latents(ours), plain) <= 1e-4


def test_the_command(tiny, tmp_path):
    words = ["generate", "a circle", "--num_inference_steps", "2", "--resolution", "64", "--device", "cpu"]
    words += ["--output", tmp_path / "p.png", "--skip_guidance_layers"]
    code, _, err = mmdit(*words, "1", "2", "--engine_dir", tiny / "plain")
    assert (code, err) == (
        1, "mmdit: skip_guidance_layers=[1, 2]: the engine always runs every layer; build with --skip_layers\n"
    )  # fmt: skip
    code, _, err = mmdit(*words, "99", "--engine_dir", tiny / "engine")
    assert code == 1 and err.startswith("mmdit: skip_guidance_layers=[99]: the model's blocks are 0 to ")
    assert mmdit(*words, "1", "2", "--engine_dir", tiny / "engine")[0] == 0
    code, _, err = mmdit("build", "--builder", "trtllm", "--skip_layers")
    assert code == 1 and err.startswith("mmdit: skip_layers: not an option of builder trtllm")
