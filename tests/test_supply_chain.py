"""No code comes with a model: no pickle is loaded, nobody's code is trusted, and what was downloaded is recorded."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import mmdit_lib
from mmdit_lib.checkpoint.manifest import version_of

ROOT = Path(__file__).parents[1]

# In a process of its own: pytest's workers and torch's tests use pickle themselves.
GUARD = """
import pickle, sys

import torch

def refuse(*arguments, **options):
    raise AssertionError("a pickle was loaded")

def audit(event, arguments):
    if event == "pickle.find_class":  # raised by every unpickler, however it was imported
        refuse()

class Refusing(pickle.Unpickler):  # a class, because others derive from it
    load = find_class = refuse

pickle.load = pickle.loads = torch.load = refuse
pickle.Unpickler = Refusing
sys.addaudithook(audit)
"""
WORK = """
from mmdit_lib import build, compare_layers, convert
from mmdit_lib.generate import generate
from mmdit_lib.reports.inspection import inspect

convert("tiny", "checkpoint", progress=False)
build("checkpoint", "engine", plan=False, progress=False)
inspect("engine")
compare_layers("tiny", "engine", resolution=64, text_tokens=77, batch=1)
picture = generate("a red circle", "tiny", "engine", resolution=64, num_inference_steps=1, device="cpu")
assert picture.image.size == (64, 64)
print("done")
"""
UNPICKLE = """
import _pickle
class Thing: pass
_pickle.loads(_pickle.dumps(Thing()))
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_convert_build_and_run_load_no_pickle(tmp_path):
    found = python(GUARD + WORK + UNPICKLE, tmp_path)
    assert found.stdout.endswith("done\n"), found.stderr[-3000:]
    assert found.returncode == 1 and "a pickle was loaded" in found.stderr, "the hook sees any unpickler"


def test_no_code_of_a_model_is_trusted():
    for folder in ("mmdit_lib", "training", "benchmarks", "notebooks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".ipynb"):
                text = path.read_text()
                assert "trust_remote_code" not in text, path
                assert not re.search(r"\btorch\.load\(|\bimport pickle\b|\bpickle\.loads?\(", text), path


def test_the_package_has_a_version_without_being_installed(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert version_of("mmdit_lib") == mmdit_lib.__version__
    assert version_of("torch") is None
