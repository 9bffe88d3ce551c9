"""Write the model card next to the weights: `python -m training.card --training OUT --output_dir WEIGHTS ...`.

Its numbers come from what the training wrote (OUT/checkpoint/facts.json, OUT/scores.json), except the judge's accuracy,
which is measured here.
"""

from __future__ import annotations

import json
import random
import textwrap
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from .captions import Prompt, caption
from .evaluation import ASPECTS, Scores, score
from .judge import look
from .render import picture_of
from .scenes import HELD_OUT, draw_scene

SIZES = ((128, 128), (96, 96), (192, 192), (96, 192), (192, 96))


def judge_accuracy(count: int = 500, seed: int = 99) -> Scores:
    """The judge's scores on rendered pictures, which are correct by construction, at several sizes."""
    rng = random.Random(seed)
    prompts: list[Prompt] = [caption(draw_scene(rng, i % 2 == 1), rng, complete=True) for i in range(count)]
    seen = (look(picture_of(p.scene, *SIZES[i % len(SIZES)], seed=i)) for i, p in enumerate(prompts))
    return score(prompts, seen)


def loss_curve(log: list[list], path: Path) -> None:
    """Plot the loss, on a logarithmic axis, against steps, with one panel per training stage."""
    stages = list(dict.fromkeys(row[0] for row in log)) or ["no losses: every stage took fewer than 50 steps"]
    figure = Figure(figsize=(4 * len(stages), 2.8), layout="tight")
    for axis, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        rows = [(step, loss) for name, step, _, loss in log if name == stage]
        axis.semilogy([step for step, _ in rows], [loss for _, loss in rows])
        axis.set(title=stage, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=80)


def card(facts: dict, scores: dict[str, dict], accuracy: Scores, hardware: str, command: str, notes: str) -> str:
    """The model card, in Markdown.

    Args:
        facts: from the checkpoint of the training.
        scores: by guidance scale, as training wrote them.
        accuracy: of the judge.
        hardware, command, notes: see `main`.
    """
    rows = [f"| {scale} | " + " | ".join(f"{s[name]:.1%}" for name in ASPECTS) + " |" for scale, s in scores.items()]
    stages = [
        f"| {stage} | {facts.get(f'{stage}_step', 0)} | {facts.get(f'{stage}_seconds', 0) / 60:.1f} |"
        for stage in ("vae", "flow", "decoder")
    ]
    options, first = facts["options"], next(iter(scores.values()))
    prompts, objects = first["prompts"], first["objects"]
    held_out = textwrap.fill(", ".join(" ".join(thing) for thing in sorted(HELD_OUT)), 120)
    right = ", ".join(f"{name} {getattr(accuracy, name):.1%}" for name in ASPECTS)
    return f"""# Model card: a tiny Stable Diffusion 3

A complete `StableDiffusion3Pipeline` in half precision that draws one or two coloured shapes on a coloured background.
It has the architectural features of SD3.5-medium and was trained from scratch on generated pictures and captions
(`training/scenes.py`, `captions.py`, `render.py`), so no data was downloaded and none needs a licence.

## Training

```
{command}
```

{hardware}. Seed {options["seed"]}; runs limited by minutes are not reproducible bit for bit.
{textwrap.fill(notes, 120)}

| stage | steps | minutes |
| --- | --- | --- |
{chr(10).join(stages)}

`vae`: the autoencoder; `flow`: the transformer and the three text encoders; `decoder`: the autoencoder's decoder only.
Batch size {options["batch"]} in the flow stage, {options["scenes"]} scenes, weights averaged over steps.

![loss curves](loss.png)

## How well it follows prompts

{prompts} held-out prompts ({objects} objects), 28 steps, 128x128 pixels, noise seeds 0 to {prompts - 1}, float16 on the
hardware above. Every prompt contains a combination that is absent from the training data:
{held_out}.
`python -m training.evaluation` measures the same in float32 on your machine.

| guidance | {" | ".join(ASPECTS)} |
| --- | {" | ".join("---" for _ in ASPECTS)} |
{chr(10).join(rows)}

Judged from pixels alone by `training/judge.py`. Its own accuracy on {accuracy.prompts} rendered pictures
({accuracy.objects} objects): {right}.

## Limits

Prompts about anything else give arbitrary pictures. Trained on sizes from 96 to 192 pixels per side (multiples of 16);
the position table extends to 384.
"""


def main(*, training: Path, output_dir: Path, hardware: str, command: str, notes: str = "") -> None:
    """Write MODEL_CARD.md and loss.png for a trained model.

    Args:
        training: the --output_dir of the training.
        output_dir: an existing folder, for instance the pipeline's.
        hardware: what it was trained on, in words.
        command: the command that trained it.
        notes: a sentence or two about the run.
    """
    facts = json.loads((training / "checkpoint" / "facts.json").read_text())
    scores = json.loads((training / "scores.json").read_text())
    loss_curve(facts["log"], output_dir / "loss.png")
    path = output_dir / "MODEL_CARD.md"
    path.write_text(card(facts, scores, judge_accuracy(), hardware, command, notes))
    print(f"written: {path}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m training.card")
