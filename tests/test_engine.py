"""Building: its output, its errors, and that incomplete output is never accepted."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

from mmdit_lib.config import BuildConfig, Resolution
from mmdit_lib.engine import build as build_module
from mmdit_lib.engine import logger
from mmdit_lib.engine.build import build, default_resolutions
from mmdit_lib.engine.folder import EngineFolder, graph_file, is_engine_folder, plan_file
from mmdit_lib.engine.graph import Graph
from mmdit_lib.network.trt import installed

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def case() -> helpers.Case:
    return helpers.case("sd3.5-medium")


def quick(case, output, **options) -> Path:
    """A small plan, or with `plan=False` only the graph."""
    return build(str(case.checkpoint()), str(output), progress=False, **options)


def test_contract(case):
    """File names and config keys as TensorRT-LLM's users know them."""
    folder = case.engine()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "rank0.engine", "rank0.graph.json"]
    config = json.loads((folder / "config.json").read_text())
    assert {"version", "pretrained_config", "build_config"} <= set(config) and len(config) == 4
    assert config["pretrained_config"]["architecture"] == "SD3Transformer2DModel"
    assert config["build_config"]["max_batch_size"] == 3
    own = config["mmdit_lib"]
    assert own["tensorrt"] == installed() and own["report"][0]["peak_rss_bytes"] > 0
    written = json.loads((case.checkpoint() / "config.json").read_text())["mmdit_lib"]["files"]
    assert own["checkpoint"] == {"name": "checkpoint-float32", "path": "../checkpoint-float32", "files": written}
    EngineFolder.open(folder).verify()


def test_a_graph_file_is_flushed_to_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}")))
    Graph(inputs=(), outputs=(), layers=(), modules={}).save(tmp_path / "graph.json")
    assert flushed == [str(tmp_path.resolve() / "graph.json")]


def test_graph_file_roundtrip(case, tmp_path):
    graph = EngineFolder.open(case.engine()).graph(0)
    graph.save(tmp_path / "again.json")
    assert Graph.load(tmp_path / "again.json") == graph
    assert (tmp_path / "again.json").read_bytes() == (case.engine() / graph_file(0)).read_bytes()
    assert [v.name for v in graph.inputs] == [
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
    ]
    assert graph.weights() == set(case.runner().folder.open_checkpoint().weights())
    assert (case.engine() / graph_file(0)).stat().st_size < 1_000_000, "weights are named, not stored"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"format_version": 1}', "not a graph file: inputs: Field required; outputs: Field required"),
        ('{"format_version": 99}', "has format 99; this version reads 1"),
    ],
)
def test_damaged_graph_files_are_refused(tmp_path, text, words):
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        Graph.load(tmp_path / "g.json")


def test_two_builds_make_the_same_graph(case, tmp_path):
    quick(case, tmp_path / "a", plan=False)
    quick(case, tmp_path / "b", plan=False)
    assert (tmp_path / "a" / graph_file(0)).read_bytes() == (tmp_path / "b" / graph_file(0)).read_bytes()
    assert EngineFolder.open(tmp_path / "a").tensorrt is None


def test_default_profile(case):
    assert default_resolutions(case.config, 8) == tuple(Resolution(height=n, width=n) for n in (32, 128, 192))
    folder = EngineFolder.open(quick(case, case.root / "default", plan=False))
    assert (
        folder.build_config.min_text_tokens,
        folder.build_config.opt_text_tokens,
        folder.build_config.max_text_tokens,
    ) == (77, 333, 589)
    assert folder.build_config.batches(1) == (1, 1, 2) and folder.build_config.batches(2) == (2, 2, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(opt_resolution="120x130"), "resolution 120x130: height and width must be multiples of 16 pixels"),
        (dict(max_resolution="4096"), "resolution 4096x4096: the position table covers at most 768 pixels"),
        (dict(min_resolution="256", opt_resolution="128"), "min_resolution 256x256 must not exceed opt_resolution 128"),
        (dict(opt_resolution="512"), "build options: opt_resolution 512x512 must not exceed max_resolution 192x192"),
        (dict(opt_resolution="64x208"), "opt_resolution 64x208 must not exceed max_resolution 192x192 on either side"),
        (dict(opt_resolution="0"), "resolution '0': give HEIGHTxWIDTH in pixels"),
        (dict(opt_resolution="12ax5"), "resolution '12ax5': give HEIGHTxWIDTH in pixels"),
        (dict(max_text_tokens=200), "build options: opt_text_tokens 333 must not exceed max_text_tokens 200"),
        (dict(max_batch_size=0), "max_batch_size"),
        (dict(max_batch_size=3, cfg_size=2), "max_batch_size 3 must be even"),
        (dict(max_batch_size=4, opt_batch_size=1, cfg_size=2), "opt_batch_size 1 must be even"),
        (dict(cfg_size=3), "cfg_size"),
        (dict(cp_size=0), "cp_size"),
        (dict(cfg_size=0), "cfg_size"),
        (dict(cp_size=3, cp_method="ulysses"), "4 heads of a tp rank are not divisible by cp_size=3; use 1, 2 or 4"),
        (dict(compute_capability=("6.1",)), "compute_capability 6.1: use "),
    ],
)
def test_refused_before_anything_is_written(case, tmp_path, options, words):
    with pytest.raises(ValueError) as error:
        quick(case, tmp_path / "place" / "engine", **options)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "place").exists() or os.listdir(tmp_path / "place") == []


def test_refused_folders(case, tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        build(str(tmp_path), str(tmp_path / "engine"), progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="contains something other than an engine folder"):
        quick(case, tmp_path / "mine", plan=False)
    with pytest.raises(ValueError, match="is not an engine folder"):
        EngineFolder.open(case.checkpoint().parent)
    with pytest.raises(ValueError, match=r"is a checkpoint folder; .*: mmdit build --checkpoint_dir ") as error:
        EngineFolder.open(case.checkpoint())
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is an engine folder, not a checkpoint"):
        build(str(case.engine()), str(tmp_path / "engine"), progress=False)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"mmdit_lib": {}}', '{"pretrained_config": {}}'])
def test_a_users_config_is_not_deleted(case, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="contains something other than an engine folder"):
        quick(case, tmp_path, plan=False)
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize(
    ("names", "keys", "known"),
    [
        (["rank0.engine"], ["version", "pretrained_config", "build_config"], True),  # TensorRT-LLM's
        (["rank0.graph.json"], ["pretrained_config", "build_config", "mmdit_lib"], True),
        ([], ["pretrained_config", "build_config"], False),
        (["rank0.engine"], ["pretrained_config"], False),
        (["rank0.engine", "notes.txt"], ["pretrained_config", "build_config", "mmdit_lib"], False),
        (["ranking.engine"], ["pretrained_config", "build_config", "mmdit_lib"], False),
    ],
)
def test_what_may_be_replaced(tmp_path, names, keys, known):
    (tmp_path / "config.json").write_text(json.dumps({key: {} for key in keys}))
    for name in names:
        (tmp_path / name).touch()
    assert is_engine_folder(tmp_path) == known


def test_a_checkpoint_that_changed_is_not_built(case, tmp_path):
    checkpoint = Path(shutil.copytree(case.checkpoint(), tmp_path / "checkpoint"))
    path = checkpoint / "rank0.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank0\.safetensors has changed: its sha256 is "):
        build(str(checkpoint), str(tmp_path / "engine"), plan=False, progress=False)
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.slow
def test_cfg_parallel_plan_of_six_rows(case, tmp_path):
    """The optimal batch is even too: half of six is not, and TensorRT would reject the profile."""
    options = dict(max_batch_size=6, cfg_size=2, min_resolution="32", opt_resolution="32", max_resolution="32")
    folder = EngineFolder.open(quick(case, tmp_path / "engine", **options))
    assert folder.build_config.batches(2) == (2, 4, 6)
    folder.verify(plan_file(0), plan_file(1))


def test_tensorrt_refuses(case, tmp_path, monkeypatch):
    """If TensorRT cannot build a network, the reason is shown in one line and no folder remains."""
    monkeypatch.setattr(build_module, "profile_shapes", lambda *a: {"hidden_states": [(1, 16, 4, 4)] * 3})
    with pytest.raises(ValueError, match="TensorRT built no plan for rank 0: ") as error:
        quick(case, tmp_path / "place" / "engine")
    assert "\n" not in str(error.value) and os.listdir(tmp_path / "place") == []


def test_an_earlier_builds_error_is_not_told_again(case, tmp_path):
    logger.logger().errors.append("an earlier build's")
    quick(case, tmp_path / "engine", plan=False)
    assert logger.logger().last_error() == "no error was logged"


@pytest.mark.slow
def test_full_disk(case, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for the graph file (0.2 MB), not for the plan (10 MB).
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs privileges")
    try:
        with pytest.raises(ValueError, match="disk full: no room for engine in ") as error:
            quick(case, disk / "engine")
        assert "\n" not in str(error.value) and list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


KILLED = """
import os, signal, sys
from mmdit_lib.engine import build as module, logger

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "planning":
    count = 0
    def update(self, n=1):
        global count
        count += 1
        count < 5 or die()
    logger.tqdm.update = update
else:
    sync = os.fsync  # the plan's bytes are written, not yet on disk
    os.fsync = lambda file: die() if os.readlink(f"/proc/self/fd/{file}").endswith(".engine") else sync(file)
module.build(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["planning", "writing"])
def test_kill_9(case, tmp_path, when):
    output = tmp_path / "place" / "engine"
    command = [sys.executable, "-c", KILLED, case.checkpoint(), output, when]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    partial = output.parent / ".engine.partial"
    assert sorted(os.listdir(output.parent)) == [".engine.lock", ".engine.partial"]
    assert (partial / plan_file(0)).exists() == (when == "writing")
    for folder in (output, partial):
        with pytest.raises(ValueError, match="is not an engine folder"):
            EngineFolder.open(folder)
    EngineFolder.open(quick(case, output, plan=False)).verify()
    assert os.listdir(output.parent) == ["engine"]  # the dead process's files are gone


def test_an_older_folder_stays_until_the_new_one_is_complete(case, tmp_path, monkeypatch):
    output = quick(case, tmp_path / "place" / "engine", plan=False)
    before = (output / "config.json").read_bytes()

    def ctrl_c(self, n=1):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(logger.tqdm, "update", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            quick(case, output)
    assert (output / "config.json").read_bytes() == before and os.listdir(output.parent) == ["engine"]
    quick(case, output, plan=False, max_batch_size=4)
    assert EngineFolder.open(output).build_config.max_batch_size == 4


@pytest.mark.parametrize("name", [plan_file(0), graph_file(0)])
def test_a_file_that_changed_is_noticed(case, tmp_path, name):
    folder = tmp_path / "engine"
    shutil.copytree(case.engine(), folder)
    EngineFolder.open(folder).verify()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} has changed: its sha256 is "):
        EngineFolder.open(folder).verify(name)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=f"{name} has changed: expected {len(content)} bytes, found {len(content) - 1}"
    ):
        EngineFolder.open(folder).verify()
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        EngineFolder.open(folder).verify()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("mmdit_lib"), "mmdit_lib: Field required"),
        (lambda c: c["mmdit_lib"].update(format_version=99), "has format 99; this version reads up to 3"),
        (lambda c: c["pretrained_config"].update(num_layers="many"), "num_layers"),
        (lambda c: c["build_config"].update(max_batch_size=0), "max_batch_size"),
        (lambda c: c.update(build_config=[]), "build_config: Input should be .*, found \\[\\]"),
        (lambda c: c.update(pretrained_config=None), "pretrained_config: Input should be .*, found None"),
        (lambda c: c.update(mmdit_lib=3), "mmdit_lib: Input should be .*, found 3"),
        (
            lambda c: c["mmdit_lib"].update(format_version="1"),
            "format_version: Input should be a valid integer, found '1'",
        ),
        (lambda c: c["mmdit_lib"].update(files=[]), "mmdit_lib.files: Input should be .*, found \\[\\]"),
        (
            lambda c: c["mmdit_lib"].update(checkpoint="there"),
            "mmdit_lib.checkpoint: Input should be .*, found 'there'",
        ),
        (lambda c: c["pretrained_config"].update(mapping=[1, 1]), "mapping: Input should be .*, found \\[1, 1\\]"),
        (lambda c: c["pretrained_config"].update(dtype=None), "dtype: Input should be .*, found None"),
    ],
)
def test_damaged_configs_are_refused(case, tmp_path, change, words):
    config = json.loads((case.engine() / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words) as error:
        EngineFolder.open(tmp_path)
    assert "\n" not in str(error.value)


def test_build_config_is_frozen():
    config = BuildConfig(
        max_batch_size=2, **{f"{k}_resolution": Resolution(height=64, width=64) for k in ("min", "opt", "max")}
    )
    with pytest.raises(ValueError, match="frozen"):
        config.max_batch_size = 3
