"""`rapfast bench`: a minute's look at this machine, or the whole benchmark suite."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ..io.atomic import atomic_path, check_writable
from .common import Command, installed, parse_device

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository, where this is a checkout."""


@dataclass(kw_only=True)
class Bench(Command):
    """Measure how fast rapfast is here.

    By example:

    rapfast bench quick
      in under a minute, without data: copies between host and GPU, batches against loops, rendering, colours from
      reference images, the stages of a call.

    rapfast bench quick --json before.json
      also as a profile, for `rapfast compare before.json after.json`.

    rapfast bench
      the repository's benchmark suite: minutes on a GPU, a reduced set on the CPU. What is measured is told in
      docs/benchmarks.md.

    rapfast bench --json bench_out/run.json -- -k room-500k --rounds 20
      what stands behind -- goes to pytest: some of the cases, fewer rounds.
    """

    what: Annotated[Literal["suite", "quick"], tyro.conf.Positional] = "suite"
    """The suite, or the quick look."""

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Where the results go, for `rapfast compare`. Default: of the suite bench_out/run.json, of the quick look
    nowhere."""

    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda or cuda:NUMBER; the suite takes no number."""

    words: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        """Measure and report."""
        device = parse_device(self.device)
        return self._suite(device) if self.what == "suite" else self._quick(device)

    def _quick(self, device: torch.device) -> int:
        from rich.console import Console

        from ..profiling import quick, records

        if self.words:
            raise ValueError(f"the quick look takes nothing behind --, got {' '.join(self.words)!r}")
        if self.json is not None:
            check_writable(self.json)
        start = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            print("no GPU: copies between host and GPU are left out", file=sys.stderr)
        record, lines = quick.measure(device, lambda group: print(f"measuring: {group}", file=sys.stderr))
        console = Console()
        (console if console.is_terminal else Console(width=120)).print(quick.table(record, lines))
        print(f"measured in {time.perf_counter() - start:.0f} s")
        if self.json is not None:
            records.save(record, self.json)
            print(f"-> {self.json}")
        return 0

    def _suite(self, device: torch.device) -> int:
        if not (ROOT / "bench" / "conftest.py").is_file():
            raise FileNotFoundError(
                f"the benchmark suite is part of rapfast's repository, and there is no {ROOT / 'bench'}: run this in a "
                "checkout (pip install -e '.[bench]'), or `rapfast bench quick`, which needs nothing"
            )
        if missing := [name for name in ("pytest", "pytest_benchmark") if not installed(name)]:
            raise ImportError(f"the benchmark suite needs {' and '.join(missing)}: pip install 'rapfast[bench]'")
        if self.device.startswith("cuda:"):
            raise ValueError(
                f"--device {self.device}: the suite measures the first GPU it sees: give --device cuda, and choose the "
                "GPU by the environment variable CUDA_VISIBLE_DEVICES"
            )
        target = Path("bench_out/run.json") if self.json is None else self.json
        if self.json is None:
            target.parent.mkdir(exist_ok=True)
        target = check_writable(target)
        # pytest-benchmark empties its file when it begins and fills it at the end: an earlier run is kept until then
        with contextlib.suppress(_NothingWritten), atomic_path(target) as file:
            command = [sys.executable, "-m", "pytest", "bench", f"--benchmark-json={file}", "--device", device.type]
            status = subprocess.run([*command, *self.words], cwd=ROOT, check=False).returncode
            if file.stat().st_size == 0:
                raise _NothingWritten
            print(f"-> {target}")
        return 1 if status else 0


class _NothingWritten(Exception):
    """The suite ended without a result."""
