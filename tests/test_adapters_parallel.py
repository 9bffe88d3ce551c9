"""LoRAs set on the ranks of an engine, over MPI and gloo: each rank replaces its own part of the weights."""

import loras
import pytest
import torch
from helpers import diffusers_output, model_config, random_transformer
from ranks import run_on_ranks

from mmdit_lib import build, convert
from mmdit_lib.config import Sizes
from mmdit_lib.engine.inputs import draw_inputs
from mmdit_lib.sd3 import SD3

pytest.importorskip("mpi4py")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not loras.has_peft(), reason="diffusers needs peft for LoRAs")]

BOUND = 5e-6
CONFIG = model_config(heads=12, head_dim=8, dual_attention_layers=(0, 1))
LAYOUTS = {
    2: {
        "tp2": (dict(tp_size=2), {}),
        "tp2 trtllm": (dict(tp_size=2, tp_layout="trtllm"), {}),
        "cp2 ulysses": ({}, dict(cp_size=2, cp_method="ulysses")),
        "cfg2": (dict(cfg_size=2), {}),
    },
    3: {"cp3 allgather": (dict(cp_size=3), {})},
    4: {"tp2 x cp2 allgather": (dict(tp_size=2, cp_size=2), {}), "cfg2 x tp2": (dict(tp_size=2, cfg_size=2), {})},
}
CASES = [(154, (7, 9), 2), (333, (5, 7), 1), (77, (3, 5), 3)]
"""Text tokens, rows and columns of patches, batch."""
PROFILE = dict(max_batch_size=4, min_resolution="32x32", opt_resolution="128x128", max_resolution="160x160", plan=False)


@pytest.mark.parametrize("world", LAYOUTS)
def test_each_layout_equals_diffusers_and_a_conversion_on_ranks(tmp_path, world):
    random_transformer(CONFIG).save_pretrained(tmp_path / "transformer")
    state = random_transformer(CONFIG).state_dict()
    given = [
        (loras.write(tmp_path / "all.safetensors", loras.random_lora(state)), 0.7),
        (loras.write(tmp_path / "mlps.safetensors", with_magnitudes(state)), -0.4),
    ]
    reference, found = loras.fused_by_diffusers(random_transformer(CONFIG), given), []
    for seed, (tokens, (rows, columns), batch) in enumerate(CASES):
        inputs = draw_inputs(SD3, CONFIG, Sizes(batch, 16 * rows, 16 * columns, tokens), seed=seed)
        found.append((inputs, diffusers_output(reference, inputs)))
    torch.save(found, tmp_path / "cases.pt")
    tasks = {}
    for layout, (converting, building) in LAYOUTS[world].items():
        engines = {}
        for name, fused in {"base": [], "fused": given}.items():
            folder = tmp_path / f"{name} {layout}"
            convert(tmp_path / "transformer", folder / "checkpoint", loras=fused, progress=False, **converting)
            engines[name] = str(build(folder / "checkpoint", folder / "engine", progress=False, **PROFILE, **building))
        named = [[str(path), scale] for path, scale in given]
        tasks[layout] = {"kind": "adapters", "cases": str(tmp_path / "cases.pt"), "loras": named, **engines}
    results = run_on_ranks(world, tasks)
    assert results.keys() == LAYOUTS[world].keys()
    for layout, found in results.items():
        print(f"{layout}: {max(map(max, found['errors'])):.1e}")
        assert max(map(max, found["errors"])) <= BOUND, layout
        assert all(found["same"]) and all(found["kept"]) and all(found["back"]), layout
        for differing, missing in found["said"]:
            assert differing.startswith("the ranks do not agree on the adapters (rank 0: mlps.safetensors (scale -0.4")
            assert "rank 1: missing does not exist and is not a hub id" in missing and "\n" not in missing + differing


def with_magnitudes(state: loras.TENSORS) -> loras.TENSORS:
    """A DoRA, whose rows are normalized over all ranks' columns."""
    lora = loras.random_lora(state, seed=1, rank=2, only="ff.net")
    for module in {name.partition(".lora_")[0] for name in lora}:
        lora[f"{module}.lora_magnitude_vector"] = 1.1 * state[f"{module}.weight"].norm(dim=1)
    return lora
