"""Folders that a command writes to: the system's reasons as sentences, and one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_errors(path: Path) -> Iterator[None]:
    """The system's reasons why an output folder cannot be made or read, as sentences."""
    try:
        yield
    except FileExistsError:
        raise NotADirectoryError(f"{path}: cannot be the output folder: it is a file") from None
    except NotADirectoryError:
        raise NotADirectoryError(f"{path}: cannot be made: a part of it is a file") from None
    except PermissionError:
        raise PermissionError(f"{path}: cannot be made or read: permission denied") from None


def make_folder(path: Path) -> None:
    """Make an output folder; the system's reasons as sentences."""
    with folder_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def lock_file(path: Path, what: str) -> int:
    """Open `path`, which is made where it does not exist, and lock it until it is closed or the process ends, however
    it ends. The file then holds the process's number. `what` is written to its folder: "this set".

    Raises:
        BlockingIOError: another process holds the lock; the sentence names it.
        OSError: the file cannot be written or locked.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise type(error)(error.errno, f"{path.parent}: cannot be written: {os.strerror(error.errno)}") from None
    _lock(file, path.parent, what)
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file


def lock_folder(path: Path, what: str) -> int:
    """As `lock_file`, by the folder itself and without a file in it."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _lock(file, path, what)
    return file


def _lock(file: int, folder: Path, what: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            holder = os.read(file, 20).decode(errors="replace").strip()
        except IsADirectoryError:
            holder = ""
        os.close(file)
        who = f"process {holder}" if holder.isdigit() else "another process"
        raise BlockingIOError(f"{folder}: {who} is writing {what}; wait for it, or name another folder") from None
    except OSError as error:
        os.close(file)
        raise OSError(
            f"{folder}: cannot be locked ({os.strerror(error.errno)}), which keeps two processes apart: name a "
            "folder on a local disk"
        ) from None
