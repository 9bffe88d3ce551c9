"""Train a LoRA for the tiny model that draws outlines instead of filled shapes: `python -m training.lora --output OUT`.

It needs peft, which the library itself does not: `pip install peft`. The model card of the shipped LoRA has the options
for three minutes on a GPU. On one CPU core, a step takes about a second, and outlines appear after about 300 steps.
diffusers' `pipe.load_lora_weights(OUT)` reads OUT/pytorch_lora_weights.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import nn

from mmdit_lib.files import complete_folder

from .adapters import SIDE, STROKE, batches, side_by_side
from .captions import Prompt, heldout_prompts
from .data import make_data
from .evaluation import ASPECTS, Pipeline, Scores, draw, score
from .judge import look
from .optimise import fit
from .schedule import Budget, Log
from .train_flow import flow_loss
from .train_vae import encode

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name
HOLLOW = 0.1  # a thing is an outline if at least this share of the area within its outer edge is empty
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]  # of the image stream


@dataclass(frozen=True)
class Options:
    """Train a LoRA for the tiny model's transformer, and score pictures with and without it.

    Training ends when the minutes or the steps are used up, whichever comes first.
    """

    output: Path
    """Folder for pytorch_lora_weights.safetensors, scores.json and samples.png; replaces an older LoRA folder."""
    rank: int = 8
    """Rank of the update of each weight."""
    rate: float = 5e-3
    """Peak learning rate."""
    minutes: float = 7.0
    """Minutes of training."""
    steps: int | None = None
    """Training steps; no limit by default."""
    batch: int = 16
    """Samples per step."""
    scenes: int = 1000
    """Number of training scenes."""
    seed: int = 0
    """Seed of weights, scenes and batches."""
    prompts: int = 32
    """Number of held-out prompts to score with."""


@dataclass(frozen=True)
class Style:
    """What pictures without rings look like: a ring is an outline in any style."""

    outlines: float
    """Share of the things that are drawn as outlines."""
    scores: Scores
    """How well the pictures follow their prompts, with shapes recognized by their outer edges."""

    def __str__(self) -> str:
        parts = (f"{name} {getattr(self.scores, name):.1%}" for name in ASPECTS)
        return f"outlines {self.outlines:.1%}  {'  '.join(parts)}"


def train(pipeline: Pipeline, options: Options) -> None:
    """Train, save and score.

    Raises:
        SystemExit: if peft is not installed.
        ValueError: if the folder cannot be written to.
    """
    try:
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict
    except ImportError:
        raise SystemExit("training a LoRA needs peft: pip install peft") from None
    torch.manual_seed(options.seed)
    pipe = pipeline.load()
    prompts = prompts_without_rings(options.prompts)
    plain = draw(pipe, [p.text for p in prompts], max_sequence_length=77)
    with complete_folder(options.output, "LoRA", is_kind=is_lora) as unfinished:
        config = LoraConfig(
            r=options.rank, lora_alpha=options.rank, target_modules=LAYERS, init_lora_weights="gaussian"
        )
        pipe.transformer.add_adapter(config)
        log = Log(every=10)
        fit_layers(pipe, options, log)
        weights = {name: x.half() for name, x in get_peft_model_state_dict(pipe.transformer).items()}
        StableDiffusion3Pipeline.save_lora_weights(unfinished, transformer_lora_layers=weights)
        (unfinished / WEIGHTS).chmod(0o644)
        styled = draw(pipe, [p.text for p in prompts], max_sequence_length=77)
        found = {"without": judge_style(prompts, plain), "with": judge_style(prompts, styled)}
        for name, style in found.items():
            print(f"{name} the LoRA: {style}", flush=True)
        facts = {name: asdict(style) for name, style in found.items()} | {"log": log.rows}
        (unfinished / "scores.json").write_text(json.dumps(facts, indent=2))
        side_by_side([p.text for p in prompts], plain, styled).save(unfinished / "samples.png")


def is_lora(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def fit_layers(pipe: StableDiffusion3Pipeline, options: Options, log: Log) -> None:
    """Train the LoRA layers of `pipe.transformer` in place."""
    layers = nn.ModuleList(m for name, m in pipe.transformer.named_modules() if name.endswith(("lora_A", "lora_B")))
    parts = pipe.components
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    data = make_data(options.scenes, options.seed, workers=1).to(pipe.device)
    latents = torch.cat([encode(pipe.vae, part, SIDE, SIDE, STROKE).half() for part in data.numbers.split(64)])
    inputs = batches(data, latents, options.batch, options.seed)
    budget = Budget(options.minutes, options.steps)
    fit("lora", layers, lambda *x: flow_loss(parts, *x), inputs, budget, log, adam_rate=options.rate, warmup=20)


def prompts_without_rings(count: int) -> list[Prompt]:
    prompts = [p for p in heldout_prompts(4 * count) if all(thing.shape != "ring" for thing in p.scene.things)]
    return prompts[:count]


def judge_style(prompts: Sequence[Prompt], pictures: Sequence[Image.Image]) -> Style:
    """Judge pictures of `prompts_without_rings` from their pixels alone."""
    sightings = [look(picture, fill=True) for picture in pictures]
    outlines = [thing.hollow >= HOLLOW for sighting in sightings for thing in sighting.things]
    things = sum(len(prompt.scene.things) for prompt in prompts)
    return Style(sum(outlines) / max(things, len(outlines)), score(prompts, sightings))


if __name__ == "__main__":
    tyro.cli(train, prog="python -m training.lora", config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
