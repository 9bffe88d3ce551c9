"""What cannot work with FP8 is refused in one line."""

import json
import shutil
from types import SimpleNamespace

import fp8
import pytest
import torch
from helpers import mmdit
from safetensors.torch import load_file, save_file

from mmdit_lib import Checkpoint, EngineFolder, MMDiTRunner, build, convert, export
from mmdit_lib.checkpoint import calibration, manifest
from mmdit_lib.checkpoint.quantization import LARGEST_SCALE, SMALLEST_SCALE, scale_for
from mmdit_lib.engine.tensorrt_backend import TensorRTBackend, without_fp8

NAME = "sd3-medium"
MODULE = "transformer_blocks.0.attn.to_q"
SCALES = [f"{MODULE}.weights_scaling_factor", f"{MODULE}.activation_scaling_factor"]


def refused(work, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        work()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(fp8.checkpoint(NAME), tmp_path / "checkpoint")


def rewrite(folder, change) -> None:
    """Change tensors of a checkpoint as a program would that knows of no checksums."""
    tensors = load_file(folder / "rank0.safetensors")
    change(tensors)
    save_file(tensors, folder / "rank0.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["mmdit_lib"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5, 0.3, 2.0**16, 2.0**-15])
def test_a_scale_that_is_no_scale(folder, name, value):
    rewrite(folder, lambda tensors: tensors[name].fill_(value))
    words = ("rank0.safetensors: scale", name, "not a power of two")
    refused(lambda: Checkpoint.open(folder).weights(), *words)
    refused(lambda: build(folder, folder.parent / "engine", plan=False, progress=False), *words)
    assert not (folder.parent / "engine").exists()


@pytest.mark.parametrize("name", SCALES)
def test_a_missing_scale(folder, name):
    rewrite(folder, lambda tensors: tensors.pop(name))
    refused(lambda: Checkpoint.open(folder), "missing tensor", name)


def test_a_weight_that_is_not_quantized_after_all(folder):
    name = f"{MODULE}.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].float()}))
    refused(lambda: Checkpoint.open(folder), name, "is F32, its config says float8_e4m3fn")


def test_a_config_that_says_something_else(folder):
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"quant_algo": None}, "unknown tensor"),
        ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "quant_algo FP8_PER_CHANNEL_PER_TOKEN"),
        ({"exclude_modules": None}, "missing tensor"),
        ({"exclude_modules": ["*"]}, "unknown tensor"),
        ({"exclude_modules": 3}, "exclude_modules: Input should be"),
    ):
        changed = config | {"quantization": config["quantization"] | change}
        (folder / "config.json").write_text(json.dumps(changed))
        refused(lambda: Checkpoint.open(folder), words)


def test_an_older_version_does_not_misread_it(monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 1)
    said = "the folder has format 2; this version reads up to 1"
    refused(lambda: Checkpoint.open(fp8.checkpoint(NAME)), said)
    refused(lambda: EngineFolder.open(fp8.engine(NAME)), said)


def test_quantizing_twice(tmp_path):
    refused(
        lambda: convert(fp8.checkpoint(NAME), tmp_path / "out", progress=False), "has neither diffusion_pytorch_model"
    )
    source = shutil.copytree(fp8.pipeline(NAME), tmp_path / "pipeline")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = f"{MODULE}.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    options = dict(quantization="fp8", calibration_prompts=fp8.PROMPTS, progress=False)
    refused(lambda: convert(source, tmp_path / "out", **options), name, "is F8_E4M3; float32, float16, bfloat16 can be")
    assert not (tmp_path / "out").exists()


def test_what_needs_unquantized_weights(tmp_path):
    refused(lambda: export(fp8.checkpoint(NAME), tmp_path / "out"), "is quantized (FP8)", "without --quantization")
    refused(lambda: build(fp8.checkpoint(NAME), builder="trtllm"), "is quantized; use builder tensorrt")
    runner = MMDiTRunner.from_engine(fp8.engine(NAME), backend="pytorch", device="cpu")
    lora = tmp_path / "lora.safetensors"
    module = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{module}.lora_A.weight": torch.ones(2, 64), f"{module}.lora_B.weight": torch.ones(64, 2)}, lora)
    refused(lambda: runner.set_adapters([lora]), "the engine's weights are in FP8", "mmdit convert --lora")
    runner.set_adapters([])
    assert runner.adapters == []


def test_a_gpu_without_fp8(monkeypatch):
    folder = EngineFolder.open(fp8.engine(NAME, "bfloat16", plan=True))
    monkeypatch.setattr("mmdit_lib.engine.tensorrt_backend.plan_runs_here", lambda package, device: None)
    said = {(8, 6): "FP8 needs compute capability 8.9 or later, and this GPU has 8.6", (8, 9): None}
    for capability, words in said.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert TensorRTBackend.refusal(folder, torch.device("cuda")) == words
        plain = SimpleNamespace(quantization=SimpleNamespace(quant_algo=None))
        assert without_fp8(plain, torch.device("cuda")) is None


def test_an_engine_and_a_checkpoint_of_different_kinds(tmp_path):
    engine = shutil.copytree(fp8.engine(NAME), tmp_path / "engine")
    config = json.loads((engine / "config.json").read_text())
    config["pretrained_config"]["quantization"].update(quant_algo=None, exclude_modules=None)
    (engine / "config.json").write_text(json.dumps(config))
    opened = EngineFolder.open(engine)
    refused(
        lambda: opened.open_checkpoint(fp8.checkpoint(NAME)), "has a different quantization from the checkpoint that"
    )


def test_calibration_needs_a_pipeline_and_prompts(tmp_path):
    source = shutil.copytree(fp8.pipeline(NAME), tmp_path / "pipeline")

    def converting(path=source, **options):
        return lambda: convert(path, tmp_path / "out", progress=False, **options)

    some = dict(quantization="fp8", calibration_prompts=["a red circle"])
    refused(converting(quantization="fp8"), "--calibration_prompts TEXT or FILE")
    refused(converting(calibration_prompts=["a"]), "only quantization fp8 needs them")
    refused(converting(quantization="int4"), "quantization int4: use fp8")
    refused(converting(quantization="fp8", calibration_prompts=["", " "]), "give 1 to 4096 prompts, found 0")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    refused(converting(**some | {"calibration_prompts": [str(tmp_path / "picture.png")]}), "is not a text file")
    for path in ("promts.txt", "lists/promts.txt", f"{tmp_path}/promts"):
        refused(converting(**some | {"calibration_prompts": [path]}), f"calibration_prompts: {path} does not exist")
    refused(converting(source / "transformer", **some), "has no model_index.json", "whole pipeline")
    shutil.rmtree(source / "text_encoder")
    refused(converting(**some), "has no text_encoder;")
    index = json.loads((source / "model_index.json").read_text())
    encoders = {f"text_encoder{number}": [None, None] for number in ("", "_2", "_3")}
    (source / "model_index.json").write_text(json.dumps(index | encoders))
    refused(converting(**some), "has no text encoder;")
    assert not (tmp_path / "out").exists()


def test_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    long = "x" * 10_000
    assert calibration.read_prompts([str(file), "three", long], "nowhere") == ["one", "two", "three", long]
    for slash in ("a red/blue circle", f"a red/{long}/blue circle", f"red/{long}/blue", "~a red/blue circle"):
        assert calibration.read_prompts([slash], "nowhere") == [slash]
    (tmp_path / calibration.PROMPTS_FILE).write_text("own\n")
    assert calibration.read_prompts([], str(tmp_path)) == ["own"]


def test_values_that_are_not_finite(tmp_path):
    source = shutil.copytree(fp8.pipeline(NAME), tmp_path / "pipeline")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[f"{MODULE}.bias"][0] = float("nan")
    save_file(tensors, file)
    options = dict(quantization="fp8", calibration_prompts=fp8.PROMPTS[:1], progress=False)
    refused(lambda: convert(source, tmp_path / "out", **options), "the input of '", "contains NaN or infinity")
    assert not (tmp_path / "out").exists()


def test_scales():
    assert scale_for(448.0, "") == 1.0 and scale_for(449.0, "") == 2.0 and scale_for(224.0, "") == 0.5
    assert scale_for(0.0, "") == 1.0 and scale_for(1e-9, "") == SMALLEST_SCALE and scale_for(1e30, "") == LARGEST_SCALE
    for value in (0.05, 0.7, 1.0, 3.0, 57.0):
        assert 224 < value / scale_for(value, "") <= 448
    refused(lambda: scale_for(float("nan"), "x"), "x contains NaN or infinity")


def test_the_command(tmp_path):
    arguments = [
        "convert",
        "--model_path",
        fp8.pipeline(NAME),
        "--output_dir",
        tmp_path / "out",
        "--quantization",
        "fp8",
    ]
    code, _, err = mmdit(*arguments)
    assert code == 1 and err.startswith("mmdit: quantization fp8 needs prompts") and err.count("\n") == 1
    code, out, err = mmdit(
        *arguments, "--calibration_prompts", "a red circle", "--calibration-prompts", "a blue square"
    )
    assert code == 0 and "written" in out and "calibrate on 2 prompts:" in err
    code, out, _ = mmdit("inspect", tmp_path / "out")
    assert code == 0 and "FP8 in 33 linear layers; excluded: time_text_embed.*" in " ".join(out.split())
    assert "2 prompts, 10 steps each" in out
