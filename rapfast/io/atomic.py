"""Writing files so that a reader sees the old content or the new, never a half.

The new content goes to a temporary file beside the target and is renamed over it at the end (`os.replace` is
atomic within a file system, POSIX rename(2)). Whatever goes wrong before, the target keeps its old content.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from .files import PathLike

# What the disk says when it cannot take more bytes; all of them leave the old file untouched.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def check_writable(path: PathLike) -> Path:
    """The real path (symbolic links followed) that writing to `path` would replace.

    Raises:
        FileNotFoundError: the folder does not exist (it is never made silently).
        NotADirectoryError, IsADirectoryError, PermissionError, OSError: as the name says.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or os.PathLike, got a {type(path).__name__}")
    if "\0" in os.fsdecode(path):
        raise ValueError(f"path must not hold a NUL character, got {os.fsdecode(path)!r}")
    target = Path(os.path.realpath(path))
    folder = target.parent
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    except NotADirectoryError:
        raise NotADirectoryError(f"{path}: cannot be written: {folder} is not a folder") from None
    except PermissionError:
        raise PermissionError(f"{path}: cannot be written: permission denied in {folder}") from None
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path}: cannot be written: it is a folder")
    if mode is not None and not stat.S_ISREG(mode):
        # Renaming over a device or a FIFO would remove it.
        raise OSError(errno.EINVAL, f"{path}: cannot be written: it is not a regular file")
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"{path}: cannot be written: {folder} is not a folder")
        raise FileNotFoundError(f"{path}: cannot be written: the folder {folder} does not exist")
    if mode is not None and not os.access(target, os.W_OK):
        raise PermissionError(f"{path}: cannot be written: the file is read-only")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: cannot be written: the folder {folder} is read-only")
    return target


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Context manager that yields a temporary path beside `path`, with the same ending.

    Write to the yielded path by any means and close it. On a clean exit the file is flushed to disk and renamed
    to `path`; on an exception (an interrupt too) it is removed and `path` keeps what it held. Permissions are
    those of the file being replaced, or the process's defaults for a new one.

    Raises:
        OSError: the target cannot be written (see `check_writable`), or the disk is full; the sentence names `path`.
    """
    target = check_writable(path)
    # The tail keeps every suffix (writers choose the format by it) and stays under the 255-byte limit on names.
    temporary = target.with_name(f".{secrets.token_hex(6)}-{target.name[-40:]}")
    try:
        # Made here, not by the caller: an unwritable folder shows before any work is done.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise _named(error, path) from error
    try:
        try:
            if target.exists():
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            yield temporary
            _flush_to_disk(temporary)
            os.replace(temporary, target)
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                raise _named(error, path) from error
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    # The rename itself must survive a power cut; some file systems cannot fsync a folder, and need not.
    with contextlib.suppress(OSError):
        _flush_to_disk(target.parent)


def atomic_write(path: PathLike, data: bytes) -> None:
    """Replace the content of `path` by `data` in one step; raises as `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named(error: OSError, path: PathLike) -> OSError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return type(error)(error.errno, f"{os.fspath(path)}: could not be written: {reason}; what was there before is kept")
