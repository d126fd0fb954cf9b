"""What `rapfast tune` found: how many views to render in one call, and in how much memory, per GPU and image size.

The file lies beside the scene, `scene.ply.tuning.json`, or in the folder of a model, `tuning.json`:

    {"format": "rapfast tuning 1",
     "entries": [{"device": "NVIDIA H200", "width": 854, "height": 480, "n_gaussians": ..., "batch": ...,
                  "max_memory": null, "ms_per_view": ..., "time": "2026-...", "versions": {"rapfast": ...}}]}

There is one entry for each (device, width, height); `max_memory` is in bytes, null for no bound. No pixel depends on
what it says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rapfast.io.atomic import atomic_write, check_writable
from rapfast.io.files import load_json, shorten

FORMAT = "rapfast tuning 1"

DEFAULT_BATCH = 8


@dataclass(frozen=True)
class Tuning:
    """One entry.

    Attributes:
        device: name of the GPU, or of the processor. width, height: of the views before any resizing, pixels.
        n_gaussians: of the scene it was found for.
        batch: views in one call. max_memory: bytes that a call may take (`rapfast.rasterization`), or None.
        ms_per_view: what that took, the copy to the host included.
        time: when it was found, ISO 8601. versions: of rapfast and torch.
    """

    device: str
    width: int
    height: int
    n_gaussians: int
    batch: int
    max_memory: int | None
    ms_per_view: float
    time: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int, int]:
        return self.device, self.width, self.height


def path_for(scene: str | Path) -> Path:
    """Where the entries of a scene's file or a model's folder are."""
    scene = Path(scene)
    return scene / "tuning.json" if scene.is_dir() else scene.with_name(f"{scene.name}.tuning.json")


def device_name(device: torch.device) -> str:
    """As entries name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from rapfast.info import cpu_name

    return cpu_name()


def read(path: str | Path) -> list[Tuning]:
    """All entries of a file.

    Raises:
        OSError: it cannot be read. ValueError: it is damaged, or no such file; says where.
    """
    content = load_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), list):
        # somebody else's, which is not to be deleted for our sake
        raise ValueError(f'{path}: is no file of `rapfast tune` ("format" must be {FORMAT!r}): name another file')
    found = []
    for i, entry in enumerate(content["entries"]):
        if reason := _why_not(entry):
            raise ValueError(
                f"{path}: entries[{i}] is damaged: {reason}: delete it, or let `rapfast tune` write another"
            )
        found.append(Tuning(**{name: entry[name] for name in Tuning.__dataclass_fields__ if name in entry}))
    return found


def _why_not(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"it must be an object, got {shorten(entry)}"
    if not isinstance(entry.get("device"), str):
        return f'"device" must be a string, got {shorten(entry.get("device"))}'
    for name in ("width", "height", "n_gaussians", "batch", "max_memory"):
        value = entry.get(name)
        if name == "max_memory" and name in entry and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return f'"{name}" must be a whole number above 0, got {shorten(value)}'
    ms = entry.get("ms_per_view")
    if not isinstance(ms, (int, float)) or isinstance(ms, bool) or not 0 < ms < float("inf"):
        return f'"ms_per_view" must be a number above 0, got {shorten(ms)}'
    return None


def save(path: str | Path, found: Tuning) -> None:
    """Put an entry into a file in place of an earlier one of its device and size; others are kept, those too that
    another process writes at the same time.

    Raises:
        OSError: the file cannot be written. ValueError: what is there is no such file.
    """
    with _alone(check_writable(path).parent):
        entries = [entry for entry in read(path) if entry.key != found.key] if os.path.exists(path) else []
        content = {"format": FORMAT, "entries": [asdict(entry) for entry in (*entries, found)]}
        atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Others wait for this one: the folder is locked, which leaves no file behind. A file system without locks has
    none, and there the last to write wins."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def load(
    scene: str | Path, device: torch.device, width: int, height: int, n_gaussians: int, path: str | Path | None = None
) -> tuple[Tuning | None, str | None]:
    """What a run on that device should do, and what to tell its user.

    Args:
        scene: its file, or the folder of a model.
        device: that renders. width, height: rendered, pixels. n_gaussians: the scene has now.
        path: of the tuning's file; None: `path_for` the scene, if it is there.

    Returns:
        the entry, None where there is none for them; and a sentence, None where nobody has tuned anything.

    Raises:
        OSError, ValueError: the file cannot be used, see `read`; or `path` does not exist.
    """
    file = path_for(scene) if path is None else Path(path)
    if path is None and not file.exists():
        return None, None
    name = device_name(device)
    for entry in read(file):
        if entry.key == (name, width, height):
            if entry.n_gaussians != n_gaussians:
                return None, (
                    f"{file} is of a scene of {entry.n_gaussians:,} Gaussians and this one has {n_gaussians:,}: it is "
                    "not used; run `rapfast tune` again"
                )
            bound = "" if entry.max_memory is None else f", at most {entry.max_memory / 2**20:,.0f} MiB a call"
            return entry, f"batches of {entry.batch}{bound}, as {file} says"
    return None, f"{file} has nothing for {width}x{height} on {name}: run `rapfast tune` for it"
