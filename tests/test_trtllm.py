"""TensorRT-LLM's builder and its engine folders, as far as they go without TensorRT-LLM: a fake `trtllm-build`."""

import json
import sys
from pathlib import Path
from types import ModuleType

import fake_tensorrt
import helpers
import pytest
import torch
from rich.console import Console

from mmdit_lib import EngineFolder, Layout, MMDiTRunner, PlanOptions, build, convert
from mmdit_lib.engine import trtllm
from mmdit_lib.engine.folder import is_engine_folder
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.reports.inspection import describe, inspect

MODEL = helpers.model_config(num_layers=2, sample_size=128, pos_embed_max_size=80)
"""Latents of 128 x 128, as in the published models."""
COMMAND = '''#!{python}
"""Takes trtllm-build's place: records its arguments, and writes a folder with the config.json of the contract."""
import json, pathlib, sys
pathlib.Path({log!r}).write_text(json.dumps(sys.argv[1:]))
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("[TensorRT-LLM] building")
print("a warning", file=sys.stderr)
output = pathlib.Path(flags["--output_dir"])
output.mkdir(exist_ok=True)
pretrained = json.loads(pathlib.Path(flags["--checkpoint_dir"], "config.json").read_text())
plugins = {{"bert_attention_plugin": flags["--bert_attention_plugin"]}}
options = {{"max_batch_size": int(flags["--max_batch_size"]), "plugin_config": plugins}}
for rank in range(pretrained["mapping"]["world_size"] - {lost}):
    (output / f"rank{{rank}}.engine").write_bytes(b"plan %d" % rank)
config = {{"version": "1.2.1", "pretrained_config": pretrained, "build_config": options}}
(output / "config.json").write_text(json.dumps(config))
sys.exit({code})
'''


@pytest.fixture(scope="module")
def transformer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "transformer"
    helpers.random_transformer(MODEL).save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(transformer, tmp_path):
    def make(**options) -> Path:
        options = dict(dtype="float16", progress=False) | options
        return convert(str(transformer), str(tmp_path / "checkpoint"), **options)

    return make


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Put the fake command on PATH; returns a function that gives its arguments."""

    def install(code: int = 0, lost: int = 0):
        (tmp_path / "bin").mkdir()
        script, log = tmp_path / "bin" / "trtllm-build", tmp_path / "arguments.json"
        script.write_text(COMMAND.format(python=sys.executable, log=str(log), code=code, lost=lost))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent))
        return lambda: json.loads(log.read_text())

    return install


@pytest.mark.parametrize(
    ("layout", "plugin"),
    [
        (Layout(), "auto"),
        (Layout(tp_size=2, tp_layout="trtllm"), "auto"),
        (Layout(cp_size=2), "disable"),
        (Layout(tp_size=2, cp_size=2, tp_layout="trtllm"), "disable"),
    ],
    ids=str,
)
def test_the_flags_of_the_contract(checkpoint, command, tmp_path, layout, plugin, capfd):
    arguments = command()
    sizes = dict(tp_size=layout.tp_size, cp_size=layout.cp_size, tp_layout=layout.tp_layout)
    source = checkpoint(**sizes)
    folder = build(source, tmp_path / "engine", builder="trtllm", max_batch_size=4)
    said = capfd.readouterr()
    assert "[TensorRT-LLM] building" in said.out and "a warning" in said.err
    flags = dict(zip(arguments()[::2], arguments()[1::2], strict=True))
    written_to = Path(flags.pop("--output_dir"))
    assert written_to.parent == folder.parent and written_to.name.startswith(".engine.partial")
    assert flags == {
        "--checkpoint_dir": str(source),
        "--max_batch_size": "4",
        "--remove_input_padding": "disable",
        "--bert_attention_plugin": plugin,
    }
    ranks = [f"rank{rank}.engine" for rank in range(layout.world_size)]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", *ranks]
    assert set(EngineFolder.open(folder).files) == set(ranks) and is_engine_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == {"version", "pretrained_config", "build_config", "mmdit_lib"}


def test_what_its_engines_take(checkpoint, command, tmp_path):
    command()
    folder = EngineFolder.open(build(checkpoint(), tmp_path / "engine", builder="trtllm", max_batch_size=4))
    folder.verify()
    assert (folder.builder, folder.tensorrt, folder.dtype) == ("trtllm", "tensorrt_llm 1.2.1", "float16")
    assert folder.open_checkpoint().dtype == "float16"
    inputs = sample_inputs(folder, batch=4)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "hidden_states": (4, 16, 128, 128), "encoder_hidden_states": (4, 333, 40), "pooled_projections": (4, 48),
        "timestep": (4,),
    }  # fmt: skip
    assert {value.dtype for value in inputs.values()} == {torch.float16}
    assert folder.build_config.batches(1) == (1, 2, 4)
    console = Console(width=140)
    with console.capture() as captured:
        console.print(describe(inspect(folder.path)))
    for said in ("tensorrt_llm 1.2.1", "1024x1024 to 1024x1024 pixels", "333 to 333 tokens", "4x16x128x128"):
        assert said in captured.get(), said


def test_running_one_needs_tensorrt_llm(checkpoint, command, tmp_path):
    command()
    engine = build(checkpoint(), tmp_path / "engine", builder="trtllm")
    with pytest.raises(ValueError) as error:
        MMDiTRunner.from_engine(engine)
    said = "built with tensorrt_llm 1.2.1, which is not installed: pip install tensorrt-llm==1.2.1, or conda"
    assert said in str(error.value) and "no graph file" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def tensorrt_llm(monkeypatch):
    """A fake package, and a runtime whose plans have the tensors of the contract."""
    monkeypatch.setitem(sys.modules, "tensorrt_llm", ModuleType("tensorrt_llm"))
    monkeypatch.setattr(trtllm, "version_of", lambda package: {"tensorrt_llm": "1.2.1"}[package])
    tensors = {
        "hidden_states": ("float16", (-1, 16, 128, 128)),
        "encoder_hidden_states": ("float16", (-1, 333, 40)),
        "pooled_projections": ("float16", (-1, 48)),
        "timestep": ("float16", (-1,)),
        "output": ("float16", (-1, 16, 128, 128)),
    }
    return fake_tensorrt.install(monkeypatch, tensors)


def test_a_step(checkpoint, command, tmp_path, tensorrt_llm):
    command()
    engine = build(checkpoint(), tmp_path / "engine", builder="trtllm")
    runner = MMDiTRunner.from_engine(engine, device="cpu")
    assert runner.backend.name == "tensorrt" and tensorrt_llm.deserialized == [b"plan 0"]
    inputs = sample_inputs(runner.folder, batch=2) | {"timestep": torch.tensor([998.1, 3.0])}
    assert torch.equal(runner.run(inputs), inputs["hidden_states"])
    assert torch.equal(tensorrt_llm.seen["timestep"], torch.tensor([998.0, 3.0], dtype=torch.float16))
    assert torch.equal(tensorrt_llm.seen["encoder_hidden_states"], inputs["encoder_hidden_states"])
    with pytest.raises(ValueError, match="height 512 is outside the engine's 1024 to 1024 pixels"):
        runner.run(inputs | {"hidden_states": torch.zeros(2, 16, 64, 64)})
    with pytest.raises(ValueError, match="77 text tokens are outside the engine's 333 to 333"):
        runner.run(inputs | {"encoder_hidden_states": torch.zeros(2, 77, 40)})


def test_a_folder_that_only_tensorrt_llm_wrote_runs_only_if_trusted(checkpoint, command, tmp_path, tensorrt_llm):
    command()
    engine = build(checkpoint(), tmp_path / "engine", builder="trtllm")
    config = json.loads((engine / "config.json").read_text())
    del config["mmdit_lib"]
    (engine / "config.json").write_text(json.dumps(config))
    folder = EngineFolder.open(engine)
    assert folder.files == {} and folder.checkpoint is None and is_engine_folder(engine)
    with pytest.raises(ValueError, match="does not say which checkpoint it was built from"):
        folder.open_checkpoint()
    inspect(engine)
    with pytest.raises(ValueError, match=r"config\.json has no checksum of rank0\.engine; a plan is code: --trust"):
        MMDiTRunner.from_engine(engine, device="cpu")
    assert tensorrt_llm.deserialized == []
    MMDiTRunner.from_engine(engine, device="cpu", trust=True)
    assert tensorrt_llm.deserialized == [b"plan 0"]


@pytest.mark.parametrize(
    ("converted", "options", "words"),
    [
        (dict(tp_size=2), {}, "the 2 tp ranks of .* are sharded as megatron; convert with --tp_layout trtllm"),
        (dict(cfg_size=2), {}, "TensorRT-LLM has no CFG parallelism"),
        ({}, dict(cp_size=2), "^cp_size: not an option of builder trtllm, which takes max_batch_size only"),
        ({}, dict(max_text_tokens=333), "^max_text_tokens: not an option of builder trtllm"),
        ({}, dict(plan=False), "^plan: not an option of builder trtllm"),
        ({}, dict(plan_options=PlanOptions(refit=True)), "^refit: not an option of builder trtllm"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_it_cannot_build_is_refused_before_it_starts(checkpoint, command, tmp_path, converted, options, words):
    arguments = command()
    with pytest.raises(ValueError, match=words) as error:
        build(checkpoint(**converted), tmp_path / "engine", builder="trtllm", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "engine").exists()
    with pytest.raises(FileNotFoundError):
        arguments()


def test_the_command_is_missing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"trtllm-build is not on PATH; pip install tensorrt-llm==1\.2\.1, or"):
        build(checkpoint(), tmp_path / "engine", builder="trtllm")


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (dict(code=3), "trtllm-build failed with exit code 3; its output is above"),
        (dict(lost=1), r"trtllm-build wrote no rank0\.engine; its output is above"),
    ],
)
def test_a_failed_build_leaves_nothing(checkpoint, command, tmp_path, faults, words):
    command(**faults)
    with pytest.raises(ValueError, match=words):
        build(checkpoint(), tmp_path / "place" / "engine", builder="trtllm")
    assert list((tmp_path / "place").iterdir()) == []
