"""The model card beside the weights: `python -m mmdit_lib.tiny.card --training OUT --output_dir WEIGHTS ...`.

Everything in it is read from what training wrote (OUT/checkpoint/facts.json, OUT/scores.json) or measured here (the
judge).
"""

import argparse
import json
import random
import textwrap
from pathlib import Path

from mmdit_lib.tiny.captions import Prompt, caption
from mmdit_lib.tiny.evaluation import Scores, score
from mmdit_lib.tiny.judge import look
from mmdit_lib.tiny.render import picture_of
from mmdit_lib.tiny.scenes import HELD_OUT, draw_scene

SIZES = ((128, 128), (96, 96), (192, 192), (96, 192), (192, 96))


def judge_accuracy(count: int = 500, seed: int = 99) -> Scores:
    """The judge's scores on procedural pictures, which are right by construction, at several sizes."""
    rng = random.Random(seed)
    prompts: list[Prompt] = [caption(draw_scene(rng, i % 2 == 1), rng, complete=True) for i in range(count)]
    seen = (look(picture_of(p.scene, *SIZES[i % len(SIZES)], seed=i)) for i, p in enumerate(prompts))
    return score(prompts, seen)


def loss_curve(log: list[list], path: Path) -> None:
    """One panel per stage: loss (logarithmic) against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = list(dict.fromkeys(row[0] for row in log))
    figure, axes = plt.subplots(1, len(stages), figsize=(4 * len(stages), 2.8), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        rows = [(step, loss) for name, step, _, loss in log if name == stage]
        axis.semilogy([step for step, _ in rows], [loss for _, loss in rows])
        axis.set(title=stage, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def card(facts: dict, scores: dict[str, dict], accuracy: Scores, hardware: str, command: str, notes: str) -> str:
    names = ("colour", "shape", "position", "size", "background", "count")
    rows = [f"| {scale} | " + " | ".join(f"{s[name]:.1%}" for name in names) + " |" for scale, s in scores.items()]
    stages = [
        f"| {stage} | {facts.get(f'{stage}_step', 0)} | {facts.get(f'{stage}_seconds', 0) / 60:.1f} |"
        for stage in ("vae", "flow", "decoder")
    ]
    first = next(iter(scores.values()))
    held_out = textwrap.fill(", ".join(" ".join(thing) for thing in sorted(HELD_OUT)), 120)
    right = ", ".join(f"{name} {getattr(accuracy, name):.1%}" for name in names)
    return f"""# Model card: a tiny Stable Diffusion 3

A complete `StableDiffusion3Pipeline` in half precision that draws one or two coloured shapes on a coloured background.
It has every architectural feature of SD3.5-medium and was trained from nothing on pictures and captions that a
procedure makes (`scenes.py`, `captions.py`, `render.py`): no data were downloaded, none need a licence.

## Training

```
{command}
```

{hardware}. Seed {facts["options"]["seed"]}; runs limited by minutes do not repeat bit by bit.
{textwrap.fill(notes, 120)}

| stage | steps | minutes |
| --- | --- | --- |
{chr(10).join(stages)}

`vae`: the autoencoder; `flow`: transformer and the three text encoders together; `decoder`: the autoencoder's decoder
alone. Batch {facts["options"]["batch"]} in the flow stage, {facts["options"]["scenes"]} scenes, weights averaged.

![loss curves](loss.png)

## What it draws

{first["prompts"]} held-out prompts ({first["objects"]} objects), 28 steps, 128 x 128 pixels, noise seeds
0 to {first["prompts"] - 1}, float16 on the machine above. Every prompt holds a combination that training never showed:
{held_out}.
`python -m mmdit_lib.tiny.evaluation` measures the same in float32 on your machine.

| guidance | {" | ".join(names)} |
| --- | {" | ".join("---" for _ in names)} |
{chr(10).join(rows)}

Judged from pixels by `judge.py`, which knows neither prompt nor model. On {accuracy.prompts} procedural pictures
({accuracy.objects} objects) it is right about: {right}.

## Limits

Prompts outside this small world give some picture, not the one asked for. Sizes from 96 to 192 pixels per side
(multiples of 16) were trained; the position table reaches to 384.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=Path, required=True, help="the --output_dir of the training")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--hardware", required=True, help="what it was trained on, in words")
    parser.add_argument("--command", required=True, help="how it was trained")
    parser.add_argument("--notes", default="")
    options = parser.parse_args()
    facts = json.loads((options.training / "checkpoint" / "facts.json").read_text())
    scores = json.loads((options.training / "scores.json").read_text())
    loss_curve(facts["log"], options.output_dir / "loss.png")
    text = card(facts, scores, judge_accuracy(), options.hardware, options.command, options.notes)
    (options.output_dir / "MODEL_CARD.md").write_text(text)
    print(f"{options.output_dir / 'MODEL_CARD.md'} written")


if __name__ == "__main__":
    main()
