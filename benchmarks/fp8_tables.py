"""The results of `fp8_quality.py` as Markdown."""

from __future__ import annotations


def report(found: dict) -> str:
    """All parts as Markdown tables."""
    text = (
        "# What FP8 costs in quality\n\nReproduce with `python -m benchmarks.fp8_quality` "
        "in the repository's root; the last part, on a GPU, with `python -m benchmarks.fp8_quality images`, where "
        "`--kinds` names its rows.\n"
    )
    titles = {
        "weights": "Relative error of rounding weights, by the choice of scales",
        "sizes": "GB of a checkpoint's tensors",
        "layers": "Error of the tiny model's output with some layers rounded, in float32, on inputs of real steps",
        "calibration": "Largest inputs over held-out prompts, divided by those of the calibration run (tiny model)",
        "models": "Error of one step's output against float32, for random inputs",
        "images": "Images of the tiny model",
    }
    notes = {
        "layers": "A margin says how far beyond the largest input of the calibration run a scale reaches; `convert` "
        "uses 4.",
        "images": "Scores are shares of objects, or of images, that are as the prompt says, judged from pixels "
        "(`training/judge.py`).",
    }
    for part, title in titles.items():
        if part not in found:
            continue
        content = dict(found[part])
        text += f"\n## {title}\n\nOn: {content.pop('device')}, torch {content.pop('torch')}.\n\n"
        text += f"{notes[part]}\n\n" if part in notes else ""
        if part == "images":
            pairs, scores = content.pop("PSNR in dB"), content.pop("scores")
            text += ", ".join(f"{name} {value}" for name, value in content.items()) + ".\n\n"
            text += f"{_table(scores, '.1%')}\nPeak signal-to-noise ratio (PSNR) between the images of two engines in "
            text += f"dB; higher is closer:\n\n{_table(pairs, '.1f')}"
        elif part == "calibration":
            text += _table({"all linear layers": content}, ".3g")
        else:
            text += _table(content, ".3%" if part == "weights" else ".3g")
    return text


def _table(rows: dict[str, dict], form: str) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for label, row in rows.items():
        cells = (
            f"{row[c]:{form}}" if c in row and c not in ("layers", "prompts") else str(row.get(c, "")) for c in columns
        )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
