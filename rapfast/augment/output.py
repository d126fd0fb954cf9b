"""The output folder: the tree of films, what is known of each, one process at a time, taken up where it was left.

augmentation_params.json                                        how everything was made, and each film's checksum
{set}/{video}/render_fixed_viewpoint/{video}/{video}_fixed_viewpoint_video.mp4
{set}/{video}/render_fixed_viewpoint/{video}/frames/000000.png  where PNGs are asked for
.rapfast_augment.jsonl                                          while a process works: a line for each film
.rapfast_augment.lock                                           held while a process works

Shards of a job array have files of their own: augmentation_params_part7.json for the part 7.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rapfast.io.atomic import atomic_write
from rapfast.io.files import load_json, shorten
from rapfast.io.folders import lock_file, lock_folder, make_folder
from rapfast.rvs.hashes import bytes_fingerprint, file_fingerprint

from .films import png_folder

FORMAT = "rapfast augment 1"

Key = tuple[str, str]  # (set, video)


def film_path(root: Path, set_name: str, video: str) -> Path:
    """Where a film goes."""
    return root / set_name / video / "render_fixed_viewpoint" / video / f"{video}_fixed_viewpoint_video.mp4"


def params_path(root: Path, part_id: int | None = None) -> Path:
    """The file that says how everything was made, of the whole folder or of a shard."""
    return root / ("augmentation_params.json" if part_id is None else f"augmentation_params_part{part_id}.json")


def check_video_name(name: str) -> str:
    """A name becomes two folders and a file: ValueError where it cannot."""
    if not name or name in (".", "..") or re.search(r"[/\\\0\n]", name) or len(os.fsencode(name)) > 200:
        raise ValueError(
            f"a video's name must be a folder's name of at most 200 bytes, without slashes; got {shorten(name)}"
        )
    return name


class TakenError(ValueError):
    """A film that is there and not this shard's. Others can be made."""


class OutputFolder:
    """The films of an output folder, locked while a `with` block runs.

    Args:
        root: made where it does not exist.
        settings: all that decides the films but for their set. A folder begun with others is refused.
        difficulties: the ranges of each difficulty, as JSON; one of the folder with other ranges is refused.
        part_id: of a shard, which has files of its own; several shards may work in one folder.
        overwrite: replace what `allow` and `begin` are given, and forget what was made with other settings.

    Raises:
        ValueError: other settings or difficulties, or a film of which nothing is known, and `overwrite` is not set.
        BlockingIOError: another process works here.
    """

    def __init__(
        self, root: Path, settings: Mapping[str, Any], difficulties: Mapping[str, Any], *, part_id: int | None = None,
        overwrite: bool = False,
    ) -> None:  # fmt: skip
        self.root, self.settings = root, _plain(settings)
        self.difficulties: dict[str, Any] = _plain(difficulties)
        self.part_id, self._overwrite = part_id, overwrite
        part = "" if part_id is None else f"_part{part_id}"
        self.params = params_path(root, part_id)
        self._journal_path = root / f".rapfast_augment{part}.jsonl"
        self._lock_path = root / f".rapfast_augment{part}.lock"
        self.films: dict[Key, dict[str, Any]] = {}
        """What is known of each film that is there."""
        self._begun: set[Key] = set()  # films that may be replaced: a process has begun them
        self._held: dict[Key, int] = {}
        self._journal: TextIO | None = None
        self._line = threading.Lock()
        self.head: dict[str, Any] = {}
        """Noted at the top of the file, and compared with nothing: versions, where videos were read."""
        self.noted: dict[str, Any] = {}
        """The same as it was found in the file."""

    def look(self, verify: bool = True) -> None:
        """Learn what is there, without writing anything. `verify` compares checksums."""
        settings, difficulties, films = self._read()
        different = [] if settings is None else _differences(settings, self.settings)
        shared = {name: ranges for name, ranges in self.difficulties.items() if name in difficulties}
        different += _differences({name: difficulties[name] for name in shared}, shared)
        if different:
            raise ValueError(
                f"{self.params}: holds films made with other settings: {', '.join(different[:3])}; name another "
                "folder or give --overwrite"
            )
        self.difficulties = difficulties | self.difficulties
        self.films = {key: film for key, film in films.items() if not verify or self._intact(key, film)}

    def __enter__(self) -> OutputFolder:
        make_folder(self.root)
        self._lock = lock_file(self._lock_path, "here" if self.part_id is None else f"part {self.part_id}")
        try:
            try:
                self.look(verify=not self._overwrite)
            except ValueError:
                if not self._overwrite:
                    raise
                self.films, self._begun = {}, set()
            self._write_params()
            # Begun anew, now that all it had is in the other file: after the torn last line of a killed process the
            # next one would be lost.
            self._journal = open(self._journal_path, "w", encoding="utf-8")  # noqa: SIM115 closed in __exit__
        except BaseException:
            self._release()
            raise
        return self

    def check(self, key: Key) -> None:
        """Raise where a film is there of which nothing is known: TakenError in a shard, where it is most likely another
        one's, else ValueError."""
        path = film_path(self.root, *key)
        if not path.exists() or key in self._begun:
            return
        unknown = f"{path}: is there already, and {self.params.name} does not say how it was made"
        if self.part_id is not None:
            raise TakenError(f"{unknown}, so it may be another shard's: give each shard videos of its own")
        raise ValueError(f"{unknown}; move it, name another folder or give --overwrite")

    def begin(self, key: Key, frames: bool) -> Path:
        """Make the folders of a film that is about to be written, and clear away what a killed process left.

        Raises:
            BlockingIOError: another process is writing it. TakenError, ValueError: as `check`.
        """
        path = film_path(self.root, *key)
        make_folder(png_folder(path) if frames else path.parent)
        self._held[key] = lock_folder(path.parent, "this film")
        try:
            self.check(key)  # again: another may have finished it a moment ago
        except ValueError:
            self.leave(key)
            raise
        left_over = re.compile(rf"\.[0-9a-f]{{12}}-(?:{re.escape(path.name[-40:])}|\d{{6}}\.png)")
        for folder in (path.parent, png_folder(path)) if frames else (path.parent,):
            for name in os.listdir(folder):
                if left_over.fullmatch(name):
                    (folder / name).unlink()
        self.allow([key])
        return path

    def allow(self, keys: Iterable[Key]) -> None:
        """Let films be replaced, those too of which nothing is known."""
        for key in keys:
            self.films.pop(key, None)
            self._begun.add(key)
            self._note({"begun": key})

    def leave(self, key: Key) -> None:
        """Others may write this film again."""
        held = self._held.pop(key, None)
        if held is not None:
            os.close(held)

    def finish(self, key: Key, film: Mapping[str, Any]) -> dict[str, Any]:
        """Note a film that is there under its name. From any thread."""
        path = film_path(self.root, *key)
        found = {
            "file": path.relative_to(self.root).as_posix(),
            "bytes": path.stat().st_size,
            "blake2b": file_fingerprint(path),
            **film,
        }
        if found.get("pngs"):
            found["pngs_blake2b"] = _pngs_fingerprint(path, found["frames"])
            for png in png_folder(path).iterdir():  # of a longer film that was here before
                if re.fullmatch(r"[0-9]{6}\.png", png.name) and int(png.stem) >= found["frames"]:
                    png.unlink()
        found = _plain(found)
        self._note({"set": key[0], "video": key[1], "film": found})
        with self._line:
            self.films[key] = found
        self.leave(key)
        return found

    def _note(self, line: dict[str, Any]) -> None:
        with self._line:
            try:
                self._journal.write(json.dumps(line) + "\n")
                self._journal.flush()
                os.fsync(self._journal.fileno())  # else a power cut could leave a film of which nothing is known
            except OSError as error:
                reason = os.strerror(error.errno)
                raise type(error)(error.errno, f"{self._journal_path}: could not be written: {reason}") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in list(self._held):
            self.leave(key)
        try:
            self._journal.close()
            self._write_params()
            self._journal_path.unlink(missing_ok=True)
        except OSError:
            if kind is None:  # else the disk is full, which has been told, and the journal has what is known
                raise
        finally:
            self._release()

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, 0)
        os.close(self._lock)

    def _write_params(self) -> None:
        sets: dict[str, dict[str, Any]] = {}
        for (set_name, video), film in sorted(self.films.items()):
            sets.setdefault(set_name, {})[video] = film
        content = {"format": FORMAT, **self.head, "settings": self.settings, "difficulties": self.difficulties,
                   "sets": sets, "unfinished": sorted(self._begun - set(self.films))}  # fmt: skip
        atomic_write(self.params, (_short_lists(json.dumps(content, indent=1)) + "\n").encode())

    def _read(self) -> tuple[dict[str, Any] | None, dict[str, Any], dict[Key, dict[str, Any]]]:
        """Settings (None where nothing was begun), difficulties and films."""
        settings: dict[str, Any] | None = None
        difficulties: dict[str, Any] = {}
        films: dict[Key, dict[str, Any]] = {}
        if self.params.exists():
            content = load_json(self.params)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"{self.params}: is no file of this command; name another folder or give --overwrite")
            try:
                settings, difficulties = content["settings"], content["difficulties"]
                films = {(s, v): _film(film) for s, videos in content["sets"].items() for v, film in videos.items()}
                self._begun |= {(s, v) for s, v in content["unfinished"]}
                self.noted = {name: content.get(name) for name in self.head}
            except (KeyError, AttributeError, TypeError, ValueError):
                raise ValueError(f"{self.params}: is damaged; name another folder or give --overwrite") from None
        if self._journal_path.exists():
            for line in self._journal_path.read_text(encoding="utf-8", errors="replace").split("\n"):
                entry = _object(line)
                if entry is not None and "begun" in entry:
                    self._begun.add(tuple(entry["begun"]))
                    films.pop(tuple(entry["begun"]), None)  # about to be replaced
                elif entry is not None and {"set", "video", "film"} <= set(entry):
                    films[entry["set"], entry["video"]] = _film(entry["film"])
        return settings, difficulties, films

    def _intact(self, key: Key, film: Mapping[str, Any]) -> bool:
        path = film_path(self.root, *key)
        self._begun.add(key)  # what is there is ours to replace
        if not path.is_file():
            return False
        changed = None
        if file_fingerprint(path) != film.get("blake2b"):
            changed = path
        elif film.get("pngs") and _pngs_fingerprint(path, film["frames"]) != film.get("pngs_blake2b"):
            changed = png_folder(path)
        if changed is not None:
            print(f"note: {changed} is not what was written (its checksum differs): rendered again", file=sys.stderr)
        return changed is None


def _film(entry: Any) -> dict[str, Any]:
    """ValueError where it lacks what is read of it again."""
    sizes = ("bytes", "frames", "width", "height")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), int) for name in sizes):
        raise ValueError(f"a film must have {', '.join(sizes)}, got {shorten(entry)}")
    return entry


def _pngs_fingerprint(film: Path, n_frames: int) -> str | None:
    """Of all frames' files; None where one is missing."""
    try:
        files = (png_folder(film) / f"{frame:06d}.png" for frame in range(n_frames))
        return bytes_fingerprint("".join(map(file_fingerprint, files)).encode())
    except OSError:
        return None


def _short_lists(text: str) -> str:
    """Indented JSON with lists of numbers and words on a line each."""
    return re.sub(r"\[\n([^][{}]*?)\n *\]", lambda found: "[" + re.sub(r",\n *", ", ", found[1]).strip() + "]", text)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return [f"{name} was {_shown(old.get(name))} and is {_shown(new.get(name))}" for name in names]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _object(line: str) -> dict[str, Any] | None:
    """A line of the journal; None for the torn last one of a killed process."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
