"""LoRAs set on an open engine: the bits of a checkpoint that was converted with them, in the same memory."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import fake_tensorrt
import helpers
import loras
import pytest
import torch
from helpers import diffusers_output, mmdit, random_transformer, relative_error
from PIL import Image
from safetensors.torch import load_file

from mmdit_lib import MMDiTRunner, build, convert, export
from mmdit_lib.engine import pytorch_backend
from mmdit_lib.engine.folder import EngineFolder
from mmdit_lib.engine.kernel_passes import KERNELS
from mmdit_lib.engine.lowering import constant
from mmdit_lib.engine.passes import NUMERICS, SPEED
from mmdit_lib.generate import generate
from mmdit_lib.tiny import model_path

BOUND = 5e-6
BY_PYTORCH = dict(backend="pytorch", device="cpu")


@pytest.fixture(scope="module")
def case() -> helpers.Case:
    return helpers.case("sd3.5-medium")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def given(case, root) -> list[tuple[Path, float]]:
    """One for every layer, and one for the MLPs alone."""
    state = case.reference.state_dict()
    return [
        (loras.write(root / "all.safetensors", loras.random_lora(state)), 0.7),
        (loras.write(root / "mlps.safetensors", loras.random_lora(state, seed=1, rank=2, only="ff.net")), -0.4),
    ]


def converted(case, folder: Path, given, dtype: str = "float32", source: Path | None = None, **options) -> MMDiTRunner:
    """A runner of a checkpoint that was converted with LoRAs."""
    convert(source or case.transformer, folder / "checkpoint", dtype=dtype, loras=given, progress=False)
    ends = zip(("min", "opt", "max"), (2, 8, 20), strict=True)
    sizes = {f"{end}_resolution": str(sides * case.step) for end, sides in ends}
    build(folder / "checkpoint", folder / "engine", max_batch_size=3, plan=False, progress=False, **sizes)
    return MMDiTRunner.from_engine(folder / "engine", **BY_PYTORCH | options)


def places(runner: MMDiTRunner) -> dict[str, int]:
    return {name: buffer.data_ptr() for name, buffer in runner.backend.module.named_buffers()}


@pytest.mark.skipif(not loras.has_peft(), reason="diffusers needs peft for LoRAs: pip install peft")
@pytest.mark.parametrize("count", [1, 2])
def test_outputs_are_diffusers(case, given, count):
    runner = case.open()
    runner.set_adapters(given[:count])
    reference = loras.fused_by_diffusers(random_transformer(case.config), given[:count])
    for batch, patches, tokens in [(1, (3, 5), 154), (2, (7, 9), 333), (3, (8, 8), 77)]:
        inputs = case.inputs(batch=batch, patches=patches, tokens=tokens)
        assert relative_error(runner.run(inputs), diffusers_output(reference, inputs)) < BOUND


def test_bits_are_those_of_a_conversion_and_come_back(case, given, tmp_path):
    runner, inputs = case.open(), case.inputs()
    before, memory = runner.run(inputs), places(runner)
    file = case.checkpoint() / "rank0.safetensors"
    content = file.read_bytes()
    both, mlps = converted(case, tmp_path / "both", given), converted(case, tmp_path / "mlps", given[1:])

    runner.set_adapters(given)
    assert torch.equal(runner.run(inputs), both.run(inputs)) and relative_error(both.run(inputs), before) > 0.05
    assert [(lora.source, lora.scale) for lora in runner.adapters] == [(str(path), scale) for path, scale in given]
    runner.set_adapters([f"{given[1][0]}:-0.4"])  # what only the first one changed is restored
    assert torch.equal(runner.run(inputs), mlps.run(inputs))
    runner.set_adapters([])
    assert torch.equal(runner.run(inputs), before) and runner.adapters == []
    assert places(runner) == memory and file.read_bytes() == content


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_the_base_is_the_checkpoints(case, given, tmp_path, dtype):
    """As converting the checkpoint's own weights, fused in float32; a conversion from float32 rounds only the sum."""
    export(case.checkpoint(dtype), tmp_path / "transformer", progress=False)
    runner, inputs = case.open(dtype), case.inputs(dtype=dtype)
    runner.set_adapters(given)
    same = converted(case, tmp_path / "same", given, dtype, source=tmp_path / "transformer")
    assert torch.equal(runner.run(inputs), same.run(inputs))
    near = converted(case, tmp_path / "near", given, dtype)
    assert relative_error(runner.run(inputs), near.run(inputs)) < 10 * torch.finfo(getattr(torch, dtype)).eps


@pytest.mark.parametrize("passes", [NUMERICS + SPEED, NUMERICS + SPEED + KERNELS], ids=["speed", "kernels"])
def test_merged_weights_are_replaced_where_they_are(case, given, tmp_path, monkeypatch, passes):
    """The graph as on a GPU: queries, keys and values stacked, and the modulations of all blocks."""
    monkeypatch.setattr(pytorch_backend, "default_passes", lambda device, **options: passes)
    runner, inputs = case.open(), case.inputs(batch=3, patches=(5, 7))
    before, memory = runner.run(inputs), places(runner)
    assert any("stack" in node.meta["source"] for node in runner.backend.module.graph.find_nodes(op="get_attr"))
    runner.intermediates(inputs)  # from another lowering of the graph, which shares the weights
    expected = converted(case, tmp_path, given)
    runner.set_adapters(given)
    assert torch.equal(runner.run(inputs), expected.run(inputs))
    inside, wanted = runner.intermediates(inputs), expected.intermediates(inputs)
    assert inside.keys() == wanted.keys() and all(torch.equal(inside[name], value) for name, value in wanted.items())
    runner.set_adapters([])
    assert torch.equal(runner.run(inputs), before) and places(runner) == memory


@pytest.mark.slow
def test_compiled_blocks_see_the_new_weights_without_compiling_again(case, given, tmp_path, monkeypatch):
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    runner, inputs = case.open(compile=True), case.inputs()
    before, count = runner.run(inputs), len(compiled)
    expected = converted(case, tmp_path, given)
    runner.set_adapters(given)
    assert relative_error(runner.run(inputs), expected.run(inputs)) < BOUND
    runner.set_adapters([])
    assert torch.equal(runner.run(inputs), before) and count == len(compiled) > 0


@pytest.mark.slow
def test_a_picture_by_the_command(tmp_path):
    lora = loras.random_lora(load_file(model_path() / "transformer" / "diffusion_pytorch_model.safetensors"))
    path = loras.write(tmp_path / "lora.safetensors", lora)
    size = dict(min_resolution="64", opt_resolution="64", max_resolution="64", plan=False, progress=False)
    pictures = []
    ways = {"converted": ([(path, 0.3)], []), "set": ([], ["--lora", f"{path}:0.3"]), "none": ([], [])}
    for name, (fused, later) in ways.items():
        convert("tiny", tmp_path / f"{name}_checkpoint", dtype="float32", loras=fused, progress=False)
        build(tmp_path / f"{name}_checkpoint", tmp_path / name, **size)
        options = ["--engine_dir", tmp_path / name, "--output", tmp_path / f"{name}.png", "--num_inference_steps", 2]
        options += ["--backend", "pytorch", "--device", "cpu", *later]
        code, _, err = mmdit("generate", "a red circle", *options)
        assert code == 0, err
        pictures.append(Image.open(tmp_path / f"{name}.png").tobytes())
    # tiny is stored in float16, which float32 represents: the same weights, so the same bits.
    assert pictures[0] == pictures[1] != pictures[2]


# Refusals --------------------------------------------------------------------------------------------


def unchanged_after(runner: MMDiTRunner, inputs, adapters, message: str) -> None:
    before, active = runner.run(inputs), runner.adapters
    with pytest.raises(ValueError, match=message) as error:
        runner.set_adapters(adapters)
    assert "\n" not in str(error.value)
    assert torch.equal(runner.run(inputs), before) and runner.adapters == active


def test_a_lora_that_does_not_fit_changes_nothing(case, given, tmp_path):
    runner, inputs = case.open(), case.inputs()
    other = helpers.case("three-heads-of-8").reference.state_dict()
    wrong = loras.write(tmp_path / "other.safetensors", loras.random_lora(other))
    for before in ([], given):
        runner.set_adapters(before)
        unchanged_after(runner, inputs, [*given, wrong], "expected .*: the LoRA is for a different model")
        unchanged_after(runner, inputs, [tmp_path / "missing.safetensors"], "does not exist and is not a hub id")


def test_generate_refuses_a_lora_before_it_loads_anything(case, tmp_path):
    path = loras.write(tmp_path / "none.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"none\.safetensors: unknown tensor 'transformer.x'"):
        generate("a circle", tmp_path / "no model", case.engine(plan=False), adapters=[path])


def test_an_overflow_halfway_is_undone(case, given, tmp_path):
    """The last layer alone overflows, after all the others were replaced."""
    runner, inputs = case.open("float16"), case.inputs(dtype="float16")
    lora = loras.random_lora(case.reference.state_dict())
    lora["proj_out.lora_B.weight"] *= 1e6
    path = loras.write(tmp_path / "loud.safetensors", lora)
    for before in ([], given):
        runner.set_adapters(before)
        unchanged_after(runner, inputs, [path], "tensor 'proj_out.weight' reaches .* float16 can represent")


def test_the_checkpoint_must_be_the_same_file(case, given, tmp_path):
    checkpoint = Path(shutil.copytree(case.checkpoint(), tmp_path / "checkpoint"))
    engine = build(checkpoint, tmp_path / "engine", plan=False, progress=False)
    runner, inputs = MMDiTRunner.from_engine(engine, **BY_PYTORCH), case.inputs()
    runner.set_adapters(given)
    file = checkpoint / "rank0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    copy = tmp_path / "copy"
    copy.write_bytes(content)
    os.replace(copy, file)  # a new file: the backend maps the old one
    unchanged_after(runner, inputs, given[1:], r"rank0\.safetensors has changed: its sha256")
    shutil.rmtree(checkpoint)
    unchanged_after(runner, inputs, given[1:], "weights are read from the checkpoint 'checkpoint', which is not at")


def test_diffusers_own_calls_say_what_to_do_instead(case):
    with pytest.raises(ValueError, match=r"load LoRAs into an engine with pipe\.transformer\.set_adapters"):
        case.runner().load_lora_adapter({}, prefix="transformer")


# Refitting a plan ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refittable(root, case) -> Path:
    """As `build --refit` would write it, which TensorRT does only on a machine with a GPU."""
    folder = Path(shutil.copytree(case.engine(), root / "refittable"))
    (root / "checkpoint-float32").symlink_to(case.checkpoint())
    config = json.loads((folder / "config.json").read_text())
    config["mmdit_lib"]["plan_options"] = {"refit": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def plan(case, monkeypatch) -> fake_tensorrt.Plan:
    graph = EngineFolder.open(case.engine()).graph(0)
    tensors = {value.name: (value.dtype, value.shape) for value in graph.inputs}
    return fake_tensorrt.install(monkeypatch, tensors | {"output": tensors["hidden_states"]})


def test_a_plan_is_refitted_with_the_fused_weights(case, refittable, given, plan, tmp_path):
    runner = MMDiTRunner.from_engine(refittable, backend="tensorrt", device="cpu")
    runner.run(case.inputs())
    runner.set_adapters(given[1:])
    mlps = [layer for name, layer in constants(case).items() if "ff.net" in name and name.endswith("weight")]
    assert plan.refitted.keys() == {layer.name for layer in mlps}
    expected = converted(case, tmp_path, given[1:]).folder.open_checkpoint().weights()
    for layer in mlps:
        assert torch.equal(plan.refitted[layer.name].flatten(), constant(layer, expected).flatten())
    runner.set_adapters([])
    weights = runner.folder.open_checkpoint().weights()
    assert all(torch.equal(plan.refitted[x.name].flatten(), constant(x, weights).flatten()) for x in mlps)
    assert torch.equal(runner.run(case.inputs()), case.inputs()["hidden_states"])


def constants(case) -> dict:
    """The graph's constants by checkpoint tensor."""
    layers = EngineFolder.open(case.engine()).graph(0).layers
    return {layer.attributes["weight"]: layer for layer in layers if "weight" in layer.attributes}


def test_weights_that_tensorrt_merged_are_given_too(case, refittable, given, plan):
    runner = MMDiTRunner.from_engine(refittable, backend="tensorrt", device="cpu")
    table = constants(case)["pos_embed.pos_embed"]  # a crop of the checkpoint's tensor
    plan.missing = [table.name, "constants/value"]
    runner.set_adapters(given[1:])
    weights = runner.folder.open_checkpoint().weights()
    assert torch.equal(plan.refitted[table.name].flatten(), constant(table, weights).flatten())
    plan.missing = ["unheard of"]
    with pytest.raises(ValueError, match="TensorRT asks for the weights of 'unheard of', which is not in the graph"):
        runner.set_adapters([])


def test_a_refit_that_fails_is_undone(case, refittable, given, plan):
    runner = MMDiTRunner.from_engine(refittable, backend="tensorrt", device="cpu")
    runner.set_adapters(given[1:])
    before = dict(plan.refitted)
    plan.failing = 1
    with pytest.raises(ValueError, match="TensorRT could not refit the plan"):
        runner.set_adapters([(given[1][0], 1.0)])
    assert all(torch.equal(plan.refitted[name], value) for name, value in before.items()) and len(runner.adapters) == 1


def test_a_plan_without_refit(case, given, plan):
    runner = MMDiTRunner.from_engine(case.engine(), backend="tensorrt", device="cpu")
    with pytest.raises(ValueError, match="it was built without --refit: build it again with --refit"):
        runner.set_adapters(given)
    assert plan.refitted == {} and runner.adapters == []
