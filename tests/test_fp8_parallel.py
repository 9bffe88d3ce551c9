"""FP8 under every kind of parallelism: the same quantized values and scales on every rank, and outputs over gloo.

The scales are computed from whole tensors before these are sharded, so all ranks round to the same values. Partial sums
are added in another order than on one rank, by about 1e-7; where that moves an activation across the middle of two FP8
values, it gets the next one. So the outputs agree within the bound of `test_fp8.py` (`FLIPPED`), not always within
float32's rounding.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import fp8
import pytest
import ranks
import torch
from helpers import relative_error
from test_fp8 import FLIPPED

from mmdit_lib import Checkpoint, EngineFolder, MMDiTRunner
from mmdit_lib.config import TORCH_DTYPES
from mmdit_lib.engine import kernels, rank_kernels
from mmdit_lib.engine.capability import has_fp8
from mmdit_lib.engine.fp8_passes import FP8_EPILOGUES, FP8_GEMMS, FP8_KERNELS
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.engine.kernel_passes import KERNELS
from mmdit_lib.engine.linears import fp8_linear
from mmdit_lib.engine.passes import NUMERICS, SPEED, apply
from mmdit_lib.engine.pytorch_backend import GPU_PASSES
from mmdit_lib.engine.rank_passes import reduced_gates
from mmdit_lib.reports.memory import Peak, memory_of
from mmdit_lib.reports.on_shapes import inputs_on_meta
from mmdit_lib.reports.traffic import group_names
from mmdit_lib.sd3 import SD3

MODEL = "sd3.5-medium"
LAYOUTS = {2: ranks.LAYOUTS[2], 4: {name: ranks.LAYOUTS[4][name] for name in ("tp2 x cp2 allgather", "cfg2 x tp2")}}
CASES = [(154, 1), (333, 2), (97, 2)]
"""Text tokens and batch: odd and even numbers of tokens, and one row without guidance."""


@pytest.mark.parametrize("tp_layout", ["megatron", "trtllm"])
def test_every_rank_has_the_same_values_and_scales(tp_layout):
    whole = Checkpoint.open(fp8.checkpoint(MODEL)).weights()
    sharded = Checkpoint.open(fp8.checkpoint(MODEL, tp_size=2, tp_layout=tp_layout), verify=True)
    sharding = SD3.shardings[tp_layout]
    shared = 0
    for rank in range(2):
        weights = sharded.weights(rank)
        assert weights.keys() == whole.keys()
        for name, tensor in weights.items():
            expected = sharding.shard(name, whole[name], 2, rank)
            assert tensor.dtype == expected.dtype and torch.equal(tensor.float(), expected.float()), name
            shared += name.endswith("_scaling_factor")
    modules = sharded.quantization.modules(SD3, sharded.model)
    assert shared == 2 * 2 * len(modules)


@pytest.mark.slow
@pytest.mark.parametrize("world", LAYOUTS)
def test_outputs_agree_on_ranks(world, tmp_path):
    pytest.importorskip("mpi4py")
    one = MMDiTRunner.from_engine(fp8.engine(MODEL), backend="pytorch", device="cpu")
    sizes = [dict(text_tokens=tokens, batch=batch, seed=i) for i, (tokens, batch) in enumerate(CASES)]
    inputs = [sample_inputs(one.folder, **size) for size in sizes]
    torch.save([(given, one.run(given)) for given in inputs], tmp_path / "cases.pt")
    tasks = {}
    for name, (converting, building) in LAYOUTS[world].items():
        folder = fp8.engine(MODEL, plan=name == "tp2", converted=tuple(converting.items()), **building)
        tasks[name] = {"kind": "parity", "engine": str(folder), "cases": str(tmp_path / "cases.pt")}
    errors = ranks.run_on_ranks(world, tasks)
    print({name: f"{max(found):.1e}" for name, found in errors.items()})
    assert errors.keys() == LAYOUTS[world].keys()
    assert all(len(found) == 2 * len(CASES) and max(found) <= FLIPPED for found in errors.values()), errors


ALL = FP8_GEMMS + GPU_PASSES + FP8_KERNELS + FP8_EPILOGUES


def folder(**layout) -> EngineFolder:
    return EngineFolder.open(fp8.engine(MODEL, "bfloat16", converted=tuple(layout.items())))


def test_row_parallel_layers_are_summed_where_the_sums_are_read():
    one, two = (folder(**layout) for layout in ({}, {"tp_size": 2}))
    layers = apply(two.graph(1), ALL)
    found, alone = (Counter(layer.type for layer in x) for x in (layers, apply(one.graph(0), ALL)))
    blocks, dual = two.model.num_layers, len(two.model.dual_attention_layers)
    # Per block: attention and MLP, of image and text (not of the last text), and the second attention.
    sums = [layer for layer in layers if layer.type.startswith("REDUCED_")]
    assert len(sums) == 4 * blocks - 2 + dual
    assert found["DIST_COLLECTIVE"] == 0 and found["FP8_LINEAR"] == alone["FP8_LINEAR"] - len(sums)
    # The last norm is not quantized. On one rank, the first sum of dual attention is part of the second.
    assert found["REDUCED_GATED_NORM_FP8"] == alone["GATED_NORM_FP8"] == len(sums) - 1 - dual
    assert found["REDUCED_GATED_NORM"] == alone["GATED_NORM"] == 1 and found["REDUCED_GATED_SUM"] == dual
    same = ("QUANTIZE", "ELEMENTWISE", "FP8_LINEAR_GELU", "NORM_MODULATE_FP8", "PROJECTED_ATTENTION")
    assert {kind: found[kind] for kind in same} == {kind: alone[kind] for kind in same}
    assert [layer.attributes["first"] for layer in sums] == [True] + [False] * (len(sums) - 1)
    known: set = {value.name for value in two.graph(1).inputs} | {None}
    for layer in layers:
        assert known.issuperset(layer.inputs), layer
        known.add(layer.output.name)


def test_a_bias_of_each_rank_is_left_alone():
    """It is added once per rank, before the sum."""
    layers = apply(folder(tp_size=2).graph(0), FP8_GEMMS + NUMERICS + SPEED + KERNELS)
    bias = next(layer.inputs[-1] for layer in layers if layer.type == "FP8_LINEAR" and layer.inputs[-1])
    wrong = [replace(x, inputs=(*x.inputs[:-1], bias)) if x.type == "FP8_LINEAR" else x for x in layers]
    assert reduced_gates(layers) != layers and reduced_gates(wrong) == wrong


def test_memory_is_counted_as_without_these_passes():
    """`memory_of` leaves them out: activations in FP8 are smaller, and the partial sums that ranks read
    from each other are not in FP8."""
    two = folder(tp_size=2)
    build, graph, sizes = two.build_config, two.graph(0), two.build_config.sizes(1)[-1]
    weights = two.open_checkpoint(verify=False).weights(0)
    counted = memory_of(graph, SD3, two.model, two.layout, "bfloat16", sizes, build, weights)
    peak = Peak(graph, weights, groups=group_names(graph), passes=ALL)
    peak.run(*inputs_on_meta(two.model, "bfloat16", sizes, build))
    assert 2 * peak.slot == counted.exchange > 0 and 0.7 * counted.activations < peak.nbytes < counted.activations


@pytest.mark.parametrize("to_type", ["bfloat16", "float16"])
def test_sums_are_those_of_the_layers_one_by_one(monkeypatch, to_type):
    """Bit for bit. All ranks have the same data here."""
    monkeypatch.setattr(rank_kernels, "dist_collective", lambda x, *, operation, group, size: x * size)
    generator, dtype = torch.Generator().manual_seed(0), TORCH_DTYPES[to_type]
    h, weight = (torch.randn(s, generator=generator).mul(50).to(torch.float8_e4m3fn) for s in ((2, 7, 32), (1, 64, 32)))
    x, gate, bias, scale, shift = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((2, 7, 64), (2, 1, 64), (1, 1, 64), (2, 1, 64), (2, 1, 64))
    )
    scales, fp8_scale = (torch.tensor(2.0**-5), torch.tensor(2.0**-7)), torch.tensor(2.0**-6)
    linear, ranks = (h, weight, *scales, bias), dict(group="0", size=2, to_type=to_type)
    y = 2 * fp8_linear(h, weight, *scales, None, to_type=to_type) + bias
    assert torch.equal(rank_kernels.reduced_gated_sum(x, gate, *linear, **ranks), kernels.gated_sum(x, gate, y))
    for norm, last in ((kernels.gated_norm, ()), (kernels.gated_norm_fp8, (fp8_scale,))):
        rest, eps = (scale, shift, *last), 1e-6
        found = rank_kernels.reduced_gated_norm(x, gate, *linear, *rest, inputs=5, eps=eps, **ranks)
        for mine, expected in zip(found, norm(x, gate, y, *rest, eps=eps), strict=True):
            assert mine.dtype == expected.dtype and torch.equal(mine.float(), expected.float())
        on_meta = (tensor.to("meta") for tensor in (x, gate, *linear, *rest))
        shapes = rank_kernels.reduced_gated_norm(*on_meta, inputs=5, eps=eps, **ranks)
        assert [(y.shape, y.dtype) for y in shapes] == [(y.shape, y.dtype) for y in found]


def in_bfloat16(layouts: Sequence[str], path: Path, **options) -> tuple[dict[str, list[float]], list[float]]:
    """The results of `parity` against one rank in float32, by layout; and the errors of one rank in bfloat16."""
    exact, one = (
        MMDiTRunner.from_engine(fp8.engine(MODEL, x), backend="pytorch", device="cpu") for x in ("float32", "bfloat16")
    )
    inputs = [sample_inputs(exact.folder, text_tokens=n, batch=batch, seed=i) for i, (n, batch) in enumerate(CASES)]
    cases = [(given, exact.run(given)) for given in inputs]
    torch.save(cases, path)
    tasks = {}
    for name in layouts:
        converting, building = ranks.LAYOUTS[2][name]
        engine = fp8.engine(MODEL, "bfloat16", converted=tuple(converting.items()), **building)
        tasks[name] = {"kind": "parity", "engine": str(engine), "cases": str(path), **options}
    return ranks.run_on_ranks(2, tasks), [relative_error(one.run(given), expected) for given, expected in cases]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
def test_fused_sums_keep_the_numbers_on_ranks(world, tmp_path):
    """What runs on FP8 tensor cores is as close to float32 as the layers it replaces (see test_fp8_passes.py)."""
    pytest.importorskip("mpi4py")
    errors, _ = in_bfloat16(["tp2", "tp2 trtllm"], tmp_path / "cases.pt")
    for found in errors.values():
        plain, fused = found[: len(CASES)], found[len(CASES) :]
        assert all(x <= 1.15 * y for x, y in zip(fused, plain, strict=True)), errors


@pytest.mark.gpu
@pytest.mark.skipif(not has_fp8(torch.device("cuda")) or torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("world", [2])
def test_two_gpus_in_fp8_on_ranks(world, tmp_path):
    """FP8 tensor cores and the kernels that reach the other GPU's memory, eager and as a CUDA graph."""
    pytest.importorskip("mpi4py")
    errors, alone = in_bfloat16([*ranks.LAYOUTS[2]], tmp_path / "cases.pt", device="cuda")
    print(errors, alone)
    for found in errors.values():
        assert all(x <= 1.3 * y for x, y in zip(found, 2 * alone, strict=True)), errors
