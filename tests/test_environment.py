"""pyproject.toml, constraints.txt, the conda environments, the Makefile and the licence are consistent."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mmdit_lib.reports import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest on Python 3.10

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CONDA_NAMES = {"matplotlib-base": "matplotlib"}
MISSION = ("jupyterlab", "tensorrt", "torch", "diffusers", "transformers", "mpi4py", "ipyparallel", "matplotlib")
FROM_CONDA = ("python", "pip")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    """Runtime dependencies and all extras."""
    lists = [project()["dependencies"], *project()["optional-dependencies"].values()]
    return [Requirement(line) for lines in lists for line in lines]


def pins(python: str) -> dict[str, str]:
    """Package -> the version in constraints.txt for this Python."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    found: dict[str, str] = {}
    for requirement in map(Requirement, lines):
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        (specifier,) = requirement.specifier
        name = canonicalize_name(requirement.name)
        assert specifier.operator == "==" and name not in found, f"{requirement}: one exact version per package"
        found[name] = specifier.version
    return found


def conda(file: str) -> dict[str, SpecifierSet]:
    """Package -> versions, from a conda environment and its pip section."""
    content = yaml.safe_load((ROOT / file).read_text())
    assert content["name"] and content["channels"]
    found: dict[str, SpecifierSet] = {}
    for entry in content["dependencies"]:
        for line in entry["pip"] if isinstance(entry, dict) else [entry]:
            if line.startswith("--"):
                continue
            name, versions = re.fullmatch(r"([\w.-]+)\s*(.*)", line).groups()
            name = CONDA_NAMES.get(name, name)
            found[canonicalize_name(name)] = SpecifierSet(re.sub(r"^=(\d[\d.]*)$", r"==\1.*", versions))
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_bounds(python):
    pinned = pins(python)
    for requirement in requirements():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes the pin {version}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_conda_environment_admits_the_pins(python):
    pinned, listed = pins(python), conda("environment.yml")
    assert listed.keys() - pinned.keys() == set(FROM_CONDA)
    for name in listed.keys() - set(FROM_CONDA):
        assert listed[name].contains(pinned[name]), f"environment.yml: {name}{listed[name]} excludes {pinned[name]}"


def test_the_conda_environment_is_complete():
    listed = conda("environment.yml")
    assert set(MISSION) <= listed.keys()
    assert {SpecifierSet(project()["requires-python"])} == {listed["python"]}
    bounds = {canonicalize_name(r.name): r.specifier for r in requirements()}
    for name in listed.keys() & bounds.keys():
        assert set(bounds[name]) <= set(listed[name]), (
            f"environment.yml admits versions of {name} that pyproject.toml does not"
        )


def test_doctor_supports_the_same_pythons():
    (first, *_, last) = PYTHONS
    assert [".".join(map(str, version)) for version in doctor.PYTHONS] == [first, last]
    minors = range(8, 20)
    assert [f"3.{minor}" for minor in minors if f"3.{minor}" in SpecifierSet(project()["requires-python"])] == [
        *PYTHONS
    ]


def test_tensorrt_llm_needs_its_own_environment():
    text, apart = (ROOT / "environment.yml").read_text(), conda("environment-tensorrt-llm.yml")
    assert f"tensorrt-llm{apart['tensorrt-llm']}" in text and "environment-tensorrt-llm.yml" in text
    here, there = conda("environment.yml")["tensorrt"], apart["tensorrt"]
    assert here.contains("11.4.0.106") and not there.contains("11.4.0.106"), "one environment would be enough"
    assert there.contains("10.14.1.48.post1") and not here.contains("10.14.1.48.post1")


def test_the_library_can_be_installed_beside_tensorrt_llm():
    theirs = {"torch": "2.9.1", "transformers": "4.57.3", "numpy": "1.26.4"}
    bounds = {canonicalize_name(r.name): r.specifier for r in requirements()}
    apart = conda("environment-tensorrt-llm.yml")
    for name, version in theirs.items():
        assert apart[name].contains(version) and bounds[name].contains(version), name


@pytest.mark.parametrize("file", ["environment.yml", "environment-tensorrt-llm.yml"])
def test_what_was_resolved_is_what_the_environment_asks_for(file):
    text = (ROOT / "docs" / "resolved-environments.md").read_text()
    section = text.split(f"\n## {file}\n")[1].split("\n## ")[0]
    found = {canonicalize_name(name): version for name, version in re.findall(r"([\w.-]+)==([\w.+-]+)", section)}
    entries = yaml.safe_load((ROOT / file).read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in entries if isinstance(entry, dict))
    asked = [Requirement(line) for line in pip if not line.startswith("--")]
    if file == "environment.yml":
        extras = project()["optional-dependencies"]
        asked += map(Requirement, [*project()["dependencies"], *extras["onnx"], *extras["notebooks"], *extras["dev"]])
    for requirement in asked:
        version = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version} was resolved"


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in names}


def test_what_the_library_imports_is_declared():
    declared = {canonicalize_name(r.name) for r in requirements()}
    packages = {"PIL": "pillow", "IPython": "ipykernel", "tokenizers": "transformers", "huggingface_hub": "diffusers"}
    packages["triton"] = "torch"  # torch for CUDA on Linux requires it
    packages |= {"tensorrt_rtx": "tensorrt-rtx-cu13", "tensorrt": "tensorrt-cu13"}
    for file in (ROOT / "mmdit_lib").rglob("*.py"):
        foreign = imported(file) - set(sys.stdlib_module_names) - {"mmdit_lib"}
        missing = {name for name in foreign if canonicalize_name(packages.get(name, name)) not in declared}
        assert not missing, f"{file.relative_to(ROOT)} imports {missing}, which pyproject.toml does not name"


def test_no_file_names_a_host_to_install_from():
    for name in ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run"):
        assert not re.search(r"https?://|index-url|find-links", (ROOT / name).read_text()), name


def test_the_licence_is_apache_2():
    assert project()["license"] == "Apache-2.0" and "LICENSE" in project()["license-files"]
    words = (ROOT / "LICENSE").read_text().split()
    assert words[:4] == ["Apache", "License", "Version", "2.0,"]


# The Makefile, run with a fake Python --------------------------------------------------------------


def make(tmp_path: Path, first: str, *targets: str) -> subprocess.CompletedProcess:
    """Run `make` with a Python that executes `first` before its own code, to imitate another version or a lack."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; {first}; exec(sys.argv[1])" "$2"\n')
    python.chmod(0o755)
    command = ["make", "--no-print-directory", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", *targets]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0)])
def test_an_unsuitable_python_is_refused_in_one_line(tmp_path, version):
    run = make(tmp_path, f"sys.version_info = {version}", "demo")
    shown = ".".join(map(str, version))
    assert run.returncode != 0
    (line,) = run.stdout.splitlines()
    assert "needs Python 3.10 to 3.13" in line and f"is {shown}" in line
    assert not (tmp_path / "venv").exists()


def test_a_python_without_venv_says_what_to_install(tmp_path):
    run = make(tmp_path, "sys.modules['venv'] = None", "test")
    assert run.returncode != 0
    (line,) = run.stdout.splitlines()
    assert "apt-get install python3-venv" in line


def test_an_install_that_fails_leaves_no_stamp(tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / ".created").touch()
    (tmp_path / "venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "venv" / "bin" / "python").chmod(0o755)
    assert make(tmp_path, "pass", "demo").returncode != 0
    assert [path.name for path in (tmp_path / "venv").iterdir() if "installed" in path.name] == []


def test_help_lists_every_target():
    text = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True).stdout
    targets = ["help", "demo", "test", "quick", "lab", "docs", "lint", "format", "clean"]
    assert re.findall(r"make (\w+)", text) == targets


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and script.read_text().rstrip().endswith("exec make test")
