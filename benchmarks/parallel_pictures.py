"""Whole images on two GPUs: rank 0 encodes the text, both run the steps, rank 0 decodes. Random weights.

    python -m benchmarks.parallel graphs --folder graphs    # needs TensorRT (tensorrt_rtx), but no GPU
    mpirun -n 2 python -m benchmarks.parallel_pictures run --folder graphs --output pictures2.json    # two GPUs
    python -m benchmarks.parallel_pictures table --results pictures2.json    # as Markdown

Sizes and parts are those of `pictures.py`: 28 steps with guidance, each a CUDA graph; text encoders and VAE eagerly.
"""

from __future__ import annotations

import json
import statistics
import time
from argparse import Namespace
from itertools import pairwise

import torch
import torch.distributed as dist

from mmdit_lib.config import Layout
from mmdit_lib.reports.bench import conditions
from mmdit_lib.sd3.companions import vae

from . import common
from .parallel import LAYOUTS, MODELS, Ranks, backend
from .pictures import SIDE, Ours, Parts, now, pipeline

STEPS, GUIDANCE = 28, 4.5


class Painter:
    """One model in one layout, on this rank."""

    def __init__(self, ranks: Ranks, options: Namespace, name: str, layout: str, weights: dict, parts: Parts | None):
        device, config = ranks.device, MODELS[name]
        opened = common.with_cuda_graphs(backend(ranks, options.folder, name, layout, weights))
        with torch.device(device):  # on every rank: the pipeline takes its device from it
            decoder = parts.vae if parts else vae(torch.bfloat16, SIDE)
        self.pipe = pipeline(Ours(opened, config, device), decoder)
        self.parts, self.device, self.config = parts, device, config
        self.several = LAYOUTS[layout].world_size > 1

    def paint(self) -> list[float]:
        """Seconds for the text encoders, sending their result, the steps and the VAE."""
        times = [now()]
        text = torch.empty(2, common.TEXT_TOKENS, self.config.joint_attention_dim, device=self.device).bfloat16()
        pooled = torch.empty(2, self.config.pooled_projection_dim, device=self.device).bfloat16()
        if self.parts:
            for to, found in zip((text, pooled), self.parts.encode(2), strict=True):
                to.copy_(found)
        times.append(now())
        if self.several:
            for x in (text, pooled):
                dist.broadcast(x, 0)
        times.append(now())
        latents = self.pipe(
            prompt_embeds=text[:1], pooled_prompt_embeds=pooled[:1], negative_prompt_embeds=text[1:],
            negative_pooled_prompt_embeds=pooled[1:], num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIDE,
            width=SIDE, output_type="latent", generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        times.append(now())
        if self.parts:
            config = self.parts.vae.config
            image = self.parts.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
            (image.nan_to_num().clamp(-1, 1) * 127.5 + 127.5).byte().cpu()
        times.append(now())
        return [end - start for start, end in pairwise(times)]


@torch.inference_mode()
def run(options: Namespace) -> None:
    ranks = Ranks("cuda")
    ranks.join(Layout(cfg_size=2))
    torch.manual_seed(0)
    parts = Parts(ranks.device) if ranks.rank == 0 else None
    result = {"hardware": f"2 x {torch.cuda.get_device_name()}", "conditions": conditions(ranks.device),
              "attention": common.attention_kernel(), "date": time.strftime("%Y-%m-%d"), "repeats": options.repeats,
              "rows": []}  # fmt: skip
    for name in options.models:
        weights = common.draw_weights(MODELS[name], ranks.device)
        for layout in LAYOUTS:
            painter = Painter(ranks, options, name, layout, weights, parts)
            first = sum(painter.paint())
            found = [painter.paint() for _ in range(options.repeats)]
            seconds = [round(statistics.median(part), 3) for part in zip(*found, strict=True)]
            result["rows"].append({"model": name, "layout": layout, "first": round(first, 2), "seconds": seconds})
            if ranks.rank == 0:
                print(json.dumps(result["rows"][-1]), flush=True)
                common.save(result, options.output)
            dist.barrier()
            del painter
            common.free()
        del weights
        common.free()
    dist.destroy_process_group()


def table(result: dict) -> list[str]:
    """The result as Markdown."""
    lines = [
        f"{result['hardware']}; {result['conditions']}; {result['date']}. Seconds per image of {SIDE}x{SIDE} pixels on "
        f"rank 0: bf16, random weights, {STEPS} steps with guidance; median of {result['repeats']}. Text encoders and "
        f"VAE run on rank 0 only; the image is not converted to PIL. Attention: {result['attention']}.",
        "",
    ]
    head = ["", "text encoders", "sending", "steps", "VAE", "sum", "1 GPU / this", "first image"]
    cells = []
    alone = {row["model"]: sum(row["seconds"]) for row in result["rows"] if row["layout"] == "1 GPU"}
    for row in result["rows"]:
        total = sum(row["seconds"])
        parts = [f"{x:.3f}" for x in row["seconds"]]
        ratios = [f"{total:.2f}", f"{alone[row['model']] / total:.2f}x", f"{row['first']:.2f}"]
        cells.append([f"SD3.5-{row['model']}, {row['layout']}", *parts, *ratios])
    return [*lines, *common.markdown(head, cells)]


def main() -> None:
    parser = common.parser(__doc__, MODELS, ["medium", "large"], "pictures2.json", repeats=3)
    common.main(parser.parse_args(), write_graphs, run, "Whole images on two GPUs", table)


def write_graphs(options: Namespace) -> None:
    raise SystemExit("python -m benchmarks.parallel graphs writes the graphs")


if __name__ == "__main__":
    main()
