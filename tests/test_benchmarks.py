"""The benchmarks' own logic; what they measure takes a GPU or hours."""

import json
from pathlib import Path

import pytest

from benchmarks import common, fp8_quality, tiny_scores


def test_an_engine_folder_is_used_again_only_for_the_same_sizes(tmp_path, monkeypatch):
    made = []

    def make(source, output, **options):
        made.append((output.name, options.get("max_batch_size")))
        output.mkdir()

    for name in ("convert", "build"):
        monkeypatch.setattr(fp8_quality, name, make)
    small = fp8_quality.engine("tiny", "float32", tmp_path)
    large = fp8_quality.engine("tiny", "float32", tmp_path, max_batch_size=16)
    assert small != large and [size for _, size in made] == [None, None, 16], "one conversion, two builds"
    assert fp8_quality.engine("tiny", "float32", tmp_path, max_batch_size=16) == large and len(made) == 3


def test_a_kill_during_a_write_keeps_the_earlier_rows(tmp_path, monkeypatch):
    common.save({"rows": [1]}, tmp_path / "found.json")
    write = Path.write_text

    def dies(path, text):
        write(path, text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", dies)
    with pytest.raises(KeyboardInterrupt):
        common.save({"rows": [1, 2]}, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == {"rows": [1]}


def test_scores_are_shown_with_their_own_conditions():
    rows = [json.loads(line) for line in (tiny_scores.RESULTS).read_text().splitlines()]
    assert tiny_scores.RESULTS.with_suffix(".md").read_text() == tiny_scores.report(rows)
    text = tiny_scores.report([*rows, rows[0] | {"run": "few", "prompts": 8, "steps": 4}])
    first, _, second = text.partition("8 held-out prompts (434 objects), 4 steps, guidance 4.0")
    assert "256 held-out prompts (434 objects), 28 steps" in first and "few" not in first
    assert [line for line in second.splitlines() if line.startswith("| few |")] and "engine-" not in second
