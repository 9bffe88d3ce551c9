"""Whole images on one GPU: text encoders, all steps and the VAE, with diffusers' transformer or ours.

    python -m benchmarks.single_gpu graphs --folder graphs     # needs TensorRT (tensorrt_rtx), but no GPU
    python -m benchmarks.pictures run --folder graphs --output pictures.json     # needs a GPU, but no TensorRT
    python -m benchmarks.pictures table --results pictures.json     # as Markdown

All parts have the published sizes and random weights, so the images are noise. The token ids are random too.
"""

from __future__ import annotations

import json
import statistics
import time
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from mmdit_lib.engine.graph import Graph
from mmdit_lib.engine.pytorch_backend import PyTorchBackend
from mmdit_lib.reports.bench import conditions
from mmdit_lib.sd3 import SD3Config
from mmdit_lib.sd3.companions import text_encoders, vae

from . import common
from .single_gpu import MODELS

WAYS = ("diffusers", "diffusers compiled", "ours", "ours + CUDA graph")
SIDE, T5_TOKENS = 1024, 256


class Case(NamedTuple):
    title: str
    model: str
    steps: int
    guidance: float


CASES = (
    Case("SD3.5-medium", "3.5-medium", 28, 4.5),
    Case("SD3.5-large", "3.5-large", 28, 4.5),
    Case("SD3.5-large-turbo", "3.5-large", 4, 0.0),
)


class Ours:
    """A backend in place of a pipeline's transformer."""

    def __init__(self, backend: PyTorchBackend, config: SD3Config, device: torch.device):
        from diffusers.configuration_utils import FrozenDict

        self.backend, self.config, self.scheduler = backend, FrozenDict(config.to_diffusers()), None
        self.device, self.dtype = device, torch.bfloat16

    def __call__(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, **_):
        inputs = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
        inputs |= {"pooled_projections": pooled_projections, "timestep": timestep.float()}
        return (self.backend(inputs, self.scheduler.timesteps),)

    def cache_context(self, name: str):
        return nullcontext()


class Parts:
    """The text encoders and the VAE of SD3 and SD3.5."""

    def __init__(self, device: torch.device):
        with torch.device(device):
            *self.clips, self.t5 = text_encoders(torch.bfloat16).values()
            self.vae = vae(torch.bfloat16, SIDE)
        self.device = device

    def encode(self, prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Text embeddings [prompts, 333, 4096] and pooled ones [prompts, 2048]."""
        ids = torch.randint(3, 40_000, (prompts, 77), device=self.device)
        found = [clip(ids, output_hidden_states=True) for clip in self.clips]
        clip = torch.cat([x.hidden_states[-2] for x in found], -1)
        t5 = self.t5(torch.randint(3, 32_000, (prompts, T5_TOKENS), device=self.device))[0]
        text = torch.cat([torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], 1)
        return text, torch.cat([x.text_embeds for x in found], -1)


def pipeline(transformer, decoder):
    """diffusers' pipeline without text encoders: it takes prompt embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    others = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = StableDiffusion3Pipeline(transformer, scheduler, decoder, **dict.fromkeys(others))
    made.set_progress_bar_config(disable=True)
    transformer.scheduler = scheduler
    return made


def paint(pipe, parts: Parts, case: Case) -> tuple[float, float, float]:
    """Seconds for the text encoders, the steps and the VAE."""
    times = [now()]
    guided = case.guidance > 1
    text, pooled = parts.encode(2 if guided else 1)
    times.append(now())
    given = {"prompt_embeds": text[:1], "pooled_prompt_embeds": pooled[:1]}
    if guided:
        given |= {"negative_prompt_embeds": text[1:], "negative_pooled_prompt_embeds": pooled[1:]}
    options = dict(num_inference_steps=case.steps, guidance_scale=case.guidance, height=SIDE, width=SIDE)
    latents = pipe(**given, **options, output_type="latent").images
    times.append(now())
    image = parts.vae.decode(latents / parts.vae.config.scaling_factor + parts.vae.config.shift_factor).sample
    pipe.image_processor.postprocess(image.nan_to_num(), output_type="pil")
    times.append(now())
    return tuple(end - start for start, end in pairwise(times))


def now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def measure(case: Case, parts: Parts, weights: dict, options: Namespace, device: torch.device) -> dict:
    torch._dynamo.reset()
    config = MODELS[case.model]
    eager, compiled = (common.diffusers_transformer(config, weights) for _ in range(2))
    common.compile_blocks(compiled)
    backend = common.backend_of(Graph.load(options.folder / f"{case.model}.graph.json"), weights, device)
    ours = [Ours(one, config, device) for one in (backend, common.with_cuda_graphs(backend))]
    paints = {
        way: partial(paint, pipeline(transformer, parts.vae), parts, case)
        for way, transformer in zip(WAYS, (eager, compiled, *ours), strict=True)
    }
    row = {"case": case._asdict(), "first": {way: round(sum(one()), 2) for way, one in paints.items()}}
    times = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way, one in paints.items():
            times[way].append(one())
    row["seconds"] = {
        way: [round(statistics.median(part), 3) for part in zip(*found, strict=True)] for way, found in times.items()
    }
    return row


def write_graphs(options: Namespace) -> None:
    raise SystemExit("python -m benchmarks.single_gpu graphs writes the graphs")


def run(options: Namespace) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # diffusers' blocks share one function
    parts = Parts(device)
    date = time.strftime("%Y-%m-%d")
    result = {"conditions": conditions(device), "rounds": options.repeats, "date": date, "rows": []}
    for model in options.models:
        weights = common.draw_weights(MODELS[model], device)
        for case in CASES:
            if case.model == model:
                result["rows"].append(measure(case, parts, weights, options, device))
                print(json.dumps(result["rows"][-1]), flush=True)
                common.save(result, options.output)
                common.free()
        del weights
        common.free()


def table(result: dict) -> list[str]:
    """The result as Markdown."""
    lines = [
        f"{result['conditions']}; {result['date']}. Seconds per image of {SIDE}x{SIDE} pixels: bf16, random weights, "
        f"{common.TEXT_TOKENS} text tokens, run alternately in one process; median of {result['rounds']}. In "
        "parentheses: text encoders + steps + VAE. All columns share the text encoders and the VAE, which run eagerly.",
        "",
        "| | steps | guidance | " + " | ".join(WAYS) + " | diffusers / ours + CUDA graph |",
        "|---|---:|---|" + "---:|" * (len(WAYS) + 1),
    ]
    for row in result["rows"]:
        found, case = row["seconds"], row["case"]
        cells = [f"{sum(found[way]):.2f} ({' + '.join(f'{x:.2f}' for x in found[way])})" for way in WAYS]
        ratio = sum(found["diffusers"]) / sum(found["ours + CUDA graph"])
        guidance = "yes, 2 rows" if case["guidance"] > 1 else "no, 1 row"
        lines.append(f"| {case['title']} | {case['steps']} | {guidance} | " + " | ".join(cells) + f" | {ratio:.2f}x |")
    lines += ["", "| first image, s | " + " | ".join(WAYS) + " |", "|---" + "|---:" * len(WAYS) + "|"]
    for row in result["rows"]:
        lines.append(f"| {row['case']['title']} | " + " | ".join(f"{row['first'][way]:.2f}" for way in WAYS) + " |")
    note = "`diffusers` runs first, so its first image includes the first use of what all share: "
    note += "encoders, VAE, libraries."
    return [*lines, "", note, ""]


def main() -> None:
    parser = common.parser(__doc__, MODELS, ["3.5-medium", "3.5-large"], "pictures.json", repeats=3)
    common.main(parser.parse_args(), write_graphs, run, "Whole images", table)


if __name__ == "__main__":
    main()
