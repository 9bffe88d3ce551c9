"""Train the tiny Stable Diffusion 3 from scratch: `python -m training.train --output_dir OUT`.

OUT/checkpoint is what a resumed run continues from: the averaged weights in float32, without the optimizer's state,
which builds up again during warm-up. OUT/pipeline is the finished diffusers folder in float16. OUT/scores.json and
OUT/gallery.png show how well it follows prompts.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import nn

from mmdit_lib.files import complete_folder, require_place

from .captions import heldout_prompts, words
from .data import make_data
from .evaluation import Pipeline, evaluate
from .gallery import gallery_of
from .model import TRAINED, make_parts, save_pipeline
from .optimise import fast_products
from .schedule import Budget, Log
from .train_flow import initialise, learners, train_flow
from .train_vae import train_decoder, train_vae

SHARD = 15 * 2**20  # bytes per checkpoint file, at most
STAGES = ("vae", "flow", "decoder")


@dataclass(frozen=True)
class Options:
    """Train the tiny Stable Diffusion 3 from scratch, in three stages, and score it.

    The stages train the autoencoder, the transformer with the text encoders, and the autoencoder's decoder. A stage
    ends when its minutes or its steps are used up, whichever comes first.
    """

    output_dir: Path
    """Gets checkpoint/, pipeline/, gallery.png and scores.json."""
    resume: bool = False
    """Continue from OUTPUT_DIR/checkpoint."""
    seed: int = 0
    """Of weights, scenes and batches."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cuda or cpu."""
    scenes: int = 400_000
    """Number of training scenes."""
    workers: int = os.cpu_count() or 1
    """Processes that make the scenes."""
    vae_minutes: float = 1.5
    """Of the first stage. Here and below, resumed runs count towards the limit."""
    vae_steps: int | None = None
    """Of the first stage; no limit if not given."""
    vae_batch: int = 64
    """Pictures per step in the first and last stages."""
    flow_minutes: float = 8.0
    """Of the second stage."""
    flow_steps: int | None = None
    """Of the second stage; no limit if not given."""
    decoder_minutes: float = 1.0
    """Of the last stage."""
    decoder_steps: int | None = None
    """Of the last stage; no limit if not given."""
    batch: int = 256
    """Samples per step in the second stage."""
    prompts: int = 256
    """Number of held-out prompts to score with."""
    guidance: tuple[float, ...] = (4.0,)
    """Guidance scales to score with."""

    def budget(self, stage: str, facts: dict) -> Budget:
        """The budget of one stage, with the steps and time that a resumed run has used, from its `facts`."""
        minutes, steps = getattr(self, f"{stage}_minutes"), getattr(self, f"{stage}_steps")
        return Budget(minutes, steps, facts.get(f"{stage}_step", 0), facts.get(f"{stage}_seconds", 0.0))

    def recorded(self) -> dict:
        """The options that a checkpoint's facts record."""
        omitted = ("output_dir", "resume", "workers")
        return {name: value for name, value in asdict(self).items() if name not in omitted}


@fast_products()
def train(options: Options) -> None:
    """Train, save and score.

    Raises:
        ValueError: if there is no checkpoint to resume from, or the folder cannot be written to.
    """
    checkpoint = options.output_dir / "checkpoint"
    require_place(checkpoint, "training checkpoint", _is_checkpoint)
    torch.manual_seed(options.seed)
    parts, facts = make_parts(TRAINED, words()), {}
    initialise(parts)
    if options.resume:
        facts = load_checkpoint(parts, checkpoint)
        print("resumed after", ", ".join(f"{facts[f'{stage}_step']} {stage} steps" for stage in STAGES))
    log = Log(rows=facts.get("log", []))
    start = time.monotonic()
    data = make_data(options.scenes, options.seed, options.workers).to(torch.device(options.device))
    print(f"{len(data.numbers)} scenes made in {time.monotonic() - start:.0f} s", flush=True)
    budgets = {stage: options.budget(stage, facts) for stage in STAGES}

    def save() -> None:
        latents = {name: parts["vae"].config[name] for name in ("scaling_factor", "shift_factor")}
        facts = {"log": log.rows, "options": options.recorded(), **latents}
        for stage, budget in budgets.items():
            facts |= {f"{stage}_step": budget.step, f"{stage}_seconds": budget.seconds}
        save_checkpoint(parts, facts, checkpoint)

    vae, flow, decoder = budgets.values()
    if flow.step == 0:  # afterwards its latents must not change: the transformer is trained on them
        train_vae(parts["vae"], data, vae, options.vae_batch, options.seed, log)
        save()
    if not flow.is_spent:
        train_flow(parts, data, flow, options.batch, options.seed, log, save)
        save()
    train_decoder(parts["vae"], data, decoder, options.vae_batch, options.seed, log)
    save()
    finish(parts, options)


def finish(parts: dict[str, object], options: Options) -> None:
    """Write the pipeline folder, load it back, and record its gallery and scores."""
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.cpu()
    shutil.rmtree(options.output_dir / "pipeline", ignore_errors=True)
    folder = save_pipeline(parts, options.output_dir / "pipeline", "float16")
    on_gpu = torch.device(options.device).type == "cuda"
    pipe = Pipeline(str(folder), "float16" if on_gpu else "float32", options.device).load()
    gallery_of(pipe).save(options.output_dir / "gallery.png")
    prompts, scores = heldout_prompts(options.prompts), {}
    for guidance in options.guidance:
        found = evaluate(pipe, prompts, guidance=guidance, batch=128)
        print(f"guidance {guidance}: {found}", flush=True)
        scores[str(guidance)] = asdict(found)
        (options.output_dir / "scores.json").write_text(json.dumps(scores, indent=2))


def save_checkpoint(parts: dict[str, object], facts: dict, folder: Path) -> None:
    """Write all weights, in files of at most 15 MiB, and `facts`. Replaces an older checkpoint when complete."""
    with complete_folder(folder, "training checkpoint", _is_checkpoint) as unfinished:
        weights = {name: tensor.detach().float().cpu() for name, tensor in _all_weights(parts).named_parameters()}
        save_torch_state_dict(weights, unfinished, filename_pattern="weights{suffix}.safetensors", max_shard_size=SHARD)
        (unfinished / "facts.json").write_text(json.dumps(facts))


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "facts.json").is_file()


def load_checkpoint(parts: dict[str, object], folder: Path) -> dict:
    """Load the weights that `save_checkpoint` wrote into `parts`, and return its facts.

    Raises:
        ValueError: if there is no checkpoint, or its weights are not those of the model.
    """
    if not folder.is_dir():
        raise ValueError(f"no checkpoint to resume from: {folder} does not exist")
    weights = {}
    for path in sorted(folder.glob("weights*.safetensors")):
        weights |= load_file(path)
    parameters = dict(_all_weights(parts).named_parameters())
    if weights.keys() != parameters.keys():
        differing = sorted(weights.keys() ^ parameters.keys())
        raise ValueError(f"{folder} does not match the model; {len(differing)} names differ: {differing[:3]} ...")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    facts = json.loads((folder / "facts.json").read_text())
    parts["vae"].register_to_config(scaling_factor=facts["scaling_factor"], shift_factor=facts["shift_factor"])
    parts["vae"].eval().requires_grad_(False)
    return facts


def _all_weights(parts: dict[str, object]) -> nn.ModuleDict:
    return nn.ModuleDict({"vae": parts["vae"], **learners(parts)})


if __name__ == "__main__":
    train(tyro.cli(Options, prog="python -m training.train", config=(tyro.conf.FlagCreatePairsOff,)))
