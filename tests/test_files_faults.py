"""Disks, permissions, links, names and neighbors that go wrong: one line, exit code 1, the older output kept.

tests/kills.py has what takes real processes: kills, Ctrl-C and two writers at random moments.
"""

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import mmdit
from kills import COMMANDS, commands
from matplotlib.figure import Figure
from PIL import Image

import mmdit_lib.__main__
from mmdit_lib import EngineFolder
from mmdit_lib.checkpoint.tensor_file import StoredTensor
from mmdit_lib.engine import build as build_module
from mmdit_lib.files import atomic, complete_file, complete_folder
from mmdit_lib.tiny import demo

REPOSITORY = Path(__file__).parents[1]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The commands, in a folder that every user can read, and the older result of each."""
    root = Path(tempfile.mkdtemp(prefix="mmdit-faults-"))
    root.chmod(0o755)
    found = commands(root)
    for name, command in found.items():
        run(command.older, root / "older" / name)
    yield root, found
    shutil.rmtree(root)


@pytest.fixture(params=COMMANDS)
def case(request, made):
    """A command, and a copy of its older result at `output`, alone in its folder."""
    root, found = made
    place = Path(tempfile.mkdtemp(prefix="place-", dir=root))
    place.chmod(0o755)
    shutil.copytree(root / "older" / request.param, place / "out")
    yield Case(request.param, found[request.param], place / "out")
    shutil.rmtree(place, ignore_errors=True)


class Case:
    def __init__(self, name, command, output: Path):
        self.name, self.command, self.output = name, command, output
        self.older = command.load(output)

    def reads(self, source: Path, instead_of: Path) -> None:
        newer = (str(source) if word == str(instead_of) else word for word in self.command.newer)
        self.command = replace(self.command, newer=tuple(newer))

    def succeeds(self, output: Path | None = None) -> None:
        quick = ("--no-plan",) if self.name == "build" else ()
        run((*self.command.newer, *quick), output or self.output)
        assert self.command.load(output or self.output) != self.older

    def refused(self, *words: str, output: Path | None = None, kept: bool = True) -> None:
        """One line with all `words`, exit code 1; the older output is all there is in the folder."""
        code, _, err = mmdit(*self.command.newer, "--output_dir", output or self.output)
        assert code == 1 and err.count("\n") <= 1 and err.startswith("mmdit: "), err
        for word in words:
            assert word in err, err
        if kept:
            assert os.listdir(self.output.parent) == ["out"] and self.command.load(self.output) == self.older


def run(arguments, output: Path) -> None:
    code, _, err = mmdit(*arguments, "--output_dir", output)
    assert (code, err) == (0, "")


@contextmanager
def mounted(place: Path, *options: str):
    """A small file system of its own at `place`."""
    if subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting needs privileges")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@contextmanager
def as_nobody():
    """Act as a user without any permission."""
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


# Disks and permissions -------------------------------------------------------------------------------


def test_a_file_that_is_too_large_for_the_file_system(case):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        case.refused("file too large: no room for out in ")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_older_output(case):
    size = sum(path.stat().st_size for path in case.output.iterdir())
    disk = case.output.parent / "disk"
    disk.mkdir()
    with mounted(disk, "-o", f"size={size * 3 // 2 // 4096 * 4}k"):  # no room for a second one
        output = Path(shutil.copytree(case.output, disk / "out"))
        code, _, err = mmdit(*case.command.newer, "--output_dir", output)
        assert code == 1 and "disk full: " in err and err.count("\n") <= 1, err
        assert os.listdir(disk) == ["out"] and case.command.load(output) == case.older


@needs_root
def test_a_read_only_file_system(case):
    disk = case.output.parent / "disk"
    disk.mkdir()
    with mounted(disk):
        output = Path(shutil.copytree(case.output, disk / "out"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        case.refused(f"no permission to write in {disk}", output=output, kept=False)
        assert os.listdir(disk) == ["out"] and case.command.load(output) == case.older


@needs_root
def test_another_users_folder(case):
    with as_nobody():
        case.refused(f"no permission to write in {case.output.parent}")


@needs_root
def test_a_source_that_may_not_be_read(case, made):
    for file in (file for name in ("model1", "checkpoint0", "checkpoint1") for file in (made[0] / name).iterdir()):
        file.chmod(0o600)
    case.output.parent.chmod(0o777)
    try:
        with as_nobody():
            case.refused("Permission denied: ", str(made[0]))
    finally:
        for file in (file for name in ("model1", "checkpoint0", "checkpoint1") for file in (made[0] / name).iterdir()):
            file.chmod(0o644)


# What is removed or written meanwhile ----------------------------------------------------------------


@pytest.mark.parametrize("what", ["source", "output's folder"])
@pytest.mark.parametrize("case", ["convert"], indirect=True)
def test_removed_while_it_is_converted(case, what, made, tmp_path, monkeypatch):
    source = Path(shutil.copytree(made[0] / "model1", tmp_path / "source"))
    case.reads(source, instead_of=made[0] / "model1")
    read = StoredTensor.read_into

    def removing(self, buffer):
        shutil.rmtree(source if what == "source" else case.output.parent, ignore_errors=True)
        return read(self, buffer)

    monkeypatch.setattr(StoredTensor, "read_into", removing)
    if what == "source":
        case.refused("No such file or directory", str(source))
    else:
        case.refused(".out.partial was removed while out was written", kept=False)


@pytest.mark.parametrize("case", ["build"], indirect=True)
def test_a_checkpoint_removed_while_it_is_built_from(case, made, tmp_path, monkeypatch):
    source = Path(shutil.copytree(made[0] / "checkpoint0", tmp_path / "source"))
    verify = build_module.Checkpoint.verify

    def removing(self):
        verify(self)
        shutil.rmtree(source)

    case.reads(source, instead_of=made[0] / "checkpoint0")
    monkeypatch.setattr(build_module.Checkpoint, "verify", removing)
    case.refused("No such file or directory", str(source))


def test_two_writers(case):
    with atomic._sole_writer(case.output):
        code, _, err = mmdit(*case.command.newer, "--output_dir", case.output)
        assert code == 1 and f"another process is writing {case.output}" in err and err.count("\n") <= 1
        assert case.command.load(case.output) == case.older
    case.succeeds()
    assert os.listdir(case.output.parent) == ["out"]


def test_a_folder_that_is_being_replaced_is_not_foreign(tmp_path):
    """Between the two renames of another writer, the folder looks incomplete to a check without the lock."""
    folder, looks = tmp_path / "out", [False, True]
    folder.mkdir()
    (folder / "file").touch()
    with atomic._sole_writer(folder), pytest.raises(ValueError, match="another process is writing"):
        atomic.require_place(folder, "result", lambda found: False)
    atomic.require_place(folder, "result", lambda found: looks.pop(0))
    assert not looks
    with pytest.raises(ValueError, match="something other than a result"):
        atomic.require_place(folder, "result", lambda found: False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_without_locks(tmp_path, monkeypatch):
    """On such a file system both fail: a mix of two results never appears."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    writers = [complete_folder(tmp_path / "out", "folder", lambda folder: True) for _ in range(2)]
    first, second = (writer.__enter__() for writer in writers)
    assert first == second
    with pytest.raises(ValueError, match="out was written by another process at the same time"):
        writers[0].__exit__(None, None, None)
    with pytest.raises(ValueError, match=r"out\.partial was removed while out was written"):
        writers[1].__exit__(None, None, None)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_removed(case):
    """Also what it left in the middle of removing."""
    place = case.output.parent
    for role in ("partial", "replaced"):
        shutil.copytree(case.output, place / f".out.{role}")
    (place / ".out.lock").touch()
    case.succeeds()
    assert os.listdir(place) == ["out"]


def test_the_only_copy_is_restored(case, monkeypatch):
    """The next run restores what a process killed between the renames had moved aside, even if that run fails."""
    case.output.rename(case.output.parent / ".out.replaced")

    def fails(*_):
        raise ValueError("out of luck")

    monkeypatch.setattr(atomic.os, "fsync", fails)
    case.refused("out of luck")


# Links and names -------------------------------------------------------------------------------------


def test_links_stay_links(case, tmp_path):
    for link, target in (("to_a_folder", case.output), ("dangling", tmp_path / "elsewhere" / "out")):
        (tmp_path / link).symlink_to(target)
        case.succeeds(tmp_path / link)
        assert (tmp_path / link).is_symlink() and case.command.load(target) != case.older
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    case.succeeds(tmp_path / "folder" / "out")
    assert os.listdir(tmp_path / "elsewhere") == ["out"]


def test_a_link_to_itself(case, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    case.refused("loop is a symbolic link to itself", output=tmp_path / "loop")
    case.refused("loop", output=tmp_path / "loop" / "out")


def test_a_picture_through_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    for left in (".picture.partial.png", ".picture.png.lock"):  # by a killed process
        (tmp_path / "there" / left).touch()
    (tmp_path / "picture.png").symlink_to("there/picture.png")
    for content in ("older", "newer"):
        with complete_file(tmp_path / "picture.png") as partial:
            partial.write_text(content)
        assert (tmp_path / "picture.png").is_symlink() and (tmp_path / "picture.png").read_text() == content
    assert os.listdir(tmp_path / "there") == ["picture.png"]


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda file: (done.append("fsync"), sync(file)))
    monkeypatch.setattr(atomic.os, "replace", lambda *paths: (done.append("replace"), rename(*paths)))
    with complete_file(tmp_path / "picture.png") as partial:
        partial.write_text("content")
    assert done == ["fsync", "replace"] and (tmp_path / "picture.png").read_text() == "content"


def test_the_demo_leaves_no_incomplete_image(tmp_path, monkeypatch):
    image = Image.new("RGB", (8, 8))
    assert [path.name for path in demo.save_images(tmp_path, image, image)] == ["picture.png", "beside_diffusers.png"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(self, file, **_):
        Path(file).write_text("half")
        raise OSError(errno.ENOSPC, "no space")

    for writer in (Figure, Image.Image):
        monkeypatch.setattr(writer, "savefig" if writer is Figure else "save", fails)
        with pytest.raises(ValueError, match="disk full: no room for"):
            demo.save_images(tmp_path, image, image)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["two words", "naïve 模型 😀", "a'b\"c$HOME*?", os.fsdecode(b"not utf-8: \xff"), "~"])
def test_names(case, tmp_path, name):
    (tmp_path / name).mkdir()
    case.succeeds(tmp_path / name / name)
    assert os.listdir(tmp_path / name) == [name]


@pytest.mark.parametrize("case", ["convert"], indirect=True)
def test_the_name_of_the_output_need_not_be_printable(case, tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(
        sys, "argv", ["mmdit", *case.command.newer, "--output_dir", os.fsdecode(bytes(tmp_path) + b"/\xff")]
    )
    mmdit_lib.__main__.main()
    stdout.flush()
    assert stdout.buffer.getvalue().endswith(b"/\\udcff\n")


def test_an_engine_in_a_folder_with_an_odd_name_finds_its_checkpoint(made, tmp_path):
    place = tmp_path / "naïve 模型"
    checkpoint = shutil.copytree(made[0] / "checkpoint0", place / "a checkpoint")
    run(["build", "--no-progress", "--no-plan", "--checkpoint_dir", str(checkpoint)], place / "an engine")
    place.rename(tmp_path / "moved 😀")
    assert EngineFolder.open(tmp_path / "moved 😀" / "an engine").open_checkpoint().weights()


def test_a_name_that_is_too_long(case):
    case.refused("File name too long", output=case.output.parent / ("x" * 300))


# Ctrl-C ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_imported(tmp_path):
    command = [sys.executable, "-m", "mmdit_lib", "convert", "--model_path", "tiny", "--output_dir", tmp_path / "out"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        while not Path(f"/proc/{process.pid}/maps").read_text().count("libtorch"):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "mmdit: interrupted; no incomplete output is left\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_few_random_kills():
    """The figures of many are in benchmarks/results/kills.md."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--count", "2"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0 and "\n0 faults\n" in done.stdout, done.stdout + done.stderr
