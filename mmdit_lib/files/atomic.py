"""Folders and files that appear under their final name only when complete.

While `out` is written, these are beside it:

    .out.lock        held by the process that writes; a second one is refused
    .out.partial     what is complete so far
    .out.replaced    the older output, between the two renames of `_swap`

The system releases the lock of a killed process, and the next writer cleans up what it left behind.
On a file system without locks, two simultaneous writers are detected at the end, and both fail.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .interrupts import delayed_interrupts

NO_ROOM = {errno.ENOSPC: "disk full", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file too large"}


@contextmanager
def complete_folder(folder: Path, kind: str, is_kind: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary sibling to write in; renamed to `folder` at the end, removed if anything is raised.

    The next call removes what a killed process left behind. An older `folder` stays until the new
    one is complete. A symbolic link stays; the folder that it points to is written.

    Args:
        folder: must not exist, or be empty, or be of the same kind.
        kind: what the folder is, for messages: "checkpoint".
        is_kind: whether an existing folder is of that kind, so that no other folder is ever deleted.

    Raises:
        ValueError: if `folder` cannot be created or replaced (see `require_place`), another process is
            writing it, or the disk is full.
    """
    require_place(folder, kind, is_kind)
    folder = _real(folder)
    partial = _sibling(folder, "partial")
    with _disk_full_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _sole_writer(folder):
            try:
                _recover(folder)
                partial.mkdir()
                with _opened(partial) as made:
                    yield partial
                    if not os.path.samestat(partial.stat(), os.fstat(made)):
                        raise ValueError(f"{folder} was written by another process at the same time")
                    os.fsync(made)  # its entries, so that a power failure leaves all or nothing
                _require_writable(folder, kind)
                _require_kind(folder, kind, is_kind)
                with delayed_interrupts():
                    _swap(partial, folder)
            except FileNotFoundError:
                if partial.exists():
                    raise
                raise ValueError(f"{partial} was removed while {folder.name} was written") from None
            finally:
                with delayed_interrupts():
                    shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A temporary sibling with the same suffix; renamed to `path` at the end, removed if anything is raised.

    A symbolic link stays; the file that it points to is written.

    Raises:
        ValueError: if another process is writing it, or the disk is full.
    """
    path = _real(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    with _disk_full_named(path), _sole_writer(path):
        try:
            yield partial
            with _opened(partial) as made:
                os.fsync(made)  # before the rename, so that a power failure leaves one of the two whole files
            os.replace(partial, path)
        finally:
            with delayed_interrupts():
                partial.unlink(missing_ok=True)


def require_place(folder: Path, kind: str, is_kind: Callable[[Path], bool]) -> None:
    """Raises `ValueError` unless `complete_folder` may write there, or if another process is writing it."""
    folder = _real(folder)
    _require_writable(folder, kind)
    if _contains_other(folder, is_kind):
        with _sole_writer(folder):  # a process that replaces the folder right now makes it look incomplete
            _require_kind(folder, kind, is_kind)


def _require_writable(folder: Path, kind: str) -> None:
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"{there} exists and is a file; give the name of a folder")
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is a mount point and cannot be replaced as a whole; give a folder inside it")
    parent = folder.parent if there == folder else there
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"no permission to write in {parent}; give a folder elsewhere for the {kind}")


def _require_kind(folder: Path, kind: str, is_kind: Callable[[Path], bool]) -> None:
    if _contains_other(folder, is_kind):
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(f"{folder} contains something other than {article} {kind}; nothing there is overwritten")


def _contains_other(folder: Path, is_kind: Callable[[Path], bool]) -> bool:
    """Whether it exists, is not empty and is of another kind."""
    try:
        return any(folder.iterdir()) and not is_kind(folder)
    except FileNotFoundError:
        return False


def picture_file(name: str | Path) -> Path:
    """Raises `ValueError` if no image can be written to this name; called before the work starts."""
    path = Path(name).expanduser()
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or path.is_dir():
        raise ValueError(f"{name}: give an image file name such as picture.png")
    if not path.parent.is_dir():
        raise ValueError(f"{name}: folder {path.parent} does not exist")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):  # as long a name as will be written
            return path
    except OSError as error:
        raise ValueError(f"{name}: no file can be written in {path.parent}: {error.strerror}") from None


def require_space(folder: Path, nbytes: int) -> None:
    """Raises `ValueError` unless `nbytes` fit on the disk of `folder`, which exists."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ValueError(f"disk full: {nbytes} bytes are needed in {folder.parent}, {free} are free")


def _real(path: Path) -> Path:
    """`path` without symbolic links. Raises `ValueError` for a loop."""
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise ValueError(f"{path} is a symbolic link to itself")
    return real


def _sibling(path: Path, role: str) -> Path:
    return path.with_name(f".{path.name}.{role}")


@contextmanager
def _disk_full_named(path: Path) -> Iterator[None]:
    """A full disk raises `ValueError` that names `path`; the system names a temporary file, or none."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ValueError(f"{NO_ROOM[error.errno]}: no room for {path.name} in {path.parent}") from None


@contextmanager
def _sole_writer(path: Path) -> Iterator[None]:
    """Hold the lock of `path`. Raises `ValueError` if another process does."""
    lock, descriptor = _sibling(path, "lock"), None
    try:
        with delayed_interrupts():
            descriptor = _locked(lock, path)
        yield
    finally:
        if descriptor is not None:
            with delayed_interrupts():
                lock.unlink(missing_ok=True)  # before the lock is released, so this process's own
                os.close(descriptor)


def _locked(lock: Path, path: Path) -> int:
    """An open descriptor of the locked file."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"another process is writing {path}: wait until it ends, or give another name") from None
        except OSError:
            return descriptor  # a file system without locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        os.close(descriptor)  # its holder ended, and removed it, between the two calls


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file's or folder's descriptor. While it is open, the system gives the inode number to nothing else."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _recover(folder: Path) -> None:
    """Clean up after a killed process. One that died between the first two renames of `_swap` left the only copy."""
    partial, replaced = _sibling(folder, "partial"), _sibling(folder, "replaced")
    shutil.rmtree(partial, ignore_errors=True)
    if replaced.exists():
        os.rename(replaced, partial if folder.exists() else folder)
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`, and an older `folder` to `partial`."""
    if not folder.exists():
        os.rename(partial, folder)
        return
    replaced = _sibling(folder, "replaced")
    os.rename(folder, replaced)
    try:
        os.rename(partial, folder)
    except BaseException:
        os.rename(replaced, folder)
        raise
    os.rename(replaced, partial)
