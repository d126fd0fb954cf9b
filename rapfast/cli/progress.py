"""A progress bar on stderr, and counting how fast it went."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """A bar that counts views while a `with` block runs; silent where stderr is no terminal.

    with Progress("rendering", 24) as progress:
        progress.advance(8)
    """

    def __init__(self, label: str, total: int, unit: str = "views") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._bar = None
        self._ended = 0.0

    def __enter__(self) -> Progress:
        self.started = time.perf_counter()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            rate = TextColumn("{task.fields[rate]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, rate="")
        return self

    def advance(self, n: int = 1) -> None:
        """Count n more views as done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(self._task, advance=n, rate=f"{self.rate:.1f} {self.unit}/s")

    @property
    def seconds(self) -> float:
        """Seconds from the block's begin to its end, or to now."""
        return (self._ended or time.perf_counter()) - self.started

    @property
    def rate(self) -> float:
        """Views per second so far."""
        return self.done / max(self.seconds, 1e-9)

    def summary(self) -> str:
        """For example "24 views in 3.1 s, 7.8 views per second"."""
        return f"{self.done} {self.unit} in {self.seconds:.1f} s, {self.rate:.1f} {self.unit} per second"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = time.perf_counter()
        if self._bar is not None:
            self._bar.stop()
