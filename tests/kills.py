"""Kill commands, or press Ctrl-C, at random moments, or run two at once, and look at what is left.

    python -m tests.kills --count 100 --seed 0

Each try is a process of its own, forked from this one, which has imported everything. Half of the tries write
over an older result. Moments are drawn by the clock, between the command's start and its usual end, or by
counting: just before the n-th time that it opens, creates, renames, locks or removes a file.

After a kill, what loads must be the whole older or the whole new result; nothing else may have a final name;
and a second run must succeed, with the right result and nothing beside it. After Ctrl-C, the exit code must be
130, with one line and nothing left behind. Exits with 1 if anything of this does not hold.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

import mmdit_lib.__main__ as entry
from mmdit_lib import Checkpoint, EngineFolder, cli
from mmdit_lib.checkpoint.random_weights import write_random_transformer
from mmdit_lib.checkpoint.source import find_source
from mmdit_lib.files.records import sha256_of
from mmdit_lib.network.trt import installed
from mmdit_lib.sd3 import SD3Config

torch.set_num_threads(1)  # a forked process has no other threads

MODEL = SD3Config(
    sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=16,
    pos_embed_max_size=12, dual_attention_layers=(), qk_norm=None,
)  # fmt: skip
FILE_OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock")
"""Audit events of Python; `open` counts too, for paths in the output's folder."""
TEMPORARY = {".out.lock", ".out.partial", ".out.replaced"}
FINISHED = "ended before"
"""A try whose signal came too late; it does not count."""
FIRST_MOMENT = 0.01
"""Seconds: until then a forked process has not reached the command."""


# The commands ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command that writes a folder; {names} in its arguments are those of `sources`."""

    older: tuple[str, ...]
    """Arguments of `mmdit` that write the older result; the output is appended."""
    newer: tuple[str, ...]
    load: Callable[[Path], Any]
    """Verify a result; returns what distinguishes the older from the newer. Raises `ValueError` if it is not whole."""


def checkpoint(folder: Path) -> Any:
    return Checkpoint.open(folder, verify=True).files


def engine(folder: Path) -> Any:
    opened = EngineFolder.open(folder)
    opened.verify()
    return opened.build_config, sorted(opened.files)


def transformer(folder: Path) -> Any:
    """Sizes and shapes are checked; diffusers' format has no checksums, so the bytes are compared by the caller."""
    find_source(folder)
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


CONVERT = ("convert", "--no-progress", "--model_path")
EXPORT = ("export", "--no-progress", "--checkpoint_dir")
BUILD = ("build", "--no-progress", "--checkpoint_dir", "{checkpoint0}", "--max_batch_size")
COMMANDS = {
    "convert": Command((*CONVERT, "{model0}"), (*CONVERT, "{model1}"), checkpoint),
    "export": Command((*EXPORT, "{checkpoint0}"), (*EXPORT, "{checkpoint1}"), transformer),
    "build": Command((*BUILD, "2"), (*BUILD, "4"), engine),
}


def sources(root: Path) -> dict[str, Path]:
    """Two models and their checkpoints, written in `root`."""
    there = {}
    for i in (0, 1):
        model = write_random_transformer(root / f"model{i}", MODEL, "float32", seed=i)
        there |= {f"model{i}": model, f"checkpoint{i}": cli.convert(model, root / f"checkpoint{i}", progress=False)}
    return there


def commands(root: Path) -> dict[str, Command]:
    """`COMMANDS` with their sources, which are written in `root`."""
    there = sources(root)
    return {
        name: Command(*(tuple(a.format(**there) for a in part) for part in (row.older, row.newer)), row.load)
        for name, row in COMMANDS.items()
    }


# One process -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int
    """The exit code, or minus the signal's number."""
    errors: list[str]
    """Lines on stderr."""
    seconds: float
    operations: int


class Process:
    """`mmdit arguments --output_dir output`, forked from this process.

    Args:
        number: a signal that it gets just before its file operation `before`.
    """

    def __init__(self, arguments: tuple[str, ...], output: Path, number: int = 0, before: int = 0):
        self.said, self.count = output.parent.with_suffix(f".{time.monotonic_ns()}"), mmap.mmap(-1, 8)
        self.start = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            watch(output.parent, self.count, number, before)
            child((*arguments, "--output_dir", str(output)), self.said)

    def wait(self) -> Ended:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        seconds = time.perf_counter() - self.start
        errors = self.said.read_text().splitlines() if self.said.exists() else []
        self.said.unlink(missing_ok=True)
        return Ended(code, errors, seconds, int.from_bytes(self.count[:8], "little"))


def run(arguments: tuple[str, ...], output: Path, number: int = 0, *, after: float = 0, before: int = 0) -> Ended:
    """Run the command; signal `number` comes after so many seconds, or before that file operation."""
    process = Process(arguments, output, number, before)
    if after:
        time.sleep(after)
        os.kill(process.pid, number)
    return process.wait()


def watch(place: Path, count: mmap.mmap, number: int, before: int) -> None:
    """Count this process's file operations in `count`; send it the signal before operation `before`."""

    def hook(event: str, arguments: tuple) -> None:
        if event in FILE_OPERATIONS or (event == "open" and str(arguments[0]).startswith(f"{place}{os.sep}")):
            done = int.from_bytes(count[:8], "little") + 1
            count[:8] = done.to_bytes(8, "little")
            if done == before:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def child(arguments: tuple[str, ...], said: Path) -> None:
    """Run the command as the `mmdit` script does, and end the process."""
    code = 0
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        tqdm.set_lock(threading.RLock())  # the default one is shared with forks, and a killed one may hold it
        sys.argv = ["mmdit", *arguments]
        entry.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


# Many tries ------------------------------------------------------------------------------------------


class Tries:
    """Random tries of one command."""

    def __init__(self, name: str, root: Path, command: Command, drawn: random.Random):
        self.name, self.command, self.random = name, command, drawn
        self.output = root / name / "out"
        self.output.parent.mkdir()
        self.older = self.result_of(command.older)
        self.kept = Path(shutil.copytree(self.output, root / f"{name}-older"))
        self.usual = {"older": run(command.newer, self.output)}
        self.newer = command.load(self.output)
        shutil.rmtree(self.output)
        self.usual["nothing"] = run(command.newer, self.output)
        assert self.older != self.newer
        self.faults: list[str] = []

    @property
    def seconds(self) -> float:
        """What the command took the last time that it was let be."""
        return self.usual["nothing"].seconds

    def result_of(self, arguments: tuple[str, ...]) -> Any:
        ended = run(arguments, self.output)
        assert ended.code == 0, ended.errors
        return self.command.load(self.output)

    def state(self, name: str = "out") -> str:
        """What is under this name."""
        folder = self.output.with_name(name)
        try:
            found = self.command.load(folder)
        except ValueError as error:
            return f"refused: {error}" if folder.exists() or "\n" in str(error) else "nothing"
        return {str(self.older): "older", str(self.newer): "newer"}.get(str(found), "a mix")

    def prepare(self) -> str:
        """Put the older result in place, or nothing, at random; returns which."""
        had = self.random.choice(("older", "nothing"))
        shutil.rmtree(self.output, ignore_errors=True)
        if had == "older":
            shutil.copytree(self.kept, self.output)
        return had

    def stopped(self, number: signal.Signals, by_the_clock: bool) -> str:
        """Stop one run by a signal; returns what was then found under the final name, and adds to `faults`."""
        had = self.prepare()
        if by_the_clock:
            moment = {"after": self.random.uniform(FIRST_MOMENT, max(self.seconds, 2 * FIRST_MOMENT))}
        else:
            moment = {"before": self.random.randint(1, self.usual[had].operations)}
        ended = run(self.command.newer, self.output, number, **moment)
        found, left = self.state(), {path.name for path in self.output.parent.iterdir()} - {"out"}
        case = f"{self.name}, {number.name} {moment}, over {had}"
        finished = ended.code == 0
        good = found == "newer" if finished else found in (had, "newer", "nothing")
        good = good and "a mix" not in map(self.state, left)
        if found == "nothing" != had:  # between the two renames
            good = good and self.state(".out.replaced") == had
        if number == signal.SIGINT and not finished:
            good = good and ended.code == 130 and len(ended.errors) == 1 and found in (had, "newer")
        elif not finished:
            good = good and ended.code == -number
        if not good or left - (TEMPORARY if number == signal.SIGKILL else set()):
            self.faults.append(f"{case}: exit code {ended.code}, found {found}, {sorted(left)}, {ended.errors[-1:]}")
        if number == signal.SIGKILL:
            self.again(case)
        return FINISHED if finished else found + (", temporary files beside it" if left else "")

    def together(self) -> str:
        """Two processes write the same folder at the same time; returns what came of it, and adds to `faults`."""
        self.prepare()
        first = Process(self.command.older, self.output)
        time.sleep(self.random.uniform(0, self.seconds))
        second = Process(self.command.newer, self.output)
        ends = {"older": first.wait(), "newer": second.wait()}
        wrong = [
            ended for ended in ends.values()
            if ended.code and (ended.code != 1 or len(ended.errors) != 1 or "another process is" not in ended.errors[0])
        ]  # fmt: skip
        last = [name for name, ended in ends.items() if ended.code == 0]
        if wrong or self.state() not in last or os.listdir(self.output.parent) != ["out"]:
            self.faults.append(f"{self.name}, two at once: {self.state()}, {ends}")
        return "both wrote, one after the other" if len(last) == 2 else "one wrote, the other was refused"

    def again(self, case: str) -> None:
        """A further run must succeed."""
        ended = run(self.command.newer, self.output)
        found, beside = self.state(), os.listdir(self.output.parent)
        if ended.code or ended.errors or found != "newer" or beside != ["out"]:
            self.faults.append(f"{case}: the next run ended with {ended.code}, {found}, {beside}, {ended.errors[-1:]}")
        self.usual["nothing"] = replace(self.usual["nothing"], seconds=ended.seconds)


WAYS: dict[str, Callable[[Tries], str]] = {
    "killed, by the clock": lambda tries: tries.stopped(signal.SIGKILL, True),
    "killed, before a file operation": lambda tries: tries.stopped(signal.SIGKILL, False),
    "Ctrl-C, by the clock": lambda tries: tries.stopped(signal.SIGINT, True),
    "Ctrl-C, before a file operation": lambda tries: tries.stopped(signal.SIGINT, False),
    "two at once": Tries.together,
}


def main(
    count: int = 100, seed: int = 0, only: tuple[str, ...] = tuple(COMMANDS), ways: tuple[str, ...] = tuple(WAYS)
) -> None:
    """Print how often what was found.

    Args:
        count: tries of each command in each way; those that end before the signal comes are not counted.
        seed: of the moments.
        only: the commands to try.
        ways: the ways to try.
    """
    assert installed(), "build needs TensorRT"  # and imports it before the forks
    faults = []
    print("| command | how | tries | what was then found under the final name |\n|---|---|---:|---|")
    with tempfile.TemporaryDirectory(prefix="mmdit-kills-") as folder:
        there = commands(Path(folder))
        gc.freeze()  # or a collection in each forked process would copy all memory
        for name in only:
            tries = Tries(name, Path(folder), there[name], random.Random(f"{seed} {name}"))
            for way in ways:
                found = Counter()
                with tqdm(total=count, desc=f"{name}, {way}", leave=False) as bar:
                    while bar.n < count:
                        what = WAYS[way](tries)
                        found[what] += 1
                        bar.update(what != FINISHED)
                listed = "; ".join(f"{what}: {times}" for what, times in sorted(found.items()))
                print(f"| {name} | {way} | {count} | {listed} |", flush=True)
            faults += tries.faults
    print(f"\n{len(faults)} faults", *faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    tyro.cli(main)
