"""Keeps runs under bench/results/; a part of report.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.report_runs import ReportError, read_run
from rapfast.io.atomic import atomic_write


def save(sources: list[Path], results: Path) -> Path:
    """Copies a run to <machine>-<date>.json under ``results``, with -2, -3 ... where that day has one already; several
    runs as the parts of one."""
    run = [read_run(source) for source in sources][-1]
    n, target = 1, results / f"{run.slug}-{run.time[:10]}.json"
    while target.exists():
        n += 1
        target = results / f"{run.slug}-{run.time[:10]}-{n}.json"
    data = _joined(sources) if len(sources) > 1 else json.loads(sources[0].read_text(encoding="utf-8"))
    atomic_write(target, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    return target


def _joined(sources: list[Path]) -> dict[str, Any]:
    """Runs of parts of the suite as one. What two of them measured comes from the first, with all that is compared with
    it there: ratios compare records of one process. `parts` tells how many came from which.

    Raises:
        ReportError: they are of different machines, versions or commits.
    """
    runs = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
    for source, run in zip(sources[1:], runs[1:], strict=True):
        for what, name in (("machine_info", "machine or versions"), ("commit_info", "commit")):
            if run[what] != runs[0][what]:
                raise ReportError(f"{source} is of another {name} than {sources[0]}: save it as a run of its own")
    benchmarks, parts = [], []
    for source, run in zip(sources, runs, strict=True):
        known = {b["fullname"] for b in benchmarks}
        again = {_compared(b) for b in run["benchmarks"] if b["fullname"] in known}
        kept = [b for b in run["benchmarks"] if _compared(b) not in again]
        benchmarks += kept
        parts.append({"file": source.name, "datetime": run["datetime"], "benchmarks": len(kept)})
    return runs[-1] | {"benchmarks": benchmarks, "datetime": max(run["datetime"] for run in runs), "parts": parts}


def _compared(benchmark: dict[str, Any]) -> tuple[str, str, int]:
    info = benchmark["extra_info"]
    return info["direction"], info["case"], info["batch"]
