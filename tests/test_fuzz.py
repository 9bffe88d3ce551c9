"""A short run of the fuzzer; `python -m tests.fuzz --count 10000` is the long one. Also: that it sees faults."""

from pathlib import Path
from random import Random

import pytest
from fuzz import campaign as fuzzer
from fuzz.campaign import FAULTS, campaign, judge
from fuzz.cases import Case, same
from fuzz.damage import damages


@pytest.mark.slow
def test_damaged_folders_are_refused_or_give_the_same_result():
    outcomes = list(campaign(seed=0, indices=range(150), processes=2))
    faults = [outcome for outcome in outcomes if outcome.verdict in FAULTS]
    assert len(outcomes) == 150 and not faults, faults[:3]
    verdicts = [outcome.verdict for outcome in outcomes]
    assert verdicts.count("refused") > 100 and verdicts.count("same result") > 5
    assert len({outcome.case for outcome in outcomes}) == len(fuzzer.CASES)


def verdict(run, expected=None) -> str:
    return judge(Case("made up", (), "", run), Path(), expected or {"weights": 1})[0]


def fail(error: BaseException):
    def run(folder):
        raise error

    return run


def spin(folder):
    while True:
        pass


def test_the_fuzzer_tells_faults_from_refusals(monkeypatch):
    assert verdict(lambda folder: {"weights": 1}) == "same result"
    assert verdict(lambda folder: {"weights": 2}) == "another result"
    assert verdict(fail(ValueError("config.json: num_layers: Field required"))) == "refused"
    assert verdict(fail(ValueError("one line\nand another"))) == "traceback"
    assert verdict(fail(ValueError(""))) == "traceback"
    assert verdict(fail(UnicodeDecodeError("utf-8", b"", 0, 1, "nameless"))) == "traceback"
    assert verdict(fail(KeyError("num_layers"))) == "traceback"
    assert verdict(fail(MemoryError())) == "over the limits"
    assert verdict(lambda folder: {"weights": len(bytearray(3 << 30))}) == "over the limits"
    monkeypatch.setattr(fuzzer, "SECONDS", 0.2)
    assert verdict(spin) == "over the limits"
    # What was built for another number of ranks has other graphs; its weights must be the same.
    first, second = ({"weights": 1, "choices": n, "graphs": n} for n in (1, 2))
    assert same(first, second) and not same(first, second | {"weights": 2}) and not same(first, first | {"graphs": 3})


def test_damages_change_the_file_and_are_repeatable(tmp_path):
    for name in ("config.json", "rank0.safetensors"):
        path = tmp_path / name
        text = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        content = text if path.suffix == ".json" else len(text).to_bytes(8, "little") + text + bytes(8)
        for damage in damages(path, checksummed=True):
            results = []
            for seed in (0, 1, 2, 0):
                path.write_bytes(content)
                damage(Random(seed), path)
                results.append(path.read_bytes())
            assert results[0] == results[3] and set(results) != {content}, damage
