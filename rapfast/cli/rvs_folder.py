"""The folder of `rapfast rvs`: one process at a time, killed at any moment, taken up again where it was.

view_000000.png ...   pictures; a file under its name is whole
cameras.json          their cameras, in INRIA's form
manifest.json         what each picture shows, once all are there
progress.jsonl        until then: the settings, then a line for each picture that is there
.rvs.lock             held while a process writes
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ..cameras import Cameras
from ..io.atomic import atomic_write
from ..io.files import load_json, shorten
from ..io.folders import lock_file, make_folder
from ..rvs.hashes import bytes_fingerprint, file_fingerprint

FORMAT = "rapfast rvs 1"
MANIFEST, PROGRESS, LOCK, CAMERAS = "manifest.json", "progress.jsonl", ".rvs.lock", "cameras.json"

_VIEW = r"view_\d{6,}\.(?:png|jpg)"
_OWN = re.compile(rf"(?:{_VIEW}|manifest\.json|progress\.jsonl|cameras\.json)")
_TEMPORARY = re.compile(rf"\.[0-9a-f]{{12}}-{_OWN.pattern}")


class SetFolder:
    """A set of views in a folder, locked while a `with` block runs.

    Args:
        path: made where it does not exist.
        settings: all that decides the pictures. A folder that was begun with others is refused.
        n_views: how many there shall be; those of a smaller set are kept.
        overwrite: forget what the folder has of another set.

    Raises:
        ValueError: the folder has other files, another set or more views, and `overwrite` is not set.
        BlockingIOError: another process writes to the folder.
    """

    def __init__(self, path: Path, settings: dict[str, Any], n_views: int, *, overwrite: bool) -> None:
        self.path, self.settings, self.n_views, self._overwrite = path, settings, n_views, overwrite
        self.views: dict[int, dict[str, Any]] = {}
        """What is known of each picture that is there, by number."""
        self._journal: TextIO | None = None
        self._line = threading.Lock()

    def __enter__(self) -> SetFolder:
        make_folder(self.path)
        self._lock_file = lock_file(self.path / LOCK, "this set")
        try:
            self._begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is not None:
            with contextlib.suppress(OSError):  # a full disk has been told of
                self._journal.close()
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock_file, 0)
        os.close(self._lock_file)

    def write(self, index: int, name: str, data: bytes, entry: dict[str, Any]) -> None:
        """Write a picture and note it. From any thread."""
        atomic_write(self.path / name, data)
        entry = {"index": index, "file": name, "blake2b": bytes_fingerprint(data), **entry}
        with self._line:
            try:
                self._journal.write(json.dumps(entry) + "\n")
                self._journal.flush()
            except OSError as error:
                reason = os.strerror(error.errno)
                raise type(error)(error.errno, f"{self.path / PROGRESS}: could not be written: {reason}") from None
            self.views[index] = entry

    def finish(self, head: dict[str, Any]) -> None:
        """Write cameras.json and manifest.json, and remove what was for taking the work up again."""
        entries = [self.views[i] for i in sorted(self.views)]
        names = [Path(entry["file"]).stem for entry in entries]
        poses, Ks = ([entry[name] for entry in entries] for name in ("pose", "K"))
        Cameras.from_poses(poses, Ks, head["width"], head["height"], names).save(self.path / CAMERAS)
        text = json.dumps({"format": FORMAT, **head, "settings": self.settings}, indent=1)
        lines = ",\n  ".join(map(json.dumps, entries))
        manifest = f'{text.removesuffix("}").rstrip()},\n "views": [\n  {lines}\n ]\n}}\n'.encode()
        atomic_write(self.path / MANIFEST, manifest)
        self._journal.close()
        with contextlib.suppress(FileNotFoundError):
            (self.path / PROGRESS).unlink()

    def _begin(self) -> None:
        names = sorted(entry.name for entry in self.path.iterdir())
        for name in names:
            if _TEMPORARY.fullmatch(name):  # of a process that was killed while it wrote
                (self.path / name).unlink()
        foreign = [name for name in names if not _OWN.fullmatch(name) and not _TEMPORARY.fullmatch(name)]
        foreign = [name for name in foreign if name != LOCK]
        if foreign and not self._overwrite:
            raise ValueError(
                f"{self.path}: the output folder holds {foreign[0]!r}, which is none of this command's; name another "
                "or give --overwrite"
            )
        try:
            known = self._read()
        except (ValueError, KeyError, TypeError) as error:
            if not self._overwrite:
                raise ValueError(f"{error}; or give --overwrite") from None
            known = None
        if known is not None and self._why_not(known) is not None:
            if not self._overwrite:
                raise ValueError(f"{self.path}: {self._why_not(known)}; name another folder or give --overwrite")
            known = None
        if known is None:
            pictures = [name for name in names if re.fullmatch(_VIEW, name)]
            if pictures and not self._overwrite:
                raise ValueError(
                    f"{self.path}: holds pictures and nothing that says what they show; name another folder or give "
                    "--overwrite"
                )
            for name in [*pictures, MANIFEST, PROGRESS, CAMERAS]:
                with contextlib.suppress(FileNotFoundError):
                    (self.path / name).unlink()
        else:
            self.views = {index: entry for index, entry in known[1].items() if self._intact(entry)}
        lines = [{"format": FORMAT, "settings": self.settings}, *self.views.values()]
        journal = self.path / PROGRESS
        atomic_write(journal, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self._journal = open(journal, "a", encoding="utf-8")  # noqa: SIM115 closed in __exit__

    def _read(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]] | None:
        """Settings and views of what was begun or finished here; None where there is neither."""
        settings, views = None, {}
        if (self.path / MANIFEST).exists():
            content = load_json(self.path / MANIFEST)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"{self.path / MANIFEST}: is no manifest of this command; name another folder")
            settings, views = content["settings"], {entry["index"]: entry for entry in content["views"]}
        if (self.path / PROGRESS).exists():
            lines = (self.path / PROGRESS).read_text(encoding="utf-8", errors="replace").split("\n")
            parsed = [entry for line in lines if (entry := _object(line)) is not None]
            if not parsed or parsed[0].get("format") != FORMAT:
                raise ValueError(f"{self.path / PROGRESS}: is damaged; name another folder")
            begun = parsed[0]["settings"]
            if settings is None or begun == settings:
                settings = begun
                views |= {entry["index"]: entry for entry in parsed[1:] if {"index", "file", "blake2b"} <= set(entry)}
        return None if settings is None else (settings, views)

    def _why_not(self, known: tuple[dict[str, Any], dict[int, dict[str, Any]]]) -> str | None:
        """Why what is there cannot be taken up; None where it can."""
        theirs, views = known
        ours = json.loads(json.dumps(self.settings))
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if names:
            shown = [f"{name} was {_shown(theirs.get(name))} and is {_shown(ours.get(name))}" for name in names[:3]]
            return f"holds a set made with other settings: {', '.join(shown)}"
        if views and max(views) >= self.n_views:
            return f"holds {max(views) + 1} views, more than --views {self.n_views}"
        return None

    def _intact(self, entry: dict[str, Any]) -> bool:
        path = self.path / str(entry["file"])
        if not re.fullmatch(_VIEW, path.name) or not path.is_file():
            return False
        if file_fingerprint(path) == entry["blake2b"]:
            return True
        print(f"note: {path} is not what was written (its checksum differs); it is rendered again", file=sys.stderr)
        return False


def _shown(value: Any) -> str:
    return shorten(value) if not isinstance(value, list) else str(value)


def _object(line: str) -> dict[str, Any] | None:
    """A line of the journal; None for the torn last one of a killed process."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
