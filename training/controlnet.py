"""Train a ControlNet for the tiny model that places objects where an image of their outlines shows them:

    python -m training.controlnet --output OUT

OUT/controlnet is in float16, for diffusers' `SD3ControlNetModel.from_pretrained`; a resumed run continues from
OUT/checkpoint; OUT/scores.json and OUT/samples.png show how accurately objects are placed.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdit_lib.files import complete_folder, require_place

from .adapters import SIDE, STROKE, batches, side_by_side
from .data import Data, tokenize
from .evaluation import Pipeline, draw
from .layouts import Placing, control_picture, draw_layout, heldout_layouts, judge_layouts, outlines
from .optimise import fast_products, fit
from .render import encode_placed
from .schedule import Budget, Log
from .train_flow import fast_encoder, flow_loss
from .train_vae import encode

ADAM_RATE, MUON_RATE = 1e-3, 3e-3
WEIGHTS, FACTS = "diffusion_pytorch_model.safetensors", "facts.json"


@dataclass(frozen=True)
class Options:
    """Train a ControlNet for the tiny model's transformer, and score pictures with and without it.

    Training ends when the minutes or the steps are used up, whichever comes first.
    """

    output: Path
    """Folder for controlnet/, checkpoint/, scores.json and samples.png."""
    resume: bool = False
    """Continue from OUTPUT/checkpoint."""
    layers: int = 3
    """Transformer blocks of the ControlNet."""
    minutes: float = 15.0
    """Minutes of training, including the runs that are resumed."""
    steps: int | None = None
    """Training steps; no limit by default."""
    batch: int = 128
    """Samples per step."""
    scenes: int = 100_000
    """Number of training scenes."""
    seed: int = 0
    """Seed of weights, scenes and batches."""
    prompts: int = 64
    """Number of held-out prompts to score with."""


@fast_products()
def train(pipeline: Pipeline, options: Options) -> None:
    """Train, save and score.

    Raises:
        ValueError: if there is no checkpoint to resume from, or the folder cannot be written to.
    """
    checkpoint, finished = options.output / "checkpoint", options.output / "controlnet"
    require_place(checkpoint, "training checkpoint", is_checkpoint)
    torch.manual_seed(options.seed)
    pipe = pipeline.load()
    controlnet, facts = make_controlnet(pipe.transformer, options.layers).to(pipe.device), {}
    if options.resume:
        facts = load_checkpoint(controlnet, checkpoint)
        print(f"resumed after {facts['step']} steps", flush=True)
    log = Log(every=10, rows=facts.get("log", []))
    budget = Budget(options.minutes, options.steps, facts.get("step", 0), facts.get("seconds", 0.0))

    def save() -> None:
        with complete_folder(checkpoint, "training checkpoint", is_checkpoint) as unfinished:
            controlnet.save_pretrained(unfinished)
            facts = {"step": budget.step, "seconds": budget.seconds, "log": log.rows}
            (unfinished / FACTS).write_text(json.dumps(facts))

    if not budget.is_spent:
        data = make_layouts(options.scenes, options.seed + budget.step).to(pipe.device)
        clean, control = encode_layouts(pipe.vae, data)
        inputs = batches(data, clean, options.batch, options.seed + budget.step, control)
        parts = frozen_parts(pipe) | {"controlnet": controlnet}
        how = dict(adam_rate=ADAM_RATE, muon_rate=MUON_RATE, warmup=100, checkpoint=save)
        fit("controlnet", controlnet, lambda *x: flow_loss(parts, *x), inputs, budget, log, **how)
        save()
    with complete_folder(finished, "ControlNet", lambda folder: (folder / WEIGHTS).is_file()) as unfinished:
        copy.deepcopy(controlnet).half().save_pretrained(unfinished)
    finish(pipe, SD3ControlNetModel.from_pretrained(finished, torch_dtype=pipe.dtype).to(pipe.device), options)


def make_controlnet(transformer, layers: int) -> SD3ControlNetModel:
    """A ControlNet whose blocks have no text stream, as in SD3.5's, with a position table of its own, as in SD3's.

    Its embeddings, including that of the control image, start as the transformer's. Its output starts at zero, so it
    changes nothing before training.
    """
    unused = ("num_layers", "joint_attention_dim", "dual_attention_layers", "qk_norm")
    config = {name: value for name, value in transformer.config.items() if name not in unused and name[0] != "_"}
    controlnet = SD3ControlNetModel(**config, num_layers=layers, joint_attention_dim=None)
    for name in ("pos_embed", "time_text_embed"):
        getattr(controlnet, name).load_state_dict(getattr(transformer, name).state_dict())
    controlnet.pos_embed_input.proj.load_state_dict(transformer.pos_embed.proj.state_dict())
    return controlnet


def is_checkpoint(folder: Path) -> bool:
    return (folder / FACTS).is_file()


def load_checkpoint(controlnet: SD3ControlNetModel, folder: Path) -> dict:
    """Load the weights of a saved run, and return its facts.

    Raises:
        ValueError: if there is no checkpoint, or its ControlNet has other dimensions.
    """
    if not is_checkpoint(folder):
        raise ValueError(f"no checkpoint to resume from: {folder} does not exist")
    weights, expected = load_file(folder / WEIGHTS), controlnet.state_dict()
    if {name: x.shape for name, x in weights.items()} != {name: x.shape for name, x in expected.items()}:
        raise ValueError(f"{folder} does not match the model; use the same --layers")
    controlnet.load_state_dict(weights)
    return json.loads((folder / FACTS).read_text())


def make_layouts(count: int, seed: int) -> Data:
    """Random layouts, none of them held out, with captions that do not give exact positions."""
    rng = random.Random(seed)
    layouts = [draw_layout(rng) for _ in range(count)]
    numbers = torch.tensor([encode_placed(x.prompt.scene.background, x.things) for x in layouts])
    return Data(numbers, *map(torch.from_numpy, tokenize([x.prompt.text for x in layouts])))


def frozen_parts(pipe: StableDiffusion3Pipeline) -> dict:
    """The components that training uses but does not change; on a GPU, copies in bfloat16, in which `fit` trains."""
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
            parts[name] = copy.deepcopy(part).to(torch.bfloat16) if pipe.device.type == "cuda" else part
    return parts


def encode_layouts(vae, data: Data) -> tuple[Tensor, Tensor]:
    """Latents of the pictures and of their control images, float16."""
    vae, scenes = fast_encoder(vae, data.numbers.device), data.numbers.split(512)
    clean = [encode(vae, part, SIDE, SIDE).half() for part in scenes]
    return torch.cat(clean), torch.cat([encode_control(vae, part).half() for part in scenes])


@torch.no_grad()
def encode_control(vae, numbers: Tensor) -> Tensor:
    """Latents of the outlines of scenes, as `StableDiffusion3ControlNetPipeline` encodes them: not shifted."""
    return encode(vae, outlines(numbers), SIDE, SIDE, STROKE) + vae.config.shift_factor * vae.config.scaling_factor


def finish(pipe: StableDiffusion3Pipeline, controlnet: SD3ControlNetModel, options: Options) -> None:
    """Score and show pictures with and without the ControlNet."""
    torch.manual_seed(options.seed)  # of the sampled latents of control images
    layouts = heldout_layouts(options.prompts)
    texts, images = [x.prompt.text for x in layouts], [control_picture(x) for x in layouts]
    plain = draw(pipe, texts, max_sequence_length=77)
    controlled = StableDiffusion3ControlNetPipeline(**pipe.components, controlnet=controlnet)
    drawn = draw(controlled, texts, images, max_sequence_length=77)
    found: dict[str, Placing] = {"without": judge_layouts(layouts, plain), "with": judge_layouts(layouts, drawn)}
    for name, placing in found.items():
        print(f"{name} the ControlNet: {placing}", flush=True)
    scores = {name: asdict(placing) for name, placing in found.items()}
    (options.output / "scores.json").write_text(json.dumps(scores, indent=2))
    side_by_side(texts, plain, images, drawn).save(options.output / "samples.png")


if __name__ == "__main__":
    tyro.cli(
        train, prog="python -m training.controlnet", config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    )
