"""Train the tiny Stable Diffusion 3 from nothing: `python -m mmdit_lib.tiny.train --output_dir OUT [--resume]`.

OUT/checkpoint holds what a resumed run continues from (averaged weights in float32; Adam's moments form again in the
warm-up), OUT/pipeline the finished diffusers folder in float16, OUT/scores.json and OUT/gallery.png what it draws.
"""

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmdit_lib.tiny.captions import heldout_prompts, words
from mmdit_lib.tiny.data import make_data
from mmdit_lib.tiny.evaluation import evaluate
from mmdit_lib.tiny.gallery import EXAMPLES, gallery_of
from mmdit_lib.tiny.model import TRAINED, make_parts, save_pipeline
from mmdit_lib.tiny.schedule import Budget, Log
from mmdit_lib.tiny.train_flow import initialise, learners, train_flow
from mmdit_lib.tiny.train_vae import train_decoder, train_vae

SHARD = 15 * 2**20  # bytes per checkpoint file, at most


def main() -> None:
    options = _options()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    parts, state = make_parts(TRAINED, words()), {}
    initialise(parts)
    checkpoint = options.output_dir / "checkpoint"
    if options.resume:
        state = load_checkpoint(parts, checkpoint)
        print(f"resumed at {state['vae_step']} and {state['flow_step']} steps")
    log = Log(rows=state.get("log", []))
    start = time.monotonic()
    data = make_data(options.scenes, options.seed, options.workers).to(options.device)
    print(f"{len(data.numbers)} scenes made in {time.monotonic() - start:.0f} s", flush=True)
    vae, flow, decoder = (_budget(stage, options, state) for stage in ("vae", "flow", "decoder"))

    def save() -> None:
        facts = dict(log=log.rows, options=_jsonable(options), **_latent_statistics(parts))
        for stage, budget in (("vae", vae), ("flow", flow), ("decoder", decoder)):
            facts |= {f"{stage}_step": budget.step, f"{stage}_seconds": budget.seconds}
        save_checkpoint(parts, facts, checkpoint)

    if flow.step == 0:  # the transformer knows one autoencoder's latents only
        train_vae(parts["vae"], data, vae, options.vae_batch, options.seed, log)
        save()
    if not flow.is_spent:
        train_flow(parts, data, flow, options.batch, options.seed, log, save)
        save()
    train_decoder(parts["vae"], data, decoder, options.vae_batch, options.seed, log)
    save()
    finish(parts, options)


def _budget(stage: str, options: argparse.Namespace, state: dict) -> Budget:
    minutes, steps = getattr(options, f"{stage}_minutes"), getattr(options, f"{stage}_steps")
    return Budget(minutes, steps, state.get(f"{stage}_step", 0), state.get(f"{stage}_seconds", 0.0))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=400_000, help="training scenes")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that make scenes")
    parser.add_argument("--vae_minutes", type=float, default=1.5)
    parser.add_argument("--vae_steps", type=int, help="stop the first stage here if its minutes last longer")
    parser.add_argument("--vae_batch", type=int, default=64)
    parser.add_argument("--flow_minutes", type=float, default=8.0, help="in all, resumed runs included")
    parser.add_argument("--flow_steps", type=int, help="stop the second stage here if its minutes last longer")
    parser.add_argument("--decoder_minutes", type=float, default=1.0)
    parser.add_argument("--decoder_steps", type=int, help="stop the last stage here if its minutes last longer")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts of the evaluation at the end")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0], help="scales to evaluate with")
    return parser.parse_args()


def finish(parts: dict, options: argparse.Namespace) -> None:
    """Write the pipeline folder, load it again as a user would, and record what it draws."""
    from diffusers import StableDiffusion3Pipeline

    for part in parts.values():
        if isinstance(part, nn.Module):
            part.cpu()
    shutil.rmtree(options.output_dir / "pipeline", ignore_errors=True)
    folder = save_pipeline(parts, options.output_dir / "pipeline", "float16")
    dtype = torch.float16 if options.device.type == "cuda" else torch.float32
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype).to(options.device)
    prompts, scores = heldout_prompts(options.prompts), {}
    gallery_of(pipe, EXAMPLES).save(options.output_dir / "gallery.png")
    for guidance in options.guidance:
        scores[str(guidance)] = evaluate(pipe, prompts, guidance=guidance, batch=128)
        print(f"guidance {guidance}: {scores[str(guidance)]}", flush=True)
        record = {name: asdict(score) for name, score in scores.items()}
        (options.output_dir / "scores.json").write_text(json.dumps(record, indent=2))


def save_checkpoint(parts: dict, facts: dict, folder: Path) -> None:
    """Replace `folder` by one that holds all weights, in files of at most 15 MiB, and `facts`."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    shard, size, number = {}, 0, 0
    for name, tensor in _all_weights(parts).named_parameters():
        if shard and size + 4 * tensor.numel() > SHARD:
            save_file(shard, unfinished / f"weights-{number}.safetensors")
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.detach().float().cpu().contiguous()
        size += shard[name].nbytes
    save_file(shard, unfinished / f"weights-{number}.safetensors")
    (unfinished / "facts.json").write_text(json.dumps(facts))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def load_checkpoint(parts: dict, folder: Path) -> dict:
    """Load what `save_checkpoint` wrote into `parts`; returns its facts."""
    if not folder.is_dir():
        raise ValueError(f"nothing to resume from: {folder} does not exist")
    weights = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        weights |= load_file(path)
    parameters = dict(_all_weights(parts).named_parameters())
    if weights.keys() != parameters.keys():
        raise ValueError(f"{folder} does not fit the model: {sorted(weights.keys() ^ parameters.keys())[:3]} ...")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    facts = json.loads((folder / "facts.json").read_text())
    parts["vae"].register_to_config(scaling_factor=facts["scaling_factor"], shift_factor=facts["shift_factor"])
    parts["vae"].eval().requires_grad_(False)
    return facts


def _all_weights(parts: dict) -> nn.ModuleDict:
    return nn.ModuleDict({"vae": parts["vae"], **learners(parts)})


def _latent_statistics(parts: dict) -> dict[str, float]:
    config = parts["vae"].config
    return dict(scaling_factor=config.scaling_factor, shift_factor=config.shift_factor)


def _jsonable(options: argparse.Namespace) -> dict:
    keep = {name: value for name, value in vars(options).items() if name not in ("output_dir", "resume", "workers")}
    return keep | {"device": options.device.type}


if __name__ == "__main__":
    main()
