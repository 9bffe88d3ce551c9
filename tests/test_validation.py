"""What is read from a file is data: checked in full before anything is allocated, computed or generated from it."""

import json
import shutil
import time
from pathlib import Path

import helpers
import pytest

from mmdit_lib import Checkpoint, EngineFolder, MMDiTRunner, build, convert
from mmdit_lib.config import RankMapping
from mmdit_lib.engine.folder import graph_file
from mmdit_lib.engine.rehearsal import rehearse
from mmdit_lib.files import read_json
from mmdit_lib.files.records import FileRecord
from mmdit_lib.reports.inspection import inspect

HUGE = 10**12


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A source, a checkpoint and an engine folder without a plan."""
    root = tmp_path_factory.mktemp("made")
    helpers.tiny_model().save_pretrained(root / "source")
    convert(root / "source", root / "checkpoint", progress=False)
    build(root / "checkpoint", root / "engine", plan=False, progress=False)
    return root


@pytest.fixture
def root(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def edit(path: Path, *keys: str, value) -> None:
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


def refused(function, *words: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        function()
    assert type(error.value) is ValueError and str(error.value).isprintable(), repr(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert time.process_time() - start < 5  # it took minutes when lists were made before anything was checked


SIZES = ("num_layers", "num_attention_heads", "pos_embed_max_size", "sample_size", "joint_attention_dim", "patch_size")


@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_no_memory_could_hold(root, key):
    edit(root / "source" / "config.json", key, value=HUGE)
    edit(root / "checkpoint" / "config.json", key, value=HUGE)
    edit(root / "engine" / "config.json", "pretrained_config", key, value=HUGE)
    words = ("config.json", f"{key}: Input should be less than or equal to", f"found {HUGE}")
    refused(lambda: convert(root / "source", root / "out", progress=False), *words)
    refused(lambda: Checkpoint.open(root / "checkpoint"), *words)
    refused(lambda: EngineFolder.open(root / "engine"), *words)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("mapping", "cp_size"), HUGE, "mapping: cp_size: Input should be less than or equal to 4096, found"),
        (("mapping", "tp_size"), "2", "mapping.tp_size: Input should be a valid integer, found '2'"),
        (("dtype",), "float64", "dtype float64"),
        (("architecture",), ["a"], "architecture: Input should be a valid string, found ['a']"),
        (("quantization",), 3, "quantization: Input should be"),
        (("model_path",), {"a": 1}, "model_path: Input should be a valid string, found {'a': 1}"),
        (("dual_attention_layers",), list(range(10**5)), "dual_attention_layers: Tuple should have at most 512 items"),
        (("mmdit_lib", "format_version"), 0, "format_version: Input should be greater than or equal to 1, found 0"),
        (("mmdit_lib", "cfg_size"), 3, "mmdit_lib.cfg_size: Input should be 1 or 2, found 3"),
        (("mmdit_lib", "vae_scale_factor"), 0, "vae_scale_factor: Input should be greater than or equal to 1"),
        (("mmdit_lib", "source"), "a\nb", "mmdit_lib.source: String should match pattern"),
        (("mmdit_lib", "versions"), [], "mmdit_lib.versions: Input should be"),
        (("mmdit_lib", "files"), {}, "mmdit_lib.files: expected records of rank0.safetensors, found []"),
        (("mmdit_lib", "files", "rank0.safetensors"), None, "files.rank0.safetensors: Input should be"),
        (("mmdit_lib", "files", "rank0.safetensors", "bytes"), -1, "rank0.safetensors.bytes: Input should be greater"),
        (("mmdit_lib", "files", "rank0.safetensors", "sha256"), "0", "sha256: String should match pattern"),
        (("mmdit_lib", "files", "../x"), {"bytes": 1, "sha256": "0" * 64}, "String should match pattern"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_checkpoint_configs(root, keys, value, words):
    path = root / "checkpoint" / "config.json"
    edit(path, *keys, value=value)
    refused(lambda: Checkpoint.open(path.parent), str(path.parent), words)
    refused(lambda: inspect(path.parent), words)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("build_config", "max_text_tokens"), HUGE, "max_text_tokens: Input should be less than or equal to 65536"),
        (("build_config", "max_resolution", "height"), HUGE, "max_resolution.height: Input should be less than"),
        (("build_config", "max_resolution", "height"), 8192, "the position table covers at most 192 pixels"),
        (("build_config", "cp_method"), None, "build_config.cp_method: Input should be 'allgather' or 'ulysses'"),
        (("mmdit_lib", "report"), {}, "mmdit_lib.report: Input should be"),
        (("mmdit_lib", "report"), [{}], "mmdit_lib.report.0.rank: Field required"),
        (("mmdit_lib", "tensorrt"), 11, "mmdit_lib.tensorrt: Input should be a valid string, found 11"),
        (("mmdit_lib", "cfg_size"), 2, "mmdit_lib.files: no record of rank1.graph.json among ['rank0.graph.json']"),
        (("mmdit_lib", "checkpoint", "files"), {}, "mmdit_lib.checkpoint.files: no record of rank0.safetensors"),
        (("mmdit_lib", "checkpoint", "path"), 3, "mmdit_lib.checkpoint.path: Input should be a valid string"),
        (("pretrained_config", "dtype"), "int8", "dtype int8"),
        (("pretrained_config", "mapping", "tp_size"), 3, "4 heads are not divisible by tp_size=3"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_engine_configs(root, keys, value, words):
    path = root / "engine" / "config.json"
    edit(path, *keys, value=value)
    refused(lambda: EngineFolder.open(path.parent), str(path.parent), words)


def test_an_engine_of_another_model(root):
    edit(root / "engine" / "config.json", "pretrained_config", "sample_size", value=16)
    engine = EngineFolder.open(root / "engine")
    refused(engine.open_checkpoint, "has a different model or dtype from the checkpoint that")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 10**5 + "]" * 10**5, "nested more than 32 levels deep"),
        ("[" * 40 + "]" * 40, "nested more than 32 levels deep"),
        ('{"a": 1, "a": 2}', "a key occurs twice"),
        ('{"a": Infinity}', "Infinity is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ('{"a": "' + "x" * (1 << 25) + '"}', "the limit is 33554432"),
        ("\ufeff{}", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
    ],
    ids=["deep", "nested", "twice", "infinity", "digits", "long", "mark", "utf-16"],
)
def test_json_that_is_not_read(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: read_json(path), str(path), words)


# Source files ----------------------------------------------------------------------------------------


def with_header(path: Path, change) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


BIAS = "proj_out.bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h[BIAS].update(shape=[HUGE, 0]), f"{BIAS}.shape.1: Input should be greater than or equal to"),
        (lambda h: h[BIAS].update(shape=[HUGE]), f"'{BIAS}' has 256 bytes for F32 of shape [{HUGE}]"),
        (lambda h: h[BIAS].update(shape=[64.0]), f"{BIAS}.shape.0: Input should be a valid integer, found 64.0"),
        (lambda h: h[BIAS].update(dtype="F33"), f"'{BIAS}' has dtype 'F33', which is not a safetensors dtype"),
        (lambda h: h[BIAS].update(data_offsets=[0]), f"{BIAS}.data_offsets.1: Field required"),
        (lambda h: h[BIAS].update(data_offsets=[0, 256]), "gaps are not allowed"),
        (lambda h: h.update({BIAS: 7}), f"{BIAS}: Input should be"),
        (lambda h: h.update(__metadata__={"format": 3}), "format: Input should be a valid string, found 3"),
    ],
    ids=["empty", "large", "float", "dtype", "offset", "overlap", "entry", "metadata"],
)  # fmt: skip
def test_headers(root, change, words):
    path = root / "source" / "diffusion_pytorch_model.safetensors"
    with_header(path, change)
    refused(lambda: convert(root / "source", root / "out", progress=False), str(path), words)


def test_an_index_does_not_lead_out_of_its_folder(root):
    index = root / "source" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {BIAS: "../checkpoint/rank0.safetensors"}}))
    refused(lambda: convert(root / "source", root / "out", progress=False), "index.json", BIAS, "'../checkpoint/rank0")
    index.write_text(json.dumps({"weight_map": {}}))
    refused(
        lambda: convert(root / "source", root / "out", progress=False), "weight_map: Dictionary should have at least"
    )


def test_a_vae_of_impossible_depth(root):
    (root / "vae").mkdir()
    (root / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [1] * 1000}))
    refused(lambda: convert(root / "source", root / "out", progress=False), "vae/config.json", "at most 9 items")


# Graph files -----------------------------------------------------------------------------------------


def changed_graph(root: Path, change) -> None:
    """Change the graph file and record its new checksum, as whoever made the folder could."""
    path = root / "engine" / graph_file(0)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    record = FileRecord.of(path)
    entry = {"sha256": record.sha256, "bytes": record.nbytes}
    edit(root / "engine" / "config.json", "mmdit_lib", "files", path.name, value=entry)


def layer(content: dict, kind: str, attribute: str = "") -> dict:
    """The last layer of this type on tensors (not on sizes), with this attribute."""
    layers = [x for x in content["layers"] if x["type"] == kind and x["output"]["dtype"] != "int64"]
    return [x for x in layers if not attribute or attribute in x["attributes"]][-1]


def attributes(kind: str, **values):
    """Changes attributes of a layer of this type that has the first of them."""
    return lambda content: layer(content, kind, next(iter(values)))["attributes"].update(values)


HOSTILE = "x=__import__('pathlib').Path('hacked').touch(), b"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # torch.fx writes names of inputs and of keyword arguments into the code that it generates and runs.
        (lambda c: layer(c, "ELEMENTWISE")["attributes"].update({HOSTILE: 1}), "attributes.x=__import__"),
        (lambda c: c["inputs"][0].update(name=HOSTILE), "reads 'hidden_states', which no earlier layer produces"),
        (lambda c: c["inputs"].append({"name": HOSTILE, "dtype": "float32", "shape": [1]}), "the model's inputs are"),
        (attributes("ELEMENTWISE", op="SUM", extra=1), "TypeError: elementwise() got an unexpected"),
        (lambda c: layer(c, "REDUCE").update(attributes={}), "TypeError: reduce() missing 3 required"),
        (attributes("ELEMENTWISE", op="POW"), "the pytorch backend does not support ELEMENTWISE with POW"),
        (lambda c: layer(c, "UNARY").update(type="PLUGIN_V3"), "no operator for layers of type PLUGIN_V3"),
        (lambda c: layer(c, "UNARY").update(type="SILU", attributes={}), "only graph passes insert them"),
        (attributes("CONVOLUTION", num_groups=HUGE), "of type 'CONVOLUTION': "),
        (attributes("CONSTANT", weight="no.such"), "KeyError: 'no.such'"),
        (attributes("CONSTANT", weight=BIAS, shape=[HUGE]), "of type 'CONSTANT': RuntimeError: "),
        (attributes("CONCATENATION", axis="0"), "of type 'CONCATENATION': "),
        (lambda c: c["layers"].append(layer(c, "UNARY")), "is produced twice"),
        (lambda c: c["layers"].pop(), "no layer produces"),
        (lambda c: c.update(outputs=["proj_out"]), "output ('proj_out',), expected output"),
        (lambda c: layer(c, "MATRIX_MULTIPLY")["output"].update(shape=[-1, 7]), "but the file declares"),
        (lambda c: layer(c, "UNARY")["output"].update(dtype="float8"), "dtype: Input should be 'float32'"),
        (lambda c: c.update(layers={}), "is not a graph file: layers: Input should be"),
    ],
)  # fmt: skip
def test_graph_files(root, change, words, monkeypatch):
    monkeypatch.chdir(root)
    changed_graph(root, change)
    for verify in (True, False):
        options = dict(backend="pytorch", device="cpu", verify=verify)
        refused(lambda options=options: MMDiTRunner.from_engine(root / "engine", **options), graph_file(0), words)
    refused(lambda: inspect(root / "engine"), graph_file(0), words)
    assert not (root / "hacked").exists()


@pytest.mark.parametrize(
    "options",
    [
        dict(cp_size=2, cfg_size=2),
        dict(cp_size=4, cp_method="ulysses"),
        dict(tp_size=2, cp_size=2, cp_method="ulysses", dtype="float16"),
        dict(tp_size=2, cfg_size=2, tp_layout="trtllm", dtype="bfloat16"),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_every_rank_of_a_sound_folder_passes(made, tmp_path, options):
    """The rehearsal knows the shapes that collectives give."""
    converted = {key: options.pop(key) for key in ("tp_size", "tp_layout", "dtype") if key in options}
    convert(made / "source", tmp_path / "checkpoint", progress=False, **converted)
    engine = EngineFolder.open(
        build(tmp_path / "checkpoint", tmp_path / "engine", plan=False, progress=False, **options)
    )
    for mapping in engine.layout.ranks():
        weights = engine.open_checkpoint().weights(mapping.tp_rank)
        rehearse(engine, engine.graph(mapping.rank), weights, mapping, engine.path)
    alone = RankMapping()
    refused(lambda: rehearse(engine, engine.graph(mapping.rank), weights, alone, engine.path), "has no group")


def test_a_result_of_unbounded_size(root):
    """A slice that pads to 10^12 rows: every operator would accept it."""

    def pad(content):
        x = layer(content, "SLICE")
        rows = {"name": "rows", "type": "CONSTANT", "inputs": [], "attributes": {"values": [HUGE]}}
        start = rows | {"name": "start", "attributes": {"values": [0]}}
        before = [y | {"output": {"name": y["name"], "dtype": "int64", "shape": [1]}} for y in (start, rows)]
        x["inputs"] = [content["inputs"][0]["name"], "start", "rows"]
        x["attributes"] |= {"axes": [0], "mode": "FILL"}
        x["output"] |= {"dtype": "float32", "shape": [-1, 16, -1, -1]}
        content["layers"] = before + content["layers"]

    changed_graph(root, pad)
    refused(lambda: MMDiTRunner.from_engine(root / "engine", backend="pytorch"), "times the inputs and weights")


def test_skipping_checksums_skips_nothing_else(root):
    """A changed weight is then used; a changed structure is not."""
    path = root / "checkpoint" / "rank0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    options = dict(backend="pytorch", device="cpu")
    refused(lambda: MMDiTRunner.from_engine(root / "engine", **options), "rank0.safetensors has changed: its sha256")
    MMDiTRunner.from_engine(root / "engine", **options, verify=False)
    path.write_bytes(data[:-4])
    refused(lambda: MMDiTRunner.from_engine(root / "engine", **options, verify=False), "expected", "bytes, found")
