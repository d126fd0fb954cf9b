"""`rapfast profile`: another command's time and memory, section by section."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..io.atomic import check_writable
from ..profiling import Profiler, records, section
from ..profiling.table import print_table
from .common import Command, cuda_ready, parse_device, typed


@dataclass(kw_only=True)
class Profile(Command):
    """Run a command of rapfast under the profiler: where its time and memory go.

    By example:

    rapfast profile -- render scene.ply --orbit 24 --out pictures
      the command as ever, then a table: each section's time on the host and on the GPU, memory in use at most.

    rapfast profile --json before.json --repeats 5 -- rvs MODEL --poses cameras.json --views 200 --out views
      five times, for `rapfast compare before.json after.json`; all but the first write to a folder that is thrown away.

    rapfast profile --trace trace.json.gz --repeats 1 -- render scene.ply --orbit 8 --out pictures
      also a Chrome trace of the operators and kernels, for chrome://tracing or ui.perfetto.dev.

    Options before the -- are the profiler's, those behind it the command's.
    """

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the profile to this file, too: for `rapfast compare`."""

    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Run the command so many times. The spread of the runs is what a comparison takes for noise."""

    warmups: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """First run it so many times without looking: what is only slow once is left out then."""

    trace: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a Chrome trace by torch's profiler, .json or .json.gz."""

    no_memory: bool = False
    """Leave memory out, whose reading takes a tenth of a millisecond a section."""

    no_stages: bool = False
    """Leave out the stages inside native calls on the GPU, which may then be launched as CUDA graphs."""

    words: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        """Parse the command, run it, report; the command's exit status."""
        for name, least in (("repeats", 1), ("warmups", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        for file in (self.json, self.trace):
            if file is not None:
                check_writable(file)
        try:
            command = self._command()
        except SystemExit as stop:  # it was explained
            return stop.code if isinstance(stop.code, int) else 2
        device = _device(command)
        name, words = self.words[0], ["rapfast", *self.words]
        with typed("trace", "--trace"):
            profiler = Profiler(device, memory=not self.no_memory, stages=not self.no_stages, trace=self.trace)
        for i in range(self.warmups):
            print(f"warm-up {i + 1} of {self.warmups}", file=sys.stderr)
            with _elsewhere(command) as again:
                if status := again.run():
                    return status
        with profiler:
            for i in range(self.repeats):
                elsewhere = contextlib.nullcontext(command) if i == 0 else _elsewhere(command)
                # the outermost: its folder is made before and thrown away after what is timed
                with elsewhere as once, profiler.run(), section(name):
                    status = once.run()
                if status:
                    return status
        record = profiler.record(words)
        print()
        print_table(record)
        if self.json is not None:
            records.save(record, self.json)
            print(f"-> {self.json}")
        if self.trace is not None:
            print(f"-> {self.trace}: open it in chrome://tracing or https://ui.perfetto.dev")
        return 0

    def _command(self) -> Command:
        from . import parse

        if not self.words:
            raise ValueError(
                "give a command behind --, such as: rapfast profile -- render scene.ply --orbit 8 --out pictures"
            )
        command = parse(list(self.words))
        if self.words[0] == "tune" or _folder(command) is None:
            raise ValueError(f"{self.words[0]!r} is not profiled: give a command that renders to a folder behind --")
        return command


def _device(command: Command) -> torch.device:
    """That a command renders on; some give a GPU by its number alone."""
    text = str(getattr(command, "device", "auto"))
    if text.isdigit():
        text = f"cuda:{text}" if cuda_ready() else "cpu"
    return parse_device(text)


def _folder(command: Command) -> str | None:
    """The option that says where a command's files go."""
    return next((name for name in ("out", "output_root") if isinstance(getattr(command, name, None), Path)), None)


@contextlib.contextmanager
def _elsewhere(command: Command) -> Iterator[Command]:
    """The same work, its files into a folder that is thrown away, its sentences nowhere.

    The folder lies where the command's own would: another disk may write faster or slower.
    """
    option = _folder(command)
    beside = next(folder for folder in getattr(command, option).absolute().parents if folder.is_dir())
    folder = tempfile.TemporaryDirectory(prefix=".rapfast-profile-", dir=beside, ignore_cleanup_errors=True)
    with folder as name, contextlib.redirect_stdout(io.StringIO()):
        yield dataclasses.replace(command, **{option: Path(name) / "out"})
