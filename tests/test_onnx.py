"""`export_onnx`: ONNX Runtime computes what the `pytorch` backend does, from a file that onnx's checker accepts."""

import math
import shutil
import sys
from pathlib import Path

import fp8
import pytest
import torch
from helpers import case, relative_error

from mmdit_lib import MMDiTRunner, build, export_onnx
from mmdit_lib.config import DTYPES
from mmdit_lib.engine.logger import logger
from mmdit_lib.engine.onnx_file import NODES, OPSET
from mmdit_lib.engine.read_network import READERS
from mmdit_lib.network.trt import dtype_name, trt

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def engine(name: str, dtype: str, folder: Path) -> Path:
    """An engine folder of one of the small models, without a plan."""
    model = case(name)
    sides = (f"{side * model.step}" for side in (2, 8, 20))
    sizes = dict(zip(("min_resolution", "opt_resolution", "max_resolution"), sides, strict=True))
    return build(model.checkpoint(dtype), folder, plan=False, progress=False, **sizes)


@pytest.fixture(scope="module", params=["sd3-medium", "sd3.5-medium", "three-heads-of-8"])
def exported(request, tmp_path_factory):
    """(case, engine folder, ONNX folder): with and without QK norm, with dual attention."""
    root = tmp_path_factory.mktemp("onnx")
    folder = engine(request.param, "float32", root / "engine")
    return case(request.param), folder, export_onnx(folder, root / "onnx", progress=False)


def session(folder):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def test_onnxruntime_gives_the_same_output(exported):
    model, engine_dir, folder = exported
    opened, runner = session(folder), MMDiTRunner.from_engine(engine_dir, backend="pytorch", device="cpu")
    for sizes in (dict(patches=(8, 8), tokens=154, batch=2), dict(patches=(4, 10), tokens=77, batch=1)):
        inputs = model.inputs(**sizes)
        (found,) = opened.run(["output"], {name: value.numpy() for name, value in inputs.items()})
        # float32 rounding: the two libraries sum in different orders.
        assert relative_error(torch.from_numpy(found), runner.run(inputs)) <= 5e-6


def test_the_checker_accepts_it(exported):
    model, _, folder = exported
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    loaded = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [x.version for x in loaded.opset_import] == [OPSET]
    weights = [x for x in loaded.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL]
    assert len(weights) == len(model.reference.state_dict())
    assert (folder / "model.onnx").stat().st_size < 2e6
    names = [node.name for node in loaded.graph.node]
    assert len(set(names)) == len(names) and "transformer_blocks.1.attn" in " ".join(names)
    height = loaded.graph.input[0].type.tensor_type.shape.dim[2]
    assert loaded.graph.input[0].name == "hidden_states" and height.dim_param == "height/vae_scale_factor"


@pytest.mark.parametrize("quantized", [None, {}, {"fp8_attention": True}], ids=["", "fp8", "fp8 attention"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorrt_reads_it(tmp_path, dtype, quantized):
    """TensorRT's own ONNX parser, which trtexec and Polygraphy use; ONNX Runtime's CPU has no bfloat16."""
    name = "sd3.5-medium"
    folder = engine(name, dtype, tmp_path / "engine") if quantized is None else fp8.engine(name, dtype, **quantized)
    export_onnx(folder, tmp_path / "onnx", progress=False)
    onnx.checker.check_model(tmp_path / "onnx" / "model.onnx", full_check=True)
    for stored in onnx.load(tmp_path / "onnx" / "model.onnx").graph.initializer:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(stored.data_type).itemsize
        assert not stored.HasField("raw_data") or len(stored.raw_data) == itemsize * math.prod(stored.dims), stored.name
    builder = trt.Builder(logger())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger())
    assert parser.parse_from_file(str(tmp_path / "onnx" / "model.onnx")), parser.get_error(0).desc()
    inputs = {x.name: x for x in map(network.get_input, range(network.num_inputs))}
    assert [*inputs] == ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    assert dtype_name(inputs.pop("timestep").dtype) == "float32"
    assert {dtype_name(x.dtype) for x in (*inputs.values(), network.get_output(0))} == {dtype}
    assert tuple(network.get_output(0).shape) == (-1, 16, -1, -1)


def test_every_layer_type_but_collectives_has_nodes():
    assert READERS.keys() - NODES.keys() == {"CONSTANT", "DIST_COLLECTIVE"}


def refused(words: str, folder: Path, output: Path) -> None:
    with pytest.raises(ValueError, match=words) as error:
        export_onnx(folder, output, progress=False)
    assert "\n" not in str(error.value)


def test_refusals(exported, tmp_path, monkeypatch):
    model, folder, _ = exported
    output = tmp_path / "onnx"
    build(model.checkpoint(), tmp_path / "two", cp_size=2, plan=False, progress=False, max_resolution="128")
    refused("two is for cp 2, and ONNX has no collectives", tmp_path / "two", output)
    with monkeypatch.context() as patch:
        patch.delitem(NODES, "UNARY")
        refused("no ONNX nodes are defined for layers of type UNARY", folder, output)
    with monkeypatch.context() as patch:
        full = shutil.disk_usage(tmp_path)._replace(free=0)
        patch.setattr(shutil, "disk_usage", lambda path: full)
        refused("disk full", folder, output)
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused(r"pip install 'mmdit_lib\[onnx\]'", folder, output)
    assert not output.exists()


def test_only_an_older_export_is_replaced(exported, tmp_path):
    _, folder, first = exported
    export_onnx(folder, tmp_path / "onnx", progress=False)
    export_onnx(folder, tmp_path / "onnx", progress=False)
    assert all((tmp_path / "onnx" / path.name).read_bytes() == path.read_bytes() for path in first.iterdir())
    (tmp_path / "onnx" / "notes.txt").touch()
    refused("contains something other than an exported ONNX model", folder, tmp_path / "onnx")
