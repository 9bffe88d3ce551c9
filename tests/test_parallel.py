"""Every parallel layout against diffusers, over MPI and gloo, in float32; and the plans of every rank."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import diffusers_output, kinds_of_layers, model_config, mpirun, random_transformer
from PIL import Image
from ranks import LAYOUTS, run_on_ranks

from mmdit_lib.checkpoint import convert
from mmdit_lib.config import Sizes
from mmdit_lib.engine.build import build
from mmdit_lib.engine.folder import EngineFolder
from mmdit_lib.engine.inputs import draw_inputs
from mmdit_lib.pipeline import load_pipeline
from mmdit_lib.reports.reference import load_reference
from mmdit_lib.sd3 import SD3, SD3Config
from mmdit_lib.tiny import model_path

pytest.importorskip("mpi4py")

BOUND = 5e-6
TWELVE = dict(heads=12, head_dim=8, pos_embed_max_size=24)  # 12 heads: divisible by 2, 3, 4 and 2 x 2
MODELS = {
    "sd3-medium": model_config(qk_norm=None, **TWELVE),
    "sd3.5-medium": model_config(dual_attention_layers=(0,), **TWELVE),
    "sd3.5-large": model_config(num_layers=4, **TWELVE),
}
MORE_RANKS = ["sd3.5-medium"]
"""More than two ranks have this model only: it has blocks with dual attention and without. On two ranks, where every
kind of collective runs too, sd3-medium has no norms of queries and keys."""
CASES = [(154, (7, 9), 2), (333, (8, 8), 2), (589, (5, 7), 2), (154, (3, 5), 1)]
"""Text tokens, rows and columns of patches, batch: odd and even numbers of tokens, and one row without guidance."""
PICTURES = {2: ["tp2", "cp2 ulysses"], 3: [], 4: ["cfg2 x tp2"]}
"""Layouts of the trained model. Importing diffusers' pipelines takes every rank longer than painting does."""
PROMPT, OPTIONS = "a red circle", dict(num_inference_steps=3, guidance_scale=4.0, height=128, width=96)
PROFILE = dict(
    max_batch_size=2, min_resolution="32x32", opt_resolution="128x128", max_resolution="160x160", progress=False
)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@cache
def source(root: Path, model: str) -> Path:
    if model == "tiny":
        return model_path()
    random_transformer(MODELS[model]).save_pretrained(root / model)
    return root / model


@cache
def engine(root: Path, model: str, layout: str = "one") -> Path:
    options = {"one": ({}, {})} | {name: options for of_world in LAYOUTS.values() for name, options in of_world.items()}
    converting, building = options[layout]
    name = f"{model} {layout}".replace(" ", "_")
    checkpoint = convert(
        str(source(root, model)), str(root / f"{name}_checkpoint"), progress=False, dtype="float32", **converting
    )
    return build(str(checkpoint), str(root / name), plan=False, **PROFILE, **building)


@cache
def cases(root: Path, model: str) -> Path:
    """Inputs, and diffusers' outputs for them."""
    reference = load_reference(source(root, model), SD3, torch.float32)
    config, found = SD3Config.from_diffusers(dict(reference.config)), []
    for seed, (tokens, (rows, columns), batch) in enumerate(CASES):
        inputs = draw_inputs(SD3, config, Sizes(batch, 16 * rows, 16 * columns, tokens), seed=seed)
        found.append((inputs, diffusers_output(reference, inputs)))
    torch.save(found, root / f"{model}.pt")
    return root / f"{model}.pt"


@cache
def picture_of_one_rank(root: Path) -> np.ndarray:
    pipe = load_pipeline(
        source(root, "tiny"),
        engine(root, "tiny"),
        device="cpu",
        dtype=torch.float32,
        runner_options={"backend": "pytorch"},
    )
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(PROMPT, generator=torch.Generator().manual_seed(0), **OPTIONS).images[0], dtype=int)


@pytest.fixture(scope="module")
def results(root, world):
    tasks = {
        f"{model} {layout}": {
            "kind": "parity",
            "engine": str(engine(root, model, layout)),
            "cases": str(cases(root, model)),
        }
        for model in [*(MODELS if world == 2 else MORE_RANKS), "tiny"]
        for layout in (PICTURES if model == "tiny" else LAYOUTS)[world]
    }
    first, *others = LAYOUTS[world]
    tasks["another model's folder"] = {
        "kind": "refuse",
        "engines": [str(engine(root, "sd3-medium", first)), *[str(engine(root, "sd3.5-large", first))] * (world - 1)],
    }
    tasks["another layout"] = {
        "kind": "refuse",
        "engines": [
            str(engine(root, "sd3-medium", first)),
            *[str(engine(root, "sd3-medium", others[0]))] * (world - 1),
        ],
    }
    wrong = next(iter(LAYOUTS[2 if world != 2 else 3]))
    tasks["another number"] = {"kind": "refuse", "engines": [str(engine(root, "sd3-medium", wrong))] * world}
    tasks["leave"] = {"kind": "again"}
    for layout in PICTURES[world]:
        tasks[f"picture {layout}"] = {
            "kind": "picture", "engine": str(engine(root, "tiny", layout)), "model": str(source(root, "tiny")),
            "prompt": PROMPT, "options": OPTIONS, "by_latents": layout == "tp2",
            "png": str(root / f"{layout}.png".replace(" ", "_")),
        }  # fmt: skip
    return run_on_ranks(world, tasks)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4], scope="module")
class TestRanks:
    def test_every_layout_is_exact(self, results, world, record_property):
        errors = {
            name: found for name, found in results.items() if isinstance(found, list) and isinstance(found[0], float)
        }
        assert len(errors) == len(MODELS if world == 2 else MORE_RANKS) * len(LAYOUTS[world]) + len(PICTURES[world])
        record_property("errors", errors)
        for layout in LAYOUTS[world]:
            worst = max(max(found) for name, found in errors.items() if name.endswith(f" {layout}"))
            print(f"{layout}: {worst:.1e}")
        assert all(len(found) == 2 * len(CASES) and max(found) <= BOUND for found in errors.values()), errors

    def test_refused_on_every_rank_before_any_collective(self, results, world):
        number = results["another number"]
        wanted = 3 if world == 2 else 2
        assert len(number) == world and len(set(number)) == 1
        assert f"{wanted} ranks, and {world} ranks are running: start it with mpirun -n {wanted}" in number[0]
        for task in ("another model's folder", "another layout"):
            assert len(set(results[task])) == 1 and "they differ in" in results[task][0]
            assert results[task][0].startswith("rank 1's engine folder") and "\n" not in results[task][0]
        assert results["leave"] == [True]

    def test_the_same_picture(self, results, root, world):
        for layout in PICTURES[world]:
            found = results[f"picture {layout}"]
            assert len(found["hashes"]) == world and len(set(found["hashes"])) == 1
            assert found["encoders"] == [True] + [False] * (world - 1)
            image = np.asarray(Image.open(root / f"{layout}.png".replace(" ", "_")), dtype=int)
            difference = np.abs(image - picture_of_one_rank(root))
            # Rounding to 8 bits may fall on either side.
            assert difference.max() <= 1 and (difference > 0).mean() < 1e-2, (difference.max(), (difference > 0).mean())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("world", [2])
def test_two_gpus_reach_each_others_memory_on_ranks(root, world):
    """The Triton kernels of `engine/symmetric.py`; in float32 as on a CPU."""
    tasks = {
        f"{model} {layout}": {
            "kind": "parity", "engine": str(engine(root, model, layout)), "cases": str(cases(root, model)),
            "device": "cuda",
        }
        for model in MODELS
        for layout in LAYOUTS[2]
    }  # fmt: skip
    errors = run_on_ranks(world, tasks)
    assert all(len(found) == 2 * len(CASES) and max(found) <= BOUND for found in errors.values()), errors


@pytest.mark.slow
def test_one_process_is_told_how_to_start(root):
    folder = engine(root, "tiny", "tp2")
    code = (
        f"from mmdit_lib import MMDiTRunner; MMDiTRunner.from_engine({str(folder)!r}, backend='pytorch', device='cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("is for tp 2, 2 ranks, and 1 rank is running: start it with mpirun -n 2")


@pytest.mark.slow
def test_the_command_under_mpirun(root):
    folder, picture = engine(root, "tiny", "cp2 ulysses"), root / "command.png"
    arguments = ["generate", PROMPT, "--model_path", source(root, "tiny"), "--engine_dir", folder, "--output", picture,
                 "--num_inference_steps", "2", "--resolution", "128x96", "--backend", "pytorch",
                 "--device", "cpu"]  # fmt: skip
    done = mpirun(2, "-m", "mmdit_lib.cli", *arguments, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Image.open(picture).size == (96, 128)
    assert done.stdout.count("image:") == 1


# Plans of every rank, with two blocks so that each layout takes only seconds.

SMALL = model_config(heads=12, head_dim=4, num_layers=2, dual_attention_layers=(0,))
PLANS = ["tp2 trtllm", "cp2 allgather", "tp2 x cp2 ulysses", "cfg2 x cp2"]
"""The others consist of the same kinds of layers, as the test checks: only groups and shapes differ."""


@pytest.mark.slow
def test_every_rank_has_a_plan(tmp_path):
    random_transformer(SMALL).save_pretrained(tmp_path / "source")
    layouts = {name: options for of_world in LAYOUTS.values() for name, options in of_world.items()}
    collectives, planned, kinds = 0, set(), {}
    for name, (converting, building) in layouts.items():
        output = tmp_path / name.replace(" ", "_")
        checkpoint = convert(tmp_path / "source", f"{output}_checkpoint", progress=False, **converting)
        folder = EngineFolder.open(build(checkpoint, output, plan=name in PLANS, **PROFILE, **building))
        kinds[name] = set().union(*(kinds_of_layers(folder.graph(rank)) for rank in range(folder.layout.world_size)))
        planned |= kinds[name] if name in PLANS else set()
        for rank in range(folder.layout.world_size):
            if name in PLANS:
                assert f"rank{rank}.engine" in folder.files, name
                folder.verify(f"rank{rank}.engine")
            found = [x for x in folder.graph(rank).layers if x.type == "DIST_COLLECTIVE"]
            assert found and all(rank in x.attributes["group"] for x in found), name
            collectives += len(found)
    assert collectives > 200
    assert {name: found - planned for name, found in kinds.items() if found - planned} == {}
