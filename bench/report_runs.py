"""The runs that tables are made of, and how their numbers are written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bench.cases import FULL

BACKWARD_DIRECTIONS = ("bwd", "bwd-scene")
"""Gradients of every parameter and of the viewmats; of the parameters alone."""


class ReportError(Exception):
    """A sentence for the user."""


class Run(NamedTuple):
    """One file of pytest-benchmark's JSON."""

    machine: dict[str, Any]  # machine_info
    commit: dict[str, Any]  # commit_info
    time: str  # ISO 8601, UTC
    records: dict[tuple[str, str, int], dict[str, Any]]  # extra_info by (case, backend, batch), direction "fwd"
    # the same of the other directions, "rap" and "rap-loop"
    appearance: dict[str, dict[tuple[str, str, int], dict[str, Any]]] = {}
    transfers: dict[tuple[str, str, int], dict[str, Any]] = {}  # by (case, way, views), direction "transfer"
    # by direction, "bwd" and "bwd-scene", then as `records`
    backward: dict[str, dict[tuple[str, str, int], dict[str, Any]]] = {}
    augment: dict[tuple[str, str, int], dict[str, Any]] = {}  # by (case, mode, sets), direction "augment"
    # Of records that an earlier run of the machine left, whose they are: by (case, batch).
    earlier: dict[tuple[str, int], str] = {}

    @property
    def device_name(self) -> str:
        gpu = self.machine.get("gpu")
        return gpu["name"] if gpu else self.machine["cpu"]["name"]

    @property
    def slug(self) -> str:
        """The name in file names."""
        name = re.sub(r"\((r|tm)\)", "", self.device_name.lower())
        return re.sub(r"[^a-z0-9.]+", "-", name).strip("-.")

    def get(self, case: str, backend: str, batch: int, field: str) -> Any:
        """A field of a record, None where the record or its value is absent."""
        return self.records.get((case, backend, batch), {}).get(field)

    def ratio(self, case: str, batch: int, over: str, field: str = "ms_per_view") -> float | None:
        """How many times more ``over`` takes than rapfast."""
        theirs, ours = self.get(case, over, batch, field), self.get(case, "rapfast", batch, field)
        return theirs / ours if theirs and ours else None

    def mark(self, case: str, batch: int) -> str:
        """Of an earlier run's rows: a number behind the name, which `earlier_runs` explains."""
        whose = self.earlier.get((case, batch))
        return "" if whose is None else f" [{list(dict.fromkeys(self.earlier.values())).index(whose) + 1}]"

    def earlier_runs(self) -> str:
        """What the numbers of `mark` mean, in a line; empty where there are none."""
        names = dict.fromkeys(self.earlier.values())
        return "; ".join(f"[{i}] {name}" for i, name in enumerate(names, 1))

    def cases(self) -> list[str]:
        return list(dict.fromkeys(case for case, _, _ in self.records))

    def batches(self, case: str) -> list[int]:
        return sorted({batch for name, _, batch in self.records if name == case})


def read_run(path: Path) -> Run:
    """Raises ReportError where the file is not a run of this suite."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: not a benchmark run: {error}") from error
    try:
        directions: dict[str, dict[tuple[str, str, int], dict[str, Any]]] = {"fwd": {}}
        for benchmark in data["benchmarks"]:
            info = benchmark["extra_info"]
            directions.setdefault(info["direction"], {})[info["case"], info["backend"], info["batch"]] = info
        records, transfers = directions.pop("fwd"), directions.pop("transfer", {})
        augment = directions.pop("augment", {})
        others = [directions.pop(name, None) for name in OTHERS]
        backward = {name: directions.pop(name) for name in BACKWARD_DIRECTIONS if name in directions}
        parts = records, directions, transfers, backward, augment
        run = Run(data["machine_info"], data["commit_info"], data["datetime"], *parts)
        _ = run.slug
    except (KeyError, TypeError) as error:
        raise ReportError(f"{path}: not a run of this suite: {error} is missing") from error
    if not (any(others) or any(getattr(run, part) for part in PARTS)):
        raise ReportError(f"{path}: holds no benchmark")
    return run


OTHERS = ("claim",)
"""Directions that other documents are made of: see claims.py."""

PARTS = ("records", "backward", "appearance", "transfers", "augment")
"""Fields of a `Run`: what a run may be of alone."""


Records = dict[tuple[str, str, int], dict[str, Any]]
"""extra_info by (case, backend, batch)."""


def newest_of_each(runs: Iterable[Records]) -> tuple[Records, dict[tuple[str, int], int]]:
    """Each case and batch as the first of the runs has it, whole, since ratios compare records of one run; and by
    (case, batch) the number of that run. Runs are given newest first."""
    records: Records = {}
    whose: dict[tuple[str, int], int] = {}
    for number, found in enumerate(runs):
        for (case, backend, batch), info in found.items():
            if whose.setdefault((case, batch), number) == number:
                records[case, backend, batch] = info
    return records, whose


def _completed(newest: Run, all_runs: list[Run]) -> Run:
    """With what earlier runs of the machine measured of cases and batches that the newest did not."""
    kind = newest.slug, newest.machine.get("scale")
    earlier = [run for run in all_runs if (run.slug, run.machine.get("scale")) == kind and run.time < newest.time]
    earlier.sort(key=lambda run: run.time, reverse=True)
    records, whose = newest_of_each(run.records for run in (newest, *earlier))
    names = ["", *(f"rapfast {run.commit['id'][:10]}, {run.time[:10]}" for run in earlier)]
    places = {case.name: i for i, case in enumerate(FULL)}
    in_order = sorted(records.items(), key=lambda item: (places.get(item[0][0], len(places)), item[0][2]))
    return newest._replace(records=dict(in_order), earlier={key: names[i] for key, i in whose.items() if i > 0})


def newest_runs(results: Path) -> list[Run]:
    """The newest run of each machine, GPUs first; where the newest holds only some of `PARTS`, the newest of each, and
    where it holds only some cases of the rasterizer, the others as they were measured last (`Run.earlier`)."""
    newest: dict[tuple[str, str], Run] = {}
    all_runs = [read_run(path) for path in sorted(results.glob("*.json"))]
    for run in all_runs:
        for part in PARTS:
            key = run.slug, part
            if getattr(run, part) and (key not in newest or run.time > newest[key].time):
                newest[key] = run
    if not newest:
        raise ReportError(f"{results} holds no run: python bench/report.py save RUN.json puts one there")
    chosen: dict[int, tuple[Run, set[str]]] = {}
    for (_, part), run in newest.items():
        chosen.setdefault(id(run), (run, set()))[1].add(part)
    runs = [run._replace(**{part: {} for part in PARTS if part not in parts}) for run, parts in chosen.values()]
    runs = [_completed(run, all_runs) if run.records else run for run in runs]
    order = {part: i for i, part in enumerate(PARTS)}
    first_part = {id(run): min(order[part] for part in PARTS if getattr(run, part)) for run in runs}
    return sorted(runs, key=lambda run: (run.machine.get("gpu") is None, run.slug, first_part[id(run)]))


# --- numbers and tables ----------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """With that many significant digits, a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return f"0{unit}"
    magnitude = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if magnitude >= digits:
        return f"{value:,.0f}{unit}"
    if abs(value) >= 1:
        return f"{value:.{digits - magnitude}f}{unit}"
    return f"{value:.{digits}f}{unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column aligned left, the others right."""
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows))


def provenance(run: Run) -> str:
    versions, gpu = run.machine["versions"], run.machine.get("gpu")
    parts = [f"rapfast {versions['rapfast']} ({run.commit['id'][:10]})", f"torch {versions['torch']}"]
    if gpu:
        parts.insert(0, f"driver {gpu['driver'] or 'unknown'}, CUDA {versions['cuda']}")
        if versions.get("gsplat"):
            parts.append(f"gsplat {versions['gsplat']}")
    else:
        parts.insert(0, f"{run.machine['cpu']['cores']} cores")
    return f"{run.device_name}, {', '.join(parts)}, {run.time[:10]}"


def limit(floor: Any) -> str:
    limits = floor.limits()
    return max(limits, key=limits.__getitem__)


def floor_cells(floor: Any, ms: float | None) -> list[str]:
    took = number(None if ms is None else 1e3 * ms)
    if floor is None:
        return ["–", "–", "–", "–", "–", took, "–"]
    cells = [number(value / 1e6) for value in (floor.bytes, floor.operations, floor.ex2)]
    times = None if ms is None else 1e3 * ms / floor.us
    return [*cells, number(floor.us), limit(floor), took, number(times)]
