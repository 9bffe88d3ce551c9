"""FP8 under every kind of parallelism: the same quantized values and scales on every rank, and outputs over gloo.

The scales are computed from whole tensors before these are sharded, so all ranks round to the same values. Partial sums
are added in another order than on one rank, by about 1e-7; where that moves an activation across the middle of two FP8
values, it gets the next one. So the outputs agree within the bound of `test_fp8.py` (`FLIPPED`), not always within
float32's rounding.
"""

import fp8
import pytest
import ranks
import torch
from test_fp8 import FLIPPED

from mmdit_lib import Checkpoint, EngineFolder, MMDiTRunner
from mmdit_lib.engine.fp8_passes import FP8_EPILOGUES, FP8_GEMMS, FP8_KERNELS
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.engine.passes import apply
from mmdit_lib.engine.pytorch_backend import GPU_PASSES
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


def test_row_parallel_layers_add_their_bias_after_the_sum():
    folder = EngineFolder.open(fp8.engine(MODEL, "bfloat16", converted=(("tp_size", 2),)))
    layers = apply(folder.graph(1), FP8_GEMMS + GPU_PASSES + FP8_KERNELS + FP8_EPILOGUES)
    made_by = {layer.output.name: layer for layer in layers}
    sums = [made_by[x.inputs[0]] for x in layers if x.type == "DIST_COLLECTIVE"]
    config = folder.model
    # Per block: attention and MLP, of image and text (not of the last text), and the second attention.
    assert len(sums) == 4 * config.num_layers - 2 + len(config.dual_attention_layers)
    assert all(layer.type == "FP8_LINEAR" and layer.inputs[-1] is None for layer in sums)
