"""`rapfast augment` without --batch: a process for each video and set, which loads and precomputes everything anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..augment.difficulties import ParameterSet
from ..augment.job import Film, Summary
from ..augment.output import OutputFolder
from .augment_report import summary_lines
from .progress import Progress

_OWN = ("batch", "video_list", "video_list_file", "only", "overwrite", "dry_run", "debug")
"""Options that each process gets in its own way, or not at all."""


def one_process_per_set(
    command: Any, videos: Sequence[str], sets: Sequence[ParameterSet], folder: OutputFolder
) -> None:
    """Render what is not there, one process after the other.

    Raises:
        RuntimeError: a process failed; with its last words. The others were run.
    """
    keys = [(s.name, video) for video in videos for s in sets]
    print("note: one process for each video and set; --batch loads and precomputes once for all", file=sys.stderr)
    with folder:  # so that other settings are told of before anything starts
        command.compare_roots(folder)
        if command.overwrite:
            folder.allow(keys)
        there = dict(folder.films)
    summary, failures = Summary(), []
    with Progress("rendering", len(keys), "films") as progress:
        for set_name, video in keys:
            known = there.get((set_name, video))
            if known is not None:
                summary.films.append(Film(video, set_name, "kept", known["frames"], known["bytes"], 0.0))
            else:
                start = time.perf_counter()
                failed = _run([*_words(command), "--batch", f"--video_list={video}", "--only", set_name])
                took = time.perf_counter() - start
                if failed is not None:
                    failures.append(f"set {set_name} of {video}: {failed}")
                else:
                    made = _film(folder, set_name, video)
                    summary.films.append(Film(video, set_name, "made", made["frames"], made["bytes"], took))
            progress.advance()
    for line in summary_lines(summary, folder):
        print(line)
    for failure in failures[1:]:
        print(f"failed: {failure}")
    if failures:
        more = f" (and {len(failures) - 1} more failed, see above)" if len(failures) > 1 else ""
        raise RuntimeError(failures[0] + more)


def _words(command: Any) -> list[str]:
    """The command line that made `command`, without what differs from process to process."""
    words: list[str] = []
    for option in fields(command):
        value = getattr(command, option.name)
        if option.name in _OWN or value == option.default:
            continue
        if value is True:
            words.append(f"--{option.name}")
        elif isinstance(value, tuple):
            words += [f"--{option.name}", *map(str, value)]
        else:
            words.append(f"--{option.name}={value}")  # in one word, since a name may begin with a dash
    return words


def _run(words: Sequence[str]) -> str | None:
    """None, or what a process failed with."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "rapfast.cli", "augment", *words], env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    for line in lines[:-1] if done.returncode else lines:
        print(line, file=sys.stderr)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"was killed by signal {-done.returncode}"
    return (lines[-1] if lines else f"ended with status {done.returncode}").removeprefix("rapfast: ")


def _film(folder: OutputFolder, set_name: str, video: str) -> dict[str, Any]:
    """What the process noted of its film."""
    return json.loads(folder.params.read_text(encoding="utf-8"))["sets"][set_name][video]
