"""Where pictures go: a folder that is never mixed up with another run's, file names from camera names, writing beside
rendering.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType

from ..io.atomic import atomic_path
from ..io.folders import folder_errors
from ..profiling import section


def prepare_folder(path: Path, overwrite: bool) -> Path:
    """Make the output folder and try it; ValueError where it holds something and `overwrite` is not set."""
    with folder_errors(path):
        if path.is_dir():
            if not overwrite and any(path.iterdir()):
                raise ValueError(f"{path}: the output folder is not empty; name another or give --overwrite")
        else:
            path.mkdir(parents=True)
    try:
        with atomic_path(path / "rapfast.writable"):
            raise _TriedError
    except _TriedError:
        return path


class _TriedError(Exception):
    """The folder takes files; leaves atomic_path without keeping one."""


def file_stems(names: Sequence[str | None]) -> list[str]:
    """One relative path without suffix for each camera, unique: its name, or view_00012 where it has none.

    Folders in a name are kept ("cam0/0001.jpg" -> "cam0/0001"); what would leave the output folder ("..", a leading
    slash) is not.
    """
    digits = max(4, len(str(max(len(names) - 1, 0))))
    out, taken = [], set()
    for index, name in enumerate(names):
        parts = [
            part
            for part in PurePosixPath((name or "").replace("\\", "/")).parts
            if part not in ("/", ".", "..") and not part.endswith(":")
        ]
        stem = "/".join(parts).replace("\0", "")
        stem = str(PurePosixPath(stem).with_suffix("")) if stem else f"view_{index:0{digits}d}"
        unique, k = stem, 2
        while unique.lower() in taken:
            unique, k = f"{stem}_{k}", k + 1
        taken.add(unique.lower())
        out.append(unique)
    return out


class BackgroundWriter:
    """Runs jobs in order on one thread, at most `ahead` waiting; an error in a job is raised by the next add() or at
    the end.

        with BackgroundWriter() as writer:
            writer.add(write_png, path, image)

    Encoding PNG takes about as long as rendering does, and needs no lock: the two overlap.
    """

    def __init__(self, ahead: int = 16) -> None:
        self._jobs: queue.Queue = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="rapfast-writer", daemon=True)

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def add(self, job: Callable, *arguments: object) -> None:
        """Queue job(*arguments); waits while too many are queued."""
        if self._error is not None:
            raise self._error
        with section("wait for the writer"):
            self._jobs.put((job, arguments))

    def _work(self) -> None:
        while True:
            item = self._jobs.get()
            if item is None:
                return
            if self._error is None and not self._stopped:
                try:
                    with section("write"):
                        item[0](*item[1])
                except BaseException as error:
                    self._error = error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = (
            kind is not None
        )  # after an error or Ctrl-C what is queued is dropped, what is being written is finished
        self._jobs.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error
