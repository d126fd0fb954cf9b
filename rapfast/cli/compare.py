"""`rapfast compare`: is it slower than before?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..io.atomic import check_writable
from .common import Command

REGRESSED = 3
"""The exit status where something got slower or takes more memory."""


@dataclass(kw_only=True)
class Compare(Command):
    """Compare two profiles, or two runs of the benchmarks: what got slower, by how much, and is it noise?

    By example:

    rapfast profile --repeats 5 --json before.json -- render scene.ply --orbit 24 --out pictures
      then change something, the same again with --json after.json, and

    rapfast compare before.json after.json --plot change.png
      ratios with their bounds; what is slower or takes more memory is flagged, and the exit status is 3.

    rapfast compare main.json branch.json --threshold 0.1 --min-ms 1
      runs of pytest-benchmark (`rapfast bench --json main.json`); changes below 10 % are none, nor is anything below a
      millisecond looked at.

    A time is slower where even the lower bound of its ratio is above 1 + threshold. Bounds come from the repetitions in
    both files. Exit status: 0, 3 for a regression, 2 where a file cannot be used.
    """

    before: Annotated[Path, tyro.conf.arg(metavar="BEFORE.json"), tyro.conf.Positional]
    """A profile or a run of pytest-benchmark."""

    after: Annotated[Path, tyro.conf.arg(metavar="AFTER.json"), tyro.conf.Positional]
    """Another one of the same kind."""

    threshold: float = 0.05
    """A change up to this fraction is none."""

    confidence: float = 0.99
    """Of the bounds."""

    min_ms: float = 0.0
    """Leave out what takes less than so many milliseconds."""

    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the ratios and their bounds: .svg, .png or .pdf."""

    def run(self) -> int:
        """Read, compare, report; the exit status."""
        from rich.console import Console

        from ..profiling import compare

        if not 0 <= self.threshold < 10:
            raise ValueError(f"--threshold must be a fraction within 0..10, as 0.05, got {self.threshold:g}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"--confidence must be above 0 and below 1, as 0.99, got {self.confidence:g}")
        if self.plot is not None:
            if self.plot.suffix not in (".svg", ".png", ".pdf"):
                raise ValueError(f"--plot must end in .svg, .png or .pdf, got {self.plot.name!r}")
            check_writable(self.plot)
        before, after = compare.read(self.before), compare.read(self.after)
        if before.kind != after.kind:
            raise ValueError(f"{self.before} is a {before.kind} and {self.after} a {after.kind}: they share no name")
        found = compare.compare(before, after, self.threshold, self.confidence, self.min_ms)
        if not found.rows:
            raise ValueError(f"{self.before} and {self.after} share nothing that was measured")
        console = Console()
        (console if console.is_terminal else Console(width=200)).print(compare.table(found))
        for sentence in compare.sentences(found):
            print(sentence)
        if self.plot is not None:
            compare.plot(found, self.plot, self.threshold)
            print(f"-> {self.plot}")
        return REGRESSED if found.regressions else 0
