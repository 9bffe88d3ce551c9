"""The benchmarks' own logic; what they measure takes a GPU or hours."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import MODELS

from benchmarks import common, fp8_quality, layer_parity, tiny_scores
from mmdit_lib.config import BuildConfig, Resolution


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


def test_layer_parity_finds_a_wrong_weight(tmp_path, monkeypatch):
    """The benchmark of full-size models, with a small one on a CPU."""
    profile = BuildConfig.one_size(Resolution.read(64), common.BATCH, common.TEXT_TOKENS)
    monkeypatch.setattr(layer_parity, "PROFILE", profile)
    monkeypatch.setitem(layer_parity.MODELS, "small", MODELS["sd3.5-medium"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9)
    layer_parity.write_graphs(Namespace(models=["small"], folder=tmp_path))
    right = layer_parity.measure("small", tmp_path, torch.device("cpu"))
    assert right["ok"] and 0 < right["output"] <= 5e-6 and right["verdict"].startswith("all ")
    make = common.diffusers_transformer

    def wrong(*arguments):
        reference = make(*arguments)
        layer = reference.transformer_blocks[1].attn.to_v
        layer.weight = torch.nn.Parameter(layer.weight * 1.001)
        return reference

    monkeypatch.setattr(common, "diffusers_transformer", wrong)
    found = layer_parity.measure("small", tmp_path, torch.device("cpu"))
    assert not found["ok"] and "transformer_blocks.1.attn.to_v" in found["verdict"]


def test_scores_are_shown_with_their_own_conditions():
    rows = [json.loads(line) for line in (tiny_scores.RESULTS).read_text().splitlines()]
    assert tiny_scores.RESULTS.with_suffix(".md").read_text() == tiny_scores.report(rows)
    text = tiny_scores.report([*rows, rows[0] | {"run": "few", "prompts": 8, "steps": 4}])
    first, _, second = text.partition("8 held-out prompts (434 objects), 4 steps, guidance 4.0")
    assert "256 held-out prompts (434 objects), 28 steps" in first and "few" not in first
    assert [line for line in second.splitlines() if line.startswith("| few |")] and "engine-" not in second
