"""What the subcommands share: the base of their options, and the parsing of values that tyro has no type for."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import tuning
from .._native import _C

MAX_SIDE = 65536


@dataclass(kw_only=True)
class Command:
    """Options of every subcommand."""

    debug: bool = False
    """Show the traceback where something fails."""

    def run(self) -> int | None:
        """Do the work; the exit status, None for 0."""
        raise NotImplementedError(f"{type(self).__name__} must define run()")


def sentence(error: BaseException) -> str:
    """What an exception has to say, on one line, without Python's decoration."""
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller --batch or --size"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of GPU memory: use a smaller --batch or --size"
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename is not None and os.fsdecode(error.filename) not in text:
            text = f"{os.fsdecode(error.filename)}: {text}"
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


@contextlib.contextmanager
def typed(argument: str, option: str) -> Iterator[None]:
    """While a `with` block runs, the library's sentences about an argument are about the option that was typed."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        text = str(error)
        if not text.startswith(f"{argument} "):
            raise
        # not of the error's own type, which a provider may have made and others may not be able to
        kind = next(kind for kind in (ValueError, TypeError, ImportError) if isinstance(error, kind))
        raise kind(option + text.removeprefix(argument)) from error


def check_file(path: Path, option: str) -> Path:
    """`path`, once there is something to read; the reader's own sentence would not say which option it came by."""
    if not path.exists():
        raise FileNotFoundError(f"{option}: there is no file {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{option} must be a file, got the folder {str(path)!r}")
    return path


def installed(package: str) -> bool:
    """Whether a package can be imported. A folder of its name without code, as caches leave one behind after pip
    uninstall, can be too, and is none: it has no origin."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """(width, height) of "WxH"."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(f"{option} must be WIDTHxHEIGHT in pixels, each 1 to {MAX_SIDE}, as 854x480; got {text!r}")
    return size


def parse_bytes(text: str, option: str) -> int:
    """Bytes of "8GiB", "500MB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*", text)
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{option} must be a number of bytes, as 8GiB or 500MB, got {text!r}")
    power = "_kMGT".index(match[2].replace("K", "k") or "_")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def parse_device(text: str) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:1"; ValueError where there is no such device."""
    if text == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if cuda_ready() else torch.device("cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if not match:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {text!r}")
    if text == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {text}: torch {torch.__version__} sees no CUDA device here; use --device cpu")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if match[1] is None else int(match[1])
    if index >= count:
        raise ValueError(f"--device {text}: there are {count} CUDA devices, numbered from 0")
    return torch.device("cuda", index)


def cuda_ready() -> bool:
    """Whether `auto` chooses the GPU: torch sees one, and the native module was built with the kernels."""
    return torch.cuda.is_available() and bool(_C.build_info()["cuda_stages"])


def check_batch(batch: int | None, file: Path | None) -> None:
    """--batch and --tuning, as far as they can be judged alone."""
    if batch is not None and batch < 1:
        raise ValueError(f"--batch must be at least 1, got {batch}")
    if batch is not None and file is not None:
        raise ValueError("give --batch or --tuning, not both: --batch goes before what was found")
    if file is not None:
        tuning.read(file)


def tuned(
    scene: Path, device: torch.device, width: int, height: int, n_gaussians: int, batch: int | None, file: Path | None
) -> tuple[int, int | None]:
    """Views in one call and the bytes it may take: as the user says, as `rapfast tune` found, of which a
    note on stderr tells, or the default."""
    if batch is not None:
        return batch, None
    found, said = tuning.load(scene, device, width, height, n_gaussians, file)
    if said is not None:
        print(f"note: {said}", file=sys.stderr)
    return (tuning.DEFAULT_BATCH, None) if found is None else (found.batch, found.max_memory)


def parse_background(text: str) -> tuple[float, float, float] | np.ndarray:
    """A colour "R,G,B" in 0..1, "black", "white", or a picture as float32 [H, W, 3] in 0..1."""
    named = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0)}
    if text in named:
        return named[text]
    parts = text.split(",")
    if len(parts) == 3:
        try:
            colour = tuple(float(part) for part in parts)
        except ValueError:
            colour = (np.nan,) * 3
        if not all(0.0 <= c <= 1.0 for c in colour):
            raise ValueError(f"--background must be R,G,B with each in 0..1, as 1,0.9,0.8; got {text!r}")
        return colour
    if not Path(text).exists():
        raise ValueError(f"--background must be R,G,B in 0..1, black, white or a picture; there is no file {text!r}")
    from ..media import read_image

    return read_image(text)
