"""Every graph pass: it rewrites what it should, keeps the numbers, and leaves blocks of one kind equal.

Tolerances as in test_network: float32 5e-6 of the norm; in float16 ten units in the last place (9.8e-4).
"""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import MODELS, case, relative_error

from mmdit_lib.engine.graph import Layer, Value
from mmdit_lib.engine.lowering import lower, placed_weights
from mmdit_lib.engine.outline import outline_blocks
from mmdit_lib.engine.passes import NUMERICS, SPEED, apply, gated_sum, linear, modulate, rms_norm
from mmdit_lib.engine.precision import without_tf32
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.parity import all_ok, compare, verdict

LIMITS = {"float32": 5e-6, "float16": 1e-2}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("count", range(1, len(SPEED) + 1), ids=[one.__name__ for one in SPEED])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_kept(name, count, dtype):
    c = case(name)
    runner, inputs = c.runner(dtype), c.inputs(dtype=dtype, patches=(5, 7), tokens=97)
    weights = runner.folder.open_checkpoint(verify=False).weights()
    backend = PyTorchBackend(runner.backend.graph, weights, passes=NUMERICS + SPEED[:count])
    assert relative_error(backend(inputs), runner.run(inputs)) <= LIMITS[dtype]


def types(layers) -> Counter:
    return Counter(layer.type for layer in layers)


def test_what_is_left_of_a_network():
    """Three blocks, two of them dual, the last without a text MLP: five attentions with four kinds of input."""
    graph = case("sd3.5-medium").runner().backend.graph
    layers = apply(graph, NUMERICS + SPEED)
    before, after = types(apply(graph, NUMERICS)), types(layers)
    assert after["LINEAR_GELU"] == 5 and "GELU_TANH" not in {layer.attributes.get("kind") for layer in layers}
    assert after["RMS_NORM"] == 3 * 4 + 2 * 2 and after["REDUCE"] == 0
    # Modulated: image three times for attention, twice for the second, three for the MLP; text; norm_out.
    assert after["MODULATE"] == 3 + 2 + 3 + 3 + 2 + 1
    assert after["GATED_SUM"] == 3 + 2 + 3 + 2 + 2
    assert before["SILU"] == 9 and after["SILU"] == 3  # of temb, and one in each of its embedders
    # Q, K and V of each stream are one; all modulations are one.
    assert before["LINEAR"] - after["LINEAR"] == 8 * 2 + 6 + 5
    assert len(layers) < 0.7 * len(apply(graph, NUMERICS))


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_one_kind_stay_equal(name):
    c = case(name)
    graph, weights = c.runner().backend.graph, c.runner().folder.open_checkpoint(verify=False).weights()

    def kinds(passes) -> int:
        return len(list(outline_blocks(lower(graph, weights, passes=passes), "transformer_blocks").children()))

    assert kinds(NUMERICS + SPEED) <= kinds(NUMERICS)


def test_intermediates_come_from_the_same_weights():
    c = case("sd3.5-medium")
    runner, inputs = c.open(), c.inputs()
    plain = runner.intermediates(inputs)
    weights = runner.folder.open_checkpoint(verify=False).weights()
    runner.backend = backend = PyTorchBackend(runner.backend.graph, weights, passes=NUMERICS + SPEED)
    found = runner.intermediates(inputs)
    assert found.keys() == plain.keys()
    assert torch.equal(found["output"], runner.run(inputs))
    assert all(torch.equal(found[name], value) for name, value in plain.items() if name != "output")
    placed, storages = (
        placed_weights(backend.module),
        {b.untyped_storage().data_ptr() for b in backend.module.buffers()},
    )
    assert set(weights) - set(placed) == {"pos_embed.pos_embed"}  # cropped
    assert all(torch.equal(placed[name], weights[name].reshape(placed[name].shape)) for name in placed)
    assert {tensor.untyped_storage().data_ptr() for tensor in placed.values()} <= storages
    table = compare(c.reference, runner, inputs)
    assert all_ok(table), verdict(table)


def constant(name: str, *shape: int, value: float | None = None) -> Layer:
    attributes = {"weight": name} if value is None else {"values": [value]}
    return Layer(name, "CONSTANT", (), Value(name, "float32", shape), attributes)


def elementwise(name: str, op: str, *inputs: str) -> Layer:
    return Layer(name, "ELEMENTWISE", inputs, Value(name, "float32", (2, 3, 4)), {"op": op})


def test_near_misses_are_left_alone():
    one, two = constant("one", 1, value=1.0), constant("two", 1, value=2.0)
    scaled = [two, elementwise("s", "SUM", "scale", "two"), elementwise("p", "PROD", "x", "s")]
    assert types(modulate([*scaled, elementwise("y", "SUM", "p", "shift")]))["MODULATE"] == 0  # x (scale + 2) + shift
    fine = [one, elementwise("s", "SUM", "scale", "one"), elementwise("p", "PROD", "x", "s")]
    assert types(modulate([*fine, elementwise("y", "SUM", "p", "shift")]))["MODULATE"] == 1
    read_twice = [*fine, elementwise("y", "SUM", "p", "shift"), elementwise("z", "SUM", "y", "p")]
    assert types(modulate(read_twice))["MODULATE"] == 0
    product = elementwise("p", "PROD", "w", "y")
    assert types(gated_sum([constant("w", 4), product, elementwise("z", "SUM", "x", "p")]))["GATED_SUM"] == 0
    assert types(gated_sum([product, elementwise("z", "SUM", "x", "p")]))["GATED_SUM"] == 1
    graph = case("sd3.5-medium").runner().backend.graph
    no_eps = [replace(x, attributes={"op": "SUB"}) if x.attributes.get("op") == "SUM" else x for x in graph.layers]
    assert types(rms_norm(no_eps))["RMS_NORM"] == 0 and types(linear(no_eps))["LINEAR"] == 0
    norms = {x.inputs[1] for x in rms_norm(list(graph.layers)) if x.type == "RMS_NORM"}
    scalars = [replace(x, output=replace(x.output, shape=(1,))) if x.output.name in norms else x for x in graph.layers]
    assert norms and types(rms_norm(scalars))["RMS_NORM"] == 0  # one weight for all channels


def test_tf32_is_off_inside_and_as_before_outside(monkeypatch):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    with pytest.raises(KeyError), without_tf32():
        assert not matmul.allow_tf32 and not cudnn.allow_tf32
        raise KeyError
    assert cudnn.allow_tf32 and not matmul.allow_tf32


def test_tf32_is_as_before_after_blocks_that_overlap(monkeypatch):
    """Two threads in a server: the one that leaves first must not switch TF32 on for the other, nor off for good."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    first, second = without_tf32(), without_tf32()
    for block in (first, second):
        block.__enter__()
    first.__exit__(None, None, None)
    assert not cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert cudnn.allow_tf32


SCRIPT = """
import os, sys, torch
from mmdit_lib.engine.precision import without_tf32

def found(read):
    try:
        return read()
    except RuntimeError:  # torch refuses to mix the older and the newer names
        return "refused"

def state():
    b = torch.backends
    newer = b, b.cuda.matmul, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul
    older = lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32, torch.get_float32_matmul_precision
    return [x.fp32_precision for x in newer] + [found(read) for read in older]

for change in sys.argv[1:]:
    if os.fork():
        if os.wait()[1]:
            sys.exit(change)
        continue
    exec(change)
    before = state()
    with without_tf32():
        everything, matmul, _, conv = state()[:4]
        assert "tf32" not in (matmul, conv) and (everything == "none" or {matmul, conv} == {"ieee"})
    assert state() == before, (state(), before)
    os._exit(0)
"""
NEWER = ("fp32_precision", "cuda.matmul.fp32_precision", "cudnn.fp32_precision", "cudnn.conv.fp32_precision")
STATES = [
    "", "torch.set_float32_matmul_precision('high')", "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.allow_tf32 = True", "torch.backends.cudnn.allow_tf32 = False",
    *(f"torch.backends.{name} = 'tf32'" for name in NEWER),
    "torch.set_float32_matmul_precision('high'); torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.fp32_precision = 'tf32'",
]  # fmt: skip


def test_tf32_is_off_however_it_was_allowed():
    """The switches are the process's, so each state has one of its own."""
    subprocess.run([sys.executable, "-c", SCRIPT, *STATES], check=True)
