"""Folders and files that appear under their final name only when complete."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_folder(folder: Path, kind: str, is_kind: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary sibling to write in; renamed to `folder` at the end, removed if anything is raised.

    The next call removes what a killed process left behind. An older `folder` stays until the new
    one is complete.

    Args:
        folder: must not exist, or be empty, or be of the same kind.
        kind: what the folder is, for messages: "checkpoint".
        is_kind: whether an existing folder is of that kind, so that no other folder is ever deleted.

    Raises:
        ValueError: if `folder` cannot be created or replaced (see `require_place`), or the disk is full.
    """
    require_place(folder, kind, is_kind)
    folder = folder.resolve()
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(folder)
        partial.mkdir()
        yield partial
        _sync(partial)
        require_place(folder, kind, is_kind)
        _swap(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"disk full: no room for {folder.name} in {folder.parent}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A temporary sibling with the same suffix; renamed to `path` at the end, removed if anything is raised."""
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def require_place(folder: Path, kind: str, is_kind: Callable[[Path], bool]) -> None:
    """Raises `ValueError` unless `complete_folder` may write there; creates nothing."""
    folder = folder.resolve()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"{there} exists and is a file; give the name of a folder")
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is a mount point and cannot be replaced as a whole; give a folder inside it")
    parent = folder.parent if there == folder else there
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"no permission to write in {parent}; give a folder elsewhere for the {kind}")
    if there == folder and any(folder.iterdir()) and not is_kind(folder):
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(f"{folder} contains something other than {article} {kind}; nothing there is overwritten")


def require_space(folder: Path, nbytes: int) -> None:
    """Raises `ValueError` unless `nbytes` fit on the disk of `folder`, which exists."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ValueError(f"disk full: {nbytes} bytes are needed in {folder.parent}, {free} are free")


def _swap(partial: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(partial, folder)
        return
    old = folder.parent / f".{folder.name}.replaced-{os.getpid()}"
    try:
        os.rename(folder, old)
        os.rename(partial, folder)
    finally:
        if old.exists() and not folder.exists():  # interrupted between the two, say by Ctrl-C
            os.rename(old, folder)
        shutil.rmtree(old, ignore_errors=True)


def _clean_up(folder: Path) -> None:
    """Remove what dead processes left behind. One that died between the two renames of `_swap` left the only copy."""
    name = re.compile(re.escape(f".{folder.name}.") + r"(partial|replaced)-(\d+)")
    for path in folder.parent.iterdir():
        match = name.fullmatch(path.name)
        if match is None or alive(int(match[2])):
            continue
        if match[1] == "replaced" and not folder.exists():
            os.rename(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def alive(pid: int) -> bool:
    """Whether another process on this machine has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return pid != os.getpid()


def _sync(folder: Path) -> None:
    """Flush the directory entries of `folder` to disk, so that a power failure leaves all or nothing."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
