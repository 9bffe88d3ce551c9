"""What FP8 costs in quality: errors of weights, of layers and of whole models, calibration, scores and PSNR.

From the repository root:

    python -m benchmarks.fp8_quality                    # everything but the images; minutes on a CPU
    python -m benchmarks.fp8_quality images    # the judge's scores of 256 prompts; on a GPU, as it is slow on a CPU

Writes `benchmarks/results/fp8_quality.json`, part by part, and its tables. The recorded images are from an H100, with
`--kinds float32 bfloat16 "FP8 in bfloat16" "FP8 in bfloat16, attention too"`; everything else is from a CPU, on which
the `pytorch` backend emulates FP8: its values are those of the Q/DQ layers' definition.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from mmdit_lib import MMDiTRunner, build, convert, load_pipeline, tiny
from mmdit_lib.checkpoint.calibration import calibrate
from mmdit_lib.checkpoint.quantization import (
    LARGEST,
    MARGIN,
    NONE,
    Quantization,
    quantized_weight,
    scale_for,
    stored_tensors,
)  # fmt: skip
from mmdit_lib.checkpoint.source import find_source
from mmdit_lib.config import TORCH_DTYPES, Layout
from mmdit_lib.engine.inputs import sample_inputs
from mmdit_lib.engine.kernels import through_fp8
from mmdit_lib.reports.parity import relative_error
from mmdit_lib.reports.reference import load_reference
from mmdit_lib.sd3 import SD3
from training import evaluation
from training.captions import heldout_prompts
from training.judge import look
from training.random_pipeline import make_random_pipeline

from .common import save
from .fp8_tables import report

RESULTS = Path(__file__).parent / "results" / "fp8_quality.json"
GROUPS = {
    "timestep and pooled text embedders": "time_text_embed.*",
    "text embedder": "context_embedder",
    "modulation": "*norm*.linear",
    "output projection": "proj_out",
    "attention: q, k, v": "*.attn*.*to_[qkv]",
    "attention: q, k, v of the text": "*.attn*.add_[qkv]_proj",
    "attention: output": "*.attn*.to*_out*",
    "MLP: up": "*.net.0.proj",
    "MLP: down": "*.net.2",
}
"""Linear layers by diffusers' names."""
RANDOM = {
    "sd3-medium": dict(qk_norm=None, dual_attention_layers=(), num_layers=6),
    "sd3.5-medium": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1, 2), num_layers=6),
    "sd3.5-large": dict(qk_norm="rms_norm", dual_attention_layers=(), num_layers=8),
}
"""The published architectures with random weights, 6 heads of 64."""
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "FP8 in float32": "float32", "FP8 in bfloat16": "bfloat16"}
"""Kinds of engines, and their networks' dtypes."""
ATTENTION = "FP8 in bfloat16, attention too"
"""The last of these kinds, built with `fp8_attention`."""


# Weights ---------------------------------------------------------------------------------------------


def weight_errors() -> dict:
    """Relative rounding error of weights by how their scales are chosen: mean over the tiny model, random others."""
    found = {}
    model = load_reference("tiny", SD3, torch.float32)
    linears = [x.weight.data for x in model.modules() if isinstance(x, torch.nn.Linear)]
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int, spread: float) -> torch.Tensor:
        sizes = torch.exp(spread * torch.randn(rows, 1, generator=generator))
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns) * sizes

    sets = {"tiny (trained), mean of its linear layers": linears}
    for rows, columns in ((1536, 1536), (6144, 1536), (1536, 6144), (2432, 2432)):
        sets[f"random {rows}x{columns}"] = [draw(rows, columns, 0.0)]
    sets["random 1536x1536, sizes of rows log-normal with sigma 1"] = [draw(1536, 1536, 1.0)]
    for name, weights in sets.items():
        errors = [list(_by_scale(weight).values()) for weight in weights]
        found[name] = dict(zip(_by_scale(weights[0]), np.mean(errors, 0).tolist(), strict=True))
    return found


def _by_scale(weight: torch.Tensor) -> dict[str, float]:
    whole, rows = weight.abs().max() / LARGEST, weight.abs().amax(1, keepdim=True) / LARGEST
    scales = {"per tensor": whole, "per output channel": rows}
    powers = {f"{name}, power of two": torch.exp2(torch.ceil(torch.log2(s))) for name, s in scales.items()}
    return {name: relative_error(through_fp8(weight, scale), weight) for name, scale in (scales | powers).items()}


def checkpoint_sizes() -> dict:
    """GB of a checkpoint's tensors, from their shapes."""
    found = {}
    for name, model in SD3.known_models.items():
        bytes_of = {}
        for kind, scheme in (("bfloat16", NONE), ("FP8 and bfloat16", Quantization.fp8(SD3))):
            stored = stored_tensors(SD3, model, Layout(), "bfloat16", scheme).values()
            bytes_of[kind] = sum(math.prod(x.shape) * TORCH_DTYPES[x.dtype].itemsize for x in stored) / 1e9
        found[name] = bytes_of
    return found


# Layers ----------------------------------------------------------------------------------------------


def recorded_steps(model: torch.nn.Module, prompts: int = 2, steps: int = 8) -> list[dict]:
    """Arguments of the tiny transformer in real denoising runs: first, middle and last step of each prompt."""
    pipe = evaluation.Pipeline(None, "float32", "cpu").load()
    pipe.transformer, calls = model, []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    evaluation.draw(pipe, [p.text for p in heldout_prompts(prompts)], steps=steps, batch=1)
    handle.remove()
    return [call for i, call in enumerate(calls) if i % steps in (0, steps // 2, steps - 1)]


def layer_errors() -> dict:
    """The tiny model with one group of linear layers rounded to FP8 at a time, in float32: error of its output."""
    model = load_reference("tiny", SD3, torch.float32)
    calls = recorded_steps(model)
    exact = outputs(model, calls)
    largest: dict[str, float] = {}
    with hooks(model, "*", lambda name, x: largest.update({name: max(largest.get(name, 0.0), x.abs().max().item())})):
        outputs(model, calls)
    found = {}
    total = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    for label, pattern in {**GROUPS, "all of them": "*"}.items():
        with in_fp8(model, pattern, largest) as names:
            error = relative_error(outputs(model, calls), exact)
        share = sum(model.get_submodule(name).weight.numel() for name in names) / total
        found[label] = {"layers": len(names), "share of the weights": share, "output": error}
    kept = [kept.pattern for kept in SD3.full_precision]
    with in_fp8(model, "*", largest, kept) as names:
        error = relative_error(outputs(model, calls), exact)
    found["as converted"] = {"layers": len(names), "output": error}
    for margin in (1.0, 2.0, 16.0, 64.0):
        with in_fp8(model, "*", largest, kept, margin):
            found[f"as converted, margin {margin:g}"] = {"output": relative_error(outputs(model, calls), exact)}
    return found


@torch.inference_mode()
def outputs(model: torch.nn.Module, calls: list[dict]) -> torch.Tensor:
    return torch.stack([model(**{**call, "return_dict": False})[0] for call in calls])


@contextmanager
def hooks(model: torch.nn.Module, pattern: str, call: Callable) -> Iterator[list[str]]:
    """Call `call(name, input)` before each linear layer of this pattern; what it returns replaces the input."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and fnmatchcase(n, pattern)]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: call(name, inputs[0]))
        for name in names
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_fp8(
    model: torch.nn.Module, pattern: str, largest: dict, kept: list[str] | None = None, margin: float = MARGIN
) -> Iterator[list[str]]:
    """Inside, linear layers of this pattern round their weights and inputs to FP8."""

    def left_alone(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in kept or ())

    def call(name: str, x: torch.Tensor) -> torch.Tensor | None:
        if left_alone(name):
            return None
        return through_fp8(x, torch.tensor(scale_for(margin * largest[name], name)))

    with hooks(model, pattern, call) as names:
        names[:] = [name for name in names if not left_alone(name)]
        before = {name: model.get_submodule(name).weight.data for name in names}
        for name in names:
            weight, scale = quantized_weight(before[name], name)
            model.get_submodule(name).weight.data = weight.float() * scale
        try:
            yield names
        finally:
            for name in names:
                model.get_submodule(name).weight.data = before[name]


# Calibration, models, images -------------------------------------------------------------------------


def calibration_spread(prompts: int = 24) -> dict:
    """The largest inputs over held-out prompts, divided by those over the tiny model's calibration prompts."""
    source, path = find_source(tiny.model_path()), str(tiny.model_path())
    modules = [name for name, m in SD3.module(source.model).named_modules() if type(m).__name__ == "Linear"]
    own = (tiny.model_path() / "calibration_prompts.txt").read_text().splitlines()
    few = calibrate(source, path, modules, own, (), progress=False)
    many = calibrate(source, path, modules, [p.text for p in heldout_prompts(prompts)], (), progress=False)
    ratios = sorted(many[name] / few[name] for name in modules)
    return {"prompts": prompts, "median": ratios[len(ratios) // 2], "largest": ratios[-1], "smallest": ratios[0]}


def engine(model: str | Path, kind: str, work: Path, **sizes) -> Path:
    """An engine folder of this kind (a key of `DTYPES`) and these sizes, without a plan; reused if `work` has it."""
    name = f"{Path(model).name}-{kind.replace(' ', '-')}"
    checkpoint, output = work / name, work / "-".join([name, "engine", *(f"{k}-{v}" for k, v in sizes.items())])
    if not checkpoint.exists():
        options = {}
        if kind.startswith("FP8"):
            prompts = () if model == "tiny" else ("a red circle", "the blue square on a green background")
            options = {"quantization": "fp8", "calibration_prompts": prompts}
        convert(model, checkpoint, dtype=DTYPES[kind], progress=False, **options)
    if not output.exists():
        build(checkpoint, output, plan=False, progress=False, **sizes)
    return output


def model_errors(work: Path) -> dict:
    """Relative error of one step's output against the float32 engine, for random inputs."""
    folders: dict[str, str | Path] = {"tiny": "tiny"}
    common = dict(num_attention_heads=6, attention_head_dim=64, pos_embed_max_size=32, sample_size=16)
    for name, fields in RANDOM.items():
        folders[f"{name}, random weights"] = make_random_pipeline(work / name, **common, **fields)
    found = {}
    for label, folder in folders.items():
        runners = {kind: MMDiTRunner.from_engine(engine(folder, kind, work), backend="pytorch") for kind in DTYPES}
        inputs = sample_inputs(runners["float32"].folder, batch=2, seed=0)
        exact = runners["float32"].run(inputs).cpu()
        found[label] = {kind: relative_error(runners[kind].run(inputs).cpu(), exact) for kind in list(DTYPES)[1:]}
        found[label]["FP8 / bfloat16"] = found[label]["FP8 in bfloat16"] / found[label]["bfloat16"]
    return found


def images(work: Path, prompts: int, steps: int, kinds: list[str]) -> dict:
    """The judge's scores, and PSNR between the images of different engines, of the tiny model."""
    asked = heldout_prompts(prompts)
    drawn, scores = {}, {}
    for kind in kinds:
        plain = kind.removesuffix(", attention too")
        folder = engine("tiny", plain, work, max_batch_size=16, fp8_attention=kind == ATTENTION)
        pipe = load_pipeline("tiny", folder, dtype=torch.float32, runner_options={"backend": "pytorch"})
        drawn[kind] = evaluation.draw(pipe, [p.text for p in asked], steps=steps, max_sequence_length=77)
        found = evaluation.score(asked, map(look, drawn[kind]))
        scores[kind] = {aspect: getattr(found, aspect) for aspect in evaluation.ASPECTS}
        print(kind, found, flush=True)
    pairs = {f"{b} against {a}": [psnr(*pair) for pair in zip(drawn[a], drawn[b], strict=True)]
             for a, b in combinations(drawn, 2)}  # fmt: skip
    spread = {name: {"median": float(np.median(x)), "lowest": float(min(x))} for name, x in pairs.items()}
    return {"prompts": prompts, "steps": steps, "guidance": 4.0, "objects": found.objects, "scores": scores,
            "PSNR in dB": spread}  # fmt: skip


def psnr(a, b) -> float:
    """Of two images; 99 if they are equal."""
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return 10 * math.log10(255**2 / error) if error else 99.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["weights", "sizes", "layers", "calibration", "models", "images"]
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(names)}; all but images if not given")
    parser.add_argument("--prompts", type=int, default=256, help="of the images")
    parser.add_argument("--steps", type=int, default=28, help="of the images")
    kinds = ["float32", "bfloat16", "FP8 in bfloat16"]
    parser.add_argument(
        "--kinds", nargs="+", choices=[*DTYPES, ATTENTION], default=kinds, help="engines that draw the images"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="folder that keeps the engines; by default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        parts = {
            "weights": weight_errors,
            "sizes": checkpoint_sizes,
            "layers": layer_errors,
            "calibration": calibration_spread,
            "models": lambda: model_errors(work),
            "images": lambda: images(work, options.prompts, options.steps, options.kinds),
        }
        for name in options.parts or names[:-1]:
            found = parts[name]()
            print(json.dumps({name: found}, indent=1), flush=True)
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
            before = json.loads(options.results.read_text()) if options.results.exists() else {}
            after = before | {name: {"device": gpu, "torch": torch.__version__, **found}}
            save(after, options.results)
            options.results.with_suffix(".md").write_text(report(after))


if __name__ == "__main__":
    main()
