"""ControlNet residuals: an engine that takes them against diffusers, alone and with skipped blocks, in every layout.

Tolerances as in test_network: float32 5e-6 of the norm; float16 and bfloat16 no further from float32 than diffusers.
"""

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from helpers import MODELS, case, kinds_of_layers, mmdit, model_config, random_transformer, relative_error
from PIL import Image
from ranks import run_on_ranks

from mmdit_lib import EngineFolder, MMDiTRunner, build, convert, export_onnx, load_pipeline
from mmdit_lib.checkpoint.random_weights import randomize
from mmdit_lib.config import BuildConfig, Layout, Resolution, Sizes
from mmdit_lib.engine.dry_graph import dry_graph
from mmdit_lib.engine.folder import plan_file
from mmdit_lib.engine.inputs import draw_inputs, sample_inputs
from mmdit_lib.engine.kernel_passes import KERNELS
from mmdit_lib.engine.passes import NUMERICS, SPEED, apply
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.memory import memory_of
from mmdit_lib.reports.parity import all_ok, compare, verdict
from mmdit_lib.sd3 import SD3
from mmdit_lib.sd3.inputs import residual_inputs
from mmdit_lib.sd3.pipelines import to_inputs
from training.random_pipeline import make_random_pipeline

FLOAT32_LIMIT, HALF_RATIO = 5e-6, 1.1
NAME = "block_controlnet_hidden_states"
SIZES = [((5, 7), 1), ((3, 4), 2), ((2, 9), 3)]
"""Rows and columns of patches, batch."""


def folder(name: str, count: int, dtype: str = "float32", plan: bool = False, **options) -> Path:
    return case(name).engine(dtype, plan=plan, controlnet_residuals=count, **options)


@cache
def opened(name: str, count: int, dtype: str = "float32", **options) -> MMDiTRunner:
    return MMDiTRunner.from_engine(folder(name, count, dtype, **options), backend="pytorch", device="cpu")


def residuals(config, patches, batch: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, patches[0] * patches[1], config.hidden_size)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@torch.inference_mode()
def by_diffusers(reference, inputs: dict, given=None, skipped=None) -> torch.Tensor:
    moved = {name: value if name == "timestep" else value.to(reference.dtype) for name, value in inputs.items()}
    given = given and [x.to(reference.dtype) for x in given]
    return reference(**moved, **{NAME: given}, skip_layers=skipped, return_dict=False)[0]


@pytest.mark.parametrize("attention_layer", [True, False], ids=["attention layer", "TensorRT 10"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", ["sd3.5-medium", "sd3.5-large", "patch-3-table-20"])
def test_equal_to_diffusers(name, count, attention_layer):
    """Fewer residuals than blocks, as many, and more; with 3 and 4 blocks."""
    c, runner = case(name), opened(name, count, skip_layers=True, attention_layer=attention_layer)
    for patches, batch in SIZES:
        inputs, given = c.inputs(patches=patches, batch=batch, tokens=97), residuals(c.config, patches, batch, count)
        for skipped in ([], [0], [1, 2]):
            found = runner(**inputs, **{NAME: given}, skip_layers=skipped).sample
            expected = by_diffusers(c.reference, inputs, given, skipped)
            assert relative_error(found, expected) <= FLOAT32_LIMIT, (patches, skipped)
        assert relative_error(by_diffusers(c.reference, inputs), by_diffusers(c.reference, inputs, given)) > 0.01
    assert relative_error(runner(**inputs).sample, by_diffusers(c.reference, inputs)) <= FLOAT32_LIMIT


@pytest.mark.parametrize("blocks", [2, 3, 12, 19, 24, 38])
def test_every_ratio_is_diffusers(blocks):
    """Its division is of floats, so its rounding matters: int(5 / (24 / 24)) and the like."""
    config = model_config(num_layers=blocks)
    build_config = BuildConfig.one_size(Resolution.read(128), 2, 154)
    for count in range(1, 50):
        names = residual_inputs(config, build_config.model_copy(update={"controlnet_residuals": count}))
        interval = blocks / count
        assert names == [*(f"{NAME}_{int(i / interval)}" for i in range(blocks - 1)), None]
        assert all(int(name.rpartition("_")[2]) < count for name in names[:-1])


def test_without_residuals_no_bit_changes():
    c, runner = case("sd3.5-medium"), opened("sd3.5-medium", 3)
    inputs = c.inputs(patches=(5, 7))
    expected = c.runner()(**inputs).sample
    assert torch.equal(runner(**inputs).sample, expected)
    assert torch.equal(runner(**inputs, **{NAME: None}).sample, expected)
    zeros = [torch.zeros(2, 35, c.config.hidden_size)] * 3
    for given in (zeros, tuple(zeros), torch.stack(zeros)):  # whatever diffusers can index
        assert torch.equal(runner(**inputs, **{NAME: given}).sample, expected)
    assert torch.equal(runner(*inputs.values(), zeros, None, False)[0], expected)
    prepared, _ = runner.prepare(inputs)
    assert prepared[f"{NAME}_0"] is prepared[f"{NAME}_1"], "one tensor of zeros for all"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_no_further_from_float32_than_diffusers(dtype):
    c, runner, ours, theirs = case("sd3.5-medium"), opened("sd3.5-medium", 2, dtype), [], []
    for seed in range(3):
        inputs = c.inputs(seed=seed, tokens=333, dtype=dtype)
        given = [x.to(inputs["hidden_states"].dtype) for x in residuals(c.config, (8, 8), 2, 2, seed)]
        wide = {key: value.float() for key, value in inputs.items()}
        exact = by_diffusers(c.reference, wide, given)
        ours.append(relative_error(runner(**inputs, **{NAME: given}).sample, exact))
        theirs.append(relative_error(by_diffusers(c.reference_in(dtype), inputs, given), exact))
    assert sum(ours) <= HALF_RATIO * sum(theirs), (ours, theirs)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([(2, 64, 64)], f"{NAME}: 1 residual, but the engine takes 3; build with --controlnet_residuals 1"),
        ([(2, 64, 64)] * 4, f"{NAME}: 4 residuals, but the engine takes 3; build with --controlnet_residuals 4"),
        ([(2, 64, 64), (2, 63, 64)], rf"{NAME}_1 must have shape \(2, 64, 64\) for this image, not \(2, 63, 64\)"),
        ([(2, 64, 64), (2, 64, 65)], f"{NAME}_1: expected hidden_size 64, got 65"),
        ([(1, 64, 64)] * 3, "the batch differs between inputs: .*"),
        ([(64, 64)] * 3, rf"{NAME}_0 must have 3 dimensions, not shape \(64, 64\)"),
    ],
    ids=str,
)
def test_refused(given, words):
    inputs, given = case("sd3.5-medium").inputs(), [*given, given[0]] if len(given) == 2 else given
    with pytest.raises(ValueError, match=f"^{words}$"):
        opened("sd3.5-medium", 3)(**inputs, **{NAME: [torch.zeros(shape) for shape in given]})


def test_refused_as_a_whole():
    c = case("sd3.5-medium")
    runner, inputs = opened("sd3.5-medium", 3), c.inputs()
    for value, words in (
        ([1, 2, 3], "give a list of tensors"),
        (3, "give a list"),
        ([], "0 residuals, but the engine takes 3; give None for no residuals"),
    ):
        with pytest.raises(ValueError, match=f"^{NAME}.*: {words}"):
            runner(**inputs, **{NAME: value})
    bad = residuals(c.config, (8, 8), 2, 3)
    bad[1][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"^{NAME}_1 and output contain NaN or infinity"):
        runner(**inputs, **{NAME: bad})
    with pytest.raises(ValueError, match="no ControlNet inputs; build with --controlnet_residuals 3"):
        c.runner()(**inputs, **{NAME: bad})


# The graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_passes_match_but_across_a_residual(name):
    """The sum with a residual comes between a block and the next block's norm of the image tokens."""
    config = MODELS[name]
    plain, ours = (
        Counter(layer.type for layer in apply(runner.backend.graph, NUMERICS + SPEED + KERNELS))
        for runner in (case(name).runner(), opened(name, 2))
    )
    assert ours["PROJECTED_ATTENTION"] == plain["PROJECTED_ATTENTION"] and ours["ATTENTION"] == 0
    assert not any(ours[kind] for kind in ("NORMALIZATION", "MODULATE", "RMS_NORM"))
    crossed = config.num_layers - 1
    assert plain["GATED_NORM"] - ours["GATED_NORM"] == ours["GATED_SUM"] - plain["GATED_SUM"] == crossed
    assert ours["NORM_MODULATE"] - plain["NORM_MODULATE"] == crossed


def test_passes_keep_the_numbers():
    c, runner = case("sd3.5-medium"), opened("sd3.5-medium", 2, skip_layers=True)
    inputs, given = c.inputs(patches=(5, 7)), residuals(c.config, (5, 7), 2, 2)
    weights = runner.folder.open_checkpoint(verify=False).weights()
    fused = PyTorchBackend(runner.backend.graph, weights, passes=NUMERICS + SPEED + KERNELS)
    named = {f"{NAME}_{i}": x for i, x in enumerate(given)} | {"kept_layers": torch.tensor([False, True, True])}
    assert relative_error(fused(inputs | named), by_diffusers(c.reference, inputs, given, [0])) <= FLOAT32_LIMIT


def test_reports(tmp_path):
    """Parity draws random residuals and gives diffusers the same."""
    c, runner = case("sd3.5-large"), opened("sd3.5-large", 4, skip_layers=True)
    inputs = sample_inputs(runner.folder, batch=2)
    assert [name for name in inputs if name.startswith(NAME)] == [f"{NAME}_{i}" for i in range(3)]  # the last: unused
    assert all_ok(table := compare(c.reference, runner, inputs)), verdict(table)
    silent = {name: torch.zeros_like(x) if name.startswith(NAME) else x for name, x in inputs.items()}
    assert relative_error(runner.run(silent), runner.run(inputs)) > 0.01
    code, out, _ = mmdit("parity", "--model_path", c.transformer, "--engine_dir", runner.folder.path)
    assert code == 0 and "3 of 2x64x48" in " ".join(out.split()), out
    code, out, _ = mmdit("inspect", runner.folder.path)
    assert code == 0 and f"{NAME}_0 to 2" in out, out
    steps = ["--repeats", "1", "--text_tokens", "77", "--device", "cpu"]
    code, out, _ = mmdit("bench", "--model_path", c.transformer, "--engine_dir", runner.folder.path, *steps)
    assert code == 0 and "diffusers" in out
    onnxruntime = pytest.importorskip("onnxruntime")
    file = export_onnx(runner.folder.path, tmp_path / "onnx", progress=False) / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(["output"], {name: value.numpy() for name, value in inputs.items()})
    assert relative_error(torch.from_numpy(found), runner.run(inputs)) <= FLOAT32_LIMIT


def test_memory_counts_residuals():
    """A residual waits for its block: seven exist while the first one runs (the eighth gets none).

    The difference is smaller, because a sum and the next norm, if they are one operator, share one larger tensor.
    """
    config, layout = model_config(num_layers=8), Layout()
    plain = BuildConfig.one_size(Resolution.read(128), 2, 77)
    found = {}
    for count in (0, 8):
        build_config = plain.model_copy(update={"controlnet_residuals": count})
        graph = dry_graph(config, layout.at(0), build_config)
        found[count] = memory_of(graph, SD3, config, layout, "bfloat16", plain.sizes(1)[2], build_config)
    assert found[0].weights == found[8].weights
    assert found[8].activations - found[0].activations > 4 * (2 * 64 * config.hidden_size * 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [("sd3-medium", "bfloat16"), ("sd3.5-medium", "float32"), ("sd3.5-large", "float16")]
)
def test_a_plan_is_built(name, dtype):
    """Each model and each dtype once; test_network says where the other pairs are."""
    found = EngineFolder.open(folder(name, 2, dtype, plan=True, skip_layers=name != "sd3-medium"))
    weights = sum(t.numel() * t.element_size() for t in found.open_checkpoint().weights().values())
    assert found.files[plan_file(0)].nbytes > 0.3 * weights


# Pipelines -------------------------------------------------------------------------------------------

CALL = dict(prompt="a small red circle", num_inference_steps=3, guidance_scale=4.0, height=64, width=128)
OFFICIAL = dict(
    joint_attention_dim=None, use_pos_embed=False, pos_embed_type=None, force_zeros_for_pooled_projection=False
)
"""Of SD3.5-large's ControlNets: blocks without text, which use the transformer's position table."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_random_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def engine(model) -> Path:
    checkpoint = convert(model, model.parent / "checkpoint", dtype="float32", progress=False)
    options = dict(max_batch_size=4, controlnet_residuals=2, plan=False, progress=False)
    return build(checkpoint, model.parent / "engine", **options)


def control_net(pipe, seed: int = 0, **fields) -> SD3ControlNetModel:
    ours = {k: v for k, v in pipe.transformer.config.items() if k in SD3ControlNetModel.__init__.__annotations__}
    values = ours | dict(num_layers=2, dual_attention_layers=()) | fields
    return randomize(SD3ControlNetModel(**values).eval(), torch.Generator().manual_seed(seed))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 128, 3), dtype=np.uint8))


SEED = 3


def paint(pipe, **options) -> np.ndarray:
    """Pipelines draw the latents of the control image from torch's global generator."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(SEED)
    return np.asarray(pipe(**CALL | options, generator=torch.Generator().manual_seed(7)).images[0]).astype(int)


@pytest.mark.parametrize(
    ("kind", "nets", "options"),
    [
        (StableDiffusion3ControlNetPipeline, [{}], dict(control_image=picture(1))),
        (StableDiffusion3ControlNetPipeline, [{}], dict(control_image=picture(1), control_guidance_end=0.5)),
        (StableDiffusion3ControlNetPipeline, [OFFICIAL], dict(control_image=picture(1))),
        (
            StableDiffusion3ControlNetPipeline,
            [{}, dict(seed=1)],
            dict(control_image=[picture(1), picture(2)], controlnet_conditioning_scale=[0.7, 0.4]),
        ),
        (
            StableDiffusion3ControlNetInpaintingPipeline,
            [dict(extra_conditioning_channels=1)],
            dict(control_image=picture(1), control_mask=Image.fromarray(np.eye(64, 128, dtype=np.uint8) * 255)),
        ),
    ],
    ids=["one", "for some steps", "of SD3.5-large", "two", "inpainting"],
)
def test_pipelines(model, engine, kind, nets, options):
    plain = StableDiffusion3Pipeline.from_pretrained(model)
    # A net of its own for each: the pipeline gives it the position table of its transformer.
    both = [[control_net(plain, **fields) for fields in nets] for _ in range(2)]
    theirs_net, ours_net = (found if len(found) > 1 else found[0] for found in both)
    theirs = kind(**plain.components, controlnet=theirs_net)
    runner = {"backend": "pytorch"}
    ours = load_pipeline(model, engine, pipeline_class=kind, controlnet=ours_net, device="cpu", runner_options=runner)
    a, b = paint(theirs, **options), paint(ours, **options)
    assert np.abs(a - b).max() <= 1 and a.std() > 5  # rounding to 8 bits may fall on either side
    assert np.abs(a - paint(plain)).max() > 1, "the ControlNet changes the picture"


def test_every_component_has_the_engines_dtype(model, tmp_path):
    """The pipeline prepares the control image in the transformer's dtype, so VAE and ControlNet need the same."""
    checkpoint = convert(model, tmp_path / "checkpoint", dtype="bfloat16", progress=False)
    engine = build(checkpoint, tmp_path / "engine", controlnet_residuals=2, plan=False, progress=False)
    net = control_net(StableDiffusion3Pipeline.from_pretrained(model))
    kind = StableDiffusion3ControlNetPipeline
    pipe = load_pipeline(model, engine, pipeline_class=kind, controlnet=net, device="cpu")
    assert {pipe.controlnet.dtype, pipe.vae.dtype, pipe.transformer.dtype} == {torch.bfloat16}
    assert paint(pipe, control_image=picture(1)).std() > 5


def test_saving_is_refused_before_anything_is_written(model, engine, tmp_path):
    net = control_net(StableDiffusion3Pipeline.from_pretrained(model))
    kind = StableDiffusion3ControlNetPipeline
    pipe = load_pipeline(model, engine, pipeline_class=kind, controlnet=net, device="cpu")
    with pytest.raises(ValueError, match="save_pretrained: the transformer is the engine"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_component_needs_its_pipeline(model, engine):
    with pytest.raises(ValueError, match=r"^controlnet: pass a pipeline_class that accepts it$"):
        load_pipeline(model, engine, controlnet=object())
    with pytest.raises(ValueError, match=r"^controlnet: pass a loaded model, as from_pretrained returns it$"):
        load_pipeline(model, engine, pipeline_class=StableDiffusion3ControlNetPipeline, controlnet="path/to/controlnet")


def test_the_runner_has_what_a_pipeline_reads(model, engine):
    runner = MMDiTRunner.from_engine(engine, backend="pytorch", device="cpu")
    transformer = StableDiffusion3Pipeline.from_pretrained(model).transformer
    assert runner.inner_dim == transformer.inner_dim
    expected, found = transformer.pos_embed.state_dict(), runner.pos_embed.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
    assert runner.pos_embed is runner.pos_embed
    assert not hasattr(runner, "no_such_attribute")


# Several ranks ---------------------------------------------------------------------------------------

TWELVE = model_config(heads=12, head_dim=8, dual_attention_layers=(0, 1), num_layers=4)
LAYOUTS = {  # name: (options of convert, options of build)
    2: {
        "tp2": (dict(tp_size=2), {}),
        "tp2 trtllm": (dict(tp_size=2, tp_layout="trtllm"), {}),
        "cp2 ulysses": ({}, dict(cp_size=2, cp_method="ulysses")),
        "cfg2": ({}, dict(cfg_size=2)),
    },
    3: {"cp3 allgather": ({}, dict(cp_size=3))},
    4: {
        "tp2 x cp2": (dict(tp_size=2), dict(cp_size=2)),
        "cfg2 x cp2": ({}, dict(cfg_size=2, cp_size=2)),
        "cfg2 x tp2": (dict(tp_size=2), dict(cfg_size=2)),
    },
}
CASES = [(154, (7, 9), 2), (97, (5, 7), 3), (154, (3, 5), 1)]
"""Text tokens, rows and columns of patches, batch."""
PROFILE = dict(
    max_batch_size=4, min_resolution="32", opt_resolution="128", max_resolution="160", progress=False,
    skip_layers=True, controlnet_residuals=2,
)  # fmt: skip


def parity_cases(reference, build_config: BuildConfig) -> list:
    """Engine inputs and diffusers' output: with both, with one, and with neither."""
    found = []
    for seed, (tokens, patches, batch) in enumerate(CASES):
        inputs = draw_inputs(SD3, TWELVE, Sizes(batch, 16 * patches[0], 16 * patches[1], tokens), seed=seed)
        for given in (residuals(TWELVE, patches, batch, 2, seed), None):
            for skipped in ([1, 3], None):
                arguments = {NAME: given, "skip_layers": skipped}
                named = inputs | to_inputs(arguments, TWELVE, build_config)
                found.append((named, by_diffusers(reference, inputs, given, skipped)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_on_ranks(world, tmp_path):
    pytest.importorskip("mpi4py")
    reference, tasks = random_transformer(TWELVE), {}
    reference.save_pretrained(tmp_path / "source")
    for name, (converting, building) in LAYOUTS[world].items():
        output = tmp_path / name.replace(" ", "_")
        checkpoint = convert(tmp_path / "source", f"{output}_checkpoint", dtype="float32", progress=False, **converting)
        engine = build(checkpoint, output, plan=False, **PROFILE, **building)
        tasks[name] = {"kind": "parity", "engine": str(engine), "cases": str(tmp_path / "cases.pt")}
    torch.save(parity_cases(reference, EngineFolder.open(engine).build_config), tmp_path / "cases.pt")
    errors = run_on_ranks(world, tasks)
    assert errors.keys() == tasks.keys() and all(len(found) == 2 * 4 * len(CASES) for found in errors.values())
    print({name: max(found) for name, found in errors.items()})
    assert max(max(found) for found in errors.values()) <= FLOAT32_LIMIT, errors


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
def test_the_pipeline_on_ranks(model, tmp_path, world):
    """`sample`: rank 0 encodes the prompt; every rank runs the ControlNet, with rank 0's random numbers."""
    pytest.importorskip("mpi4py")
    plain = StableDiffusion3Pipeline.from_pretrained(model)
    net, image = control_net(plain), picture(1)
    net.save_pretrained(tmp_path / "controlnet")
    image.save(tmp_path / "control.png")
    checkpoint = convert(model, tmp_path / "checkpoint", dtype="float32", progress=False)
    options = dict(cp_size=world, max_batch_size=2, controlnet_residuals=2, plan=False, progress=False)
    task = {
        "kind": "controlled", "model": str(model), "engine": str(build(checkpoint, tmp_path / "engine", **options)),
        "controlnet": str(tmp_path / "controlnet"), "image": str(tmp_path / "control.png"), "seed": SEED,
        "options": CALL, "png": str(tmp_path / "picture.png"),
    }  # fmt: skip
    hashes = run_on_ranks(world, {"picture": task})["picture"]
    assert len(hashes) == world and len(set(hashes)) == 1
    found = np.asarray(Image.open(tmp_path / "picture.png"), dtype=int)
    expected = paint(StableDiffusion3ControlNetPipeline(**plain.components, controlnet=net), control_image=image)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.slow
def test_every_rank_has_a_plan(tmp_path):
    """In one layout: test_parallel builds the others' plans, to which this adds the same kinds of layers in each."""
    config = model_config(heads=12, head_dim=4, num_layers=2, dual_attention_layers=(0,))
    random_transformer(config).save_pretrained(tmp_path / "source")
    profile, added = {k: v for k, v in PROFILE.items() if k not in ("skip_layers", "controlnet_residuals")}, {}
    for name, (converting, building) in (LAYOUTS[2] | LAYOUTS[4]).items():
        output, planned = tmp_path / name.replace(" ", "_"), name == "cfg2 x cp2"
        checkpoint = convert(tmp_path / "source", f"{output}_checkpoint", progress=False, **converting)
        found = EngineFolder.open(build(checkpoint, output, plan=planned, **PROFILE, **building))
        plain = EngineFolder.open(build(checkpoint, f"{output}_plain", plan=False, **profile, **building))
        added[name] = kinds_of_layers(found.graph(0)) - kinds_of_layers(plain.graph(0))
        plans = {plan_file(rank) for rank in range(found.layout.world_size)}
        assert (plans <= found.files.keys()) == planned, name
    assert added["cfg2 x cp2"] and all(kinds <= added["cfg2 x cp2"] for kinds in added.values()), added
