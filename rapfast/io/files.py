"""Opening and checking input files: what every reader needs before it trusts a byte.

Readers raise `OSError` where the operating system says no and `ValueError` where the content is wrong; both
are sentences that begin with the path.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

#: JSON grows about twentyfold when it becomes Python objects, so its size on disk is capped.
MAX_JSON_BYTES = 256 << 20

PathLike = str | os.PathLike


def check_regular(path: PathLike) -> Path:
    """`path` as a `Path`, once it is known to name a regular file (a FIFO would block, a device never end).

    Raises:
        TypeError: `path` is not a path.
        FileNotFoundError, IsADirectoryError, PermissionError, OSError: as the name says.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or os.PathLike, got a {type(path).__name__}")
    if "\0" in os.fsdecode(path):
        raise ValueError(f"path must not hold a NUL character, got {os.fsdecode(path)!r}")
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except PermissionError:
        raise PermissionError(f"{path}: permission denied") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path}: is a directory, a file was expected")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path}: is not a regular file")
    return path


def open_regular(path: PathLike) -> BinaryIO:
    """Open a regular file for reading bytes; raises as `check_regular`."""
    path = check_regular(path)
    try:
        return path.open("rb")
    except PermissionError:
        raise PermissionError(f"{path}: permission denied") from None


def read_capped(path: PathLike, limit: int, what: str) -> bytes:
    """The whole file, refused with a `ValueError` where it is longer than `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path}: {what} of {size:,} bytes is over the limit of {limit:,}")
        return file.read(size)  # not the limit: a sized read allocates its size first


def load_json(path: PathLike) -> Any:
    """Parse a JSON file of at most `MAX_JSON_BYTES`. Raises ValueError for anything that is not UTF-8 JSON."""
    data = read_capped(path, MAX_JSON_BYTES, "a JSON file")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{path}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def shorten(value: Any, limit: int = 80) -> str:
    """repr of a value from a file, cut so that an error message stays a sentence."""
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**30:  # repr of a huge int can itself be refused
        return "an integer over 1e30"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def number(value: Any, where: str) -> float:
    """A finite JSON number as float; `where` opens the error sentence ("file: frame 3: fl_x")."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} must be a number, got {shorten(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"{where} must be finite, got {shorten(value)}")
    return result


def integer(value: Any, where: str) -> int:
    """A JSON number that is a whole number (800 and 800.0 alike) as int."""
    result = number(value, where)
    if result != math.floor(result):
        raise ValueError(f"{where} must be a whole number, got {shorten(value)}")
    return int(result)


def array(value: Any, shapes: tuple[tuple[int, ...], ...], where: str) -> np.ndarray:
    """Nested JSON lists as a float64 array of one of the given shapes (of one or two dimensions)."""
    for shape in shapes:
        if _has_shape(value, shape):
            flat = value if len(shape) == 1 else [x for row in value for x in row]
            return np.array([number(x, where) for x in flat], dtype=np.float64).reshape(shape)
    names = " or ".join("x".join(map(str, shape)) for shape in shapes)
    raise ValueError(f"{where} must be {names} numbers in nested lists, got {shorten(value)}")


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    if not isinstance(value, list) or len(value) != shape[0]:
        return False
    return len(shape) == 1 or all(_has_shape(row, shape[1:]) for row in value)
