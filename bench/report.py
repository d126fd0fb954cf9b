"""Makes the tables and plots of the documentation from the runs committed under bench/results/.

    python bench/report.py save bench_out/run.json    keeps a run as bench/results/<machine>-<date>.json
    python bench/report.py                            docs/benchmarks.md, docs/performance.md, the README's table, plots

Every ratio compares two records of one run. Of each machine the newest run counts.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCS_MARKERS = "<!-- benchmark results -->", "<!-- /benchmark results -->"
README_MARKERS = "<!-- benchmark table -->", "<!-- /benchmark table -->"
FLOORS_MARKERS = "<!-- floors -->", "<!-- /floors -->"

CPU_CASE = "cpu-room200k-427x240"
CPU_BAR_MS, CPU_BAR_RATIO = 250.0, 20.0
"""What one view of CPU_CASE must not exceed, and how many times faster than the reference it must be."""

BACKWARD_DIRECTIONS = ("bwd", "bwd-scene")
"""Gradients of every parameter and of the viewmats; of the parameters alone."""

BACKWARD_BAR, BACKWARD_GOAL = 2.5, 4.0
"""How many times faster than gsplat a step must be, and is wanted to: geometric means over the cases."""

README_BATCH = 8

STAGES = ("project", "color", "bin", "blend", "composite")

RAP_LOOPS = ("rap-eager", "rap-compiled")
APPEARANCE_BARS = {"rapfast": ("new reference images", 10.0, 15.0), "rapfast-maps": ("feature maps there", 25.0, 40.0)}
"""How many times faster than the faster of RAP_LOOPS a view must get to the CPU, and is wanted to: bar and goal."""


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
        backward = {name: directions.pop(name) for name in BACKWARD_DIRECTIONS if name in directions}
        run = Run(data["machine_info"], data["commit_info"], data["datetime"], records, directions, transfers, backward)
        _ = run.slug
    except (KeyError, TypeError) as error:
        raise ReportError(f"{path}: not a run of this suite: {error} is missing") from error
    if not any(getattr(run, part) for part in PARTS):
        raise ReportError(f"{path}: holds no benchmark")
    return run


PARTS = ("records", "backward", "appearance", "transfers")
"""Fields of a `Run`: what a run may be of alone."""


def newest_runs(results: Path) -> list[Run]:
    """The newest run of each machine, GPUs first; where the newest holds only some of `PARTS`, the newest of each."""
    newest: dict[tuple[str, str], Run] = {}
    for path in sorted(results.glob("*.json")):
        run = read_run(path)
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
    order = {part: i for i, part in enumerate(PARTS)}
    first_part = {id(run): min(order[part] for part in PARTS if getattr(run, part)) for run in runs}
    return sorted(runs, key=lambda run: (run.machine.get("gpu") is None, run.slug, first_part[id(run)]))


# --- tables ----------------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 3, unit: str = "") -> str:
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


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column aligned left, the others right."""
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows))


def _provenance(run: Run) -> str:
    versions, gpu = run.machine["versions"], run.machine.get("gpu")
    parts = [f"rapfast {versions['rapfast']} ({run.commit['id'][:10]})", f"torch {versions['torch']}"]
    if gpu:
        parts.insert(0, f"driver {gpu['driver'] or 'unknown'}, CUDA {versions['cuda']}")
        if versions.get("gsplat"):
            parts.append(f"gsplat {versions['gsplat']}")
    else:
        parts.insert(0, f"{run.machine['cpu']['cores']} cores")
    return f"{run.device_name}, {', '.join(parts)}, {run.time[:10]}"


def _gpu_cases(run: Run) -> list[str]:
    return [case for case in run.cases() if case != CPU_CASE]


def forward_table(run: Run) -> str:
    """Milliseconds per view of every case and batch, and the peak of memory."""
    measured = {backend for case, backend, _ in run.records if case != CPU_CASE}
    others = [name for name in ("gsplat", "gsplat-loop", "reference") if name in measured]
    head = ["case", "batch", "visible", "tiles / view", *others, "rapfast"]
    gsplat = "gsplat" in others
    head += ["ratio", "MiB gsplat", "MiB rapfast"] if gsplat else ["MiB rapfast"]
    rows = []
    for case in _gpu_cases(run):
        for batch in run.batches(case):
            known = next(info for (c, _, b), info in run.records.items() if (c, b) == (case, batch))
            row = [case, str(batch), _number(100 * known["visible_share"], 2, " %")]
            row += [_number(known["intersections_per_view"] / 1e6, 3, " M")]
            row += [_number(run.get(case, name, batch, "ms_per_view")) for name in (*others, "rapfast")]
            peak = run.get(case, "rapfast", batch, "peak_mib")
            if gsplat:
                row += [_number(run.ratio(case, batch, "gsplat")), _number(run.get(case, "gsplat", batch, "peak_mib"))]
            rows.append([*row, _number(peak)])
    return _table(head, rows)


def stage_table(run: Run) -> str | None:
    """rapfast's stages, ms per view; None where the run has none."""
    known = {key: info["stages"] for key, info in run.records.items() if key[1] == "rapfast" and info.get("stages")}
    if not known:
        return None
    names = list(dict.fromkeys([*STAGES, *(name for stages in known.values() for name in stages)]))
    rows = [[case, str(batch), *(_number(s.get(name)) for name in names)] for (case, _, batch), s in known.items()]
    return _table(["case", "batch", *names], rows)


def cpu_sentence(run: Run) -> str | None:
    """The figure on the CPU against its two bars."""
    ours, theirs = (run.get(CPU_CASE, name, 1, "ms_per_view") for name in ("rapfast", "reference"))
    if ours is None:
        return None
    threads = run.get(CPU_CASE, "rapfast", 1, "threads")
    text = f"On the CPU ({run.machine['cpu']['name']}, {threads} threads), room of 200 k at 427x240, one view: "
    text += f"{_number(ours)} ms (bar {CPU_BAR_MS:.0f} ms: {'met' if ours <= CPU_BAR_MS else 'missed'})"
    if theirs is not None:
        ratio = theirs / ours
        verdict = "met" if ratio >= CPU_BAR_RATIO else "missed"
        text += f", {_number(ratio)} times the float32 reference, {_number(theirs)} ms"
        text += f" (bar {CPU_BAR_RATIO:.0f}: {verdict})"
    return text + "."


# --- floors ----------------------------------------------------------------------------------------------------------


def _counted(run: Run) -> dict[str, dict[str, Any]]:
    """rapfast's records whose work was counted as it is today, by case, one batch each."""
    from bench.floors import Work

    found = {}
    for (case, backend, _), info in run.records.items():
        if backend == "rapfast" and (info.get("work") or {}).keys() == set(Work._fields):
            found[case] = info
    return found


def floors_summary(run: Run) -> str | None:
    """What was counted of each case, the floor of all its steps and the time it took; None where nothing was."""
    from bench.floors import Work, cub_sorts_us, launch_us, total_us

    head = ["case", "batch", "records", "visible", "intersections", "walked", "cells / 16", "drawn / 256", "floor, us"]
    head += ["CUB's sorts, us", "launches, us", "kernels, us", "call, us", "call / floor"]
    rows = []
    for case, info in _counted(run).items():
        w = Work(**info["work"])
        floor, us, steps = total_us(w), 1e3 * info["ms_per_view"], info.get("steps")
        counts = (w.records, w.visible, w.intersections, w.walked, w.cells / 16, w.drawn / 256)
        row = [case, str(w.views), *(_number(n) for n in counts), _number(floor), _number(cub_sorts_us(w))]
        row.append(_number(launch_us(w, info["launches"]) if info.get("launches") else None))
        row.append(_number(1e3 * sum(steps.values()) if steps else None))
        rows.append([*row, _number(us), _number(us / floor)])
    return _table(head, rows) if rows else None


def floors_table(info: dict[str, Any]) -> str:
    """One case step by step: bytes, operations, the floor and what sets it, the time and how many times the floor."""
    from bench.floors import OTHER_STEPS, Work, floors

    w = Work(**info["work"])
    expected, steps, stages = floors(w), info.get("steps") or {}, info.get("stages") or {}
    head = ["step", "MB / view", "M operations", "M ex2", "floor, us", "set by", "measured, us", "times"]
    rows = []
    stage_of = {**OTHER_STEPS, **{name: floor.stage for name, floor in expected.items()}}
    stage = "project"
    for name in steps:  # a step without a floor belongs to the stage of the step before
        stage = stage_of.setdefault(name, stage)
    for stage in dict.fromkeys((*STAGES, *stage_of.values())):
        names = [name for name in dict.fromkeys((*steps, *expected)) if stage_of[name] == stage]
        known = [expected[name] for name in names if name in expected]
        if len(names) > 1:
            for name in names:
                rows.append([f"{stage}: {name}", *_floor_cells(expected.get(name), steps.get(name))])
        if not names:
            continue
        floor = sum(f.us for f in known)
        took = stages.get(stage) or (sum(steps[name] for name in names if name in steps) or None)
        cells = [sum(f.bytes for f in known) / 1e6, sum(f.operations for f in known) / 1e6]
        cells = [_number(value) for value in (*cells, sum(f.ex2 for f in known) / 1e6, floor)]
        by = _limit(known[0]) if len(known) == 1 else ""
        times = _number(1e3 * took / floor) if took and floor else "–"
        rows.append([f"**{stage}**", *cells, by, _number(None if took is None else 1e3 * took), times])
    return _table(head, rows)


def _limit(floor: Any) -> str:
    limits = floor.limits()
    return max(limits, key=limits.__getitem__)


def _floor_cells(floor: Any, ms: float | None) -> list[str]:
    took = _number(None if ms is None else 1e3 * ms)
    if floor is None:
        return ["–", "–", "–", "–", "–", took, "–"]
    cells = [_number(value / 1e6) for value in (floor.bytes, floor.operations, floor.ex2)]
    times = None if ms is None else 1e3 * ms / floor.us
    return [*cells, _number(floor.us), _limit(floor), took, _number(times)]


def floors_section(runs: list[Run]) -> str | None:
    """What stands between the markers of docs/performance.md, from the first run on a GPU that counted its work; None
    where none did, and the file is left as it is."""
    for run in runs:
        counted = _counted(run) if run.machine.get("gpu") else {}
        if not counted:
            continue
        parts = [f"{_provenance(run)}.", floors_summary(run)]
        outdoors = "garden-" if any(case.startswith("garden-") for case in counted) else "outdoor-"
        for case, info in counted.items():
            size = info["width"], info["height"]
            if case.startswith(outdoors) or (case.startswith("room-") and size == (854, 480)):
                parts += [f"### {case}, batch of {info['batch']}", floors_table(info)]
        return "\n\n".join(parts)
    return None


# --- the backward ----------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Forward and backward of one case and batch: its records by backend, with and without the viewmats' gradients."""

    case: str
    batch: int
    bwd: dict[str, dict[str, Any]]
    scene: dict[str, dict[str, Any]]

    @property
    def ratio(self) -> float | None:
        theirs, ours = (self.bwd.get(name, {}).get("ms_per_view") for name in ("gsplat", "rapfast"))
        return theirs / ours if theirs and ours else None

    @property
    def cameras_share(self) -> float | None:
        """What the viewmats' gradients add to rapfast's time."""
        whole, scene = (records.get("rapfast", {}).get("ms_per_view") for records in (self.bwd, self.scene))
        return whole / scene - 1 if whole and scene else None


def backward_steps(run: Run) -> list[Step]:
    """What was measured, in its order."""
    found: dict[tuple[str, int], Step] = {}
    for direction, records in run.backward.items():
        for (case, backend, batch), info in records.items():
            step = found.setdefault((case, batch), Step(case, batch, {}, {}))
            (step.bwd if direction == "bwd" else step.scene)[backend] = info
    return list(found.values())


def backward_table(steps: list[Step]) -> str:
    """Milliseconds per view of forward and backward, what the cameras add, and the peak of memory."""
    head = [
        "case",
        "batch",
        "gsplat",
        "rapfast",
        "ratio",
        "without cameras",
        "cameras add",
        "MiB gsplat",
        "MiB rapfast",
    ]
    head.append("gradients differ by")
    rows = []
    for step in steps:
        cells = [_number(step.bwd.get(name, {}).get("ms_per_view")) for name in ("gsplat", "rapfast")]
        cells += [_number(step.ratio), _number(step.scene.get("rapfast", {}).get("ms_per_view"))]
        share = step.cameras_share
        cells.append("–" if share is None else f"{100 * share:.1f} %")
        cells += [_number(step.bwd.get(name, {}).get("peak_mib")) for name in ("gsplat", "rapfast")]
        errors = step.bwd.get("rapfast", {}).get("errors")
        cells.append(f"{max(errors.values()):.0e}" if errors else "–")
        rows.append([step.case, str(step.batch), *cells])
    return _table(head, rows)


def backward_verdict(steps: list[Step]) -> str | None:
    """The geometric mean of the ratios against bar and goal; None where gsplat was not measured. The outdoor scene
    stands in for the garden where that was not given."""
    with_garden = any(step.case.startswith("garden-") for step in steps)
    left_out = ("outdoor-" if with_garden else "garden-", "channels32-")
    ratios = [step.ratio for step in steps if step.ratio and not step.case.startswith(left_out)]
    if not ratios:
        return None
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    verdicts = ", ".join(
        f"{name} {limit}: {'met' if mean >= limit else 'missed'}"
        for name, limit in (("bar", BACKWARD_BAR), ("goal", BACKWARD_GOAL))
    )
    return f"Forward and backward are {_number(mean)} times as fast as gsplat's in the geometric mean ({verdicts})."


def backward_section(run: Run) -> list[str]:
    """The paragraphs for one machine, none where the run has no backward in it."""
    steps = backward_steps(run)
    if not steps:
        return []
    text = (
        "Milliseconds per view of forward and backward, to every parameter and the viewmats; without cameras: to the "
    )
    text += "parameters alone. The last column is the largest sum of absolute differences to gsplat's gradients, over "
    text += "that of their values."
    parts = [f"### Forward and backward, {run.device_name}", f"{_provenance(run)}. {text}", backward_table(steps)]
    verdict = backward_verdict(steps)
    return parts if verdict is None else [*parts, verdict]


# --- the appearance path ---------------------------------------------------------------------------------------------


class Appearance(NamedTuple):
    """The records of one path, case and batch."""

    path: str  # "rap" or "rap-loop"
    case: str
    batch: int
    by_backend: dict[str, dict[str, Any]]

    def ms(self, backend: str) -> float | None:
        return self.by_backend.get(backend, {}).get("ms_per_view")

    def baseline_ms(self, suffix: str = "") -> float | None:
        """RAP's own time: the faster of eager and compiled, which both must have been measured."""
        times = [self.ms(name + suffix) for name in RAP_LOOPS]
        return None if None in times else min(times)

    def ratio(self, backend: str, suffix: str = "") -> float | None:
        theirs, ours = self.baseline_ms(suffix), self.ms(backend)
        return theirs / ours if theirs and ours else None

    def mib_per_view(self, backend: str) -> float | None:
        """RAP's loop holds one view at a time, rapfast a batch, and its graphs their memory."""
        info = self.by_backend.get(backend, {})
        peak = info.get("peak_mib")
        return peak if peak is None or backend.startswith("rap-") else (peak + info.get("graph_mib", 0)) / self.batch


def appearance_rows(run: Run) -> list[Appearance]:
    """What was measured, in its order."""
    rows: dict[tuple[str, str, int], Appearance] = {}
    for path, records in run.appearance.items():
        for (case, backend, batch), info in records.items():
            row = rows.setdefault((path, case, batch), Appearance(path, case, batch, {}))
            row.by_backend[backend] = info
    return sorted(rows.values(), key=lambda row: row.path != "rap-loop")


def appearance_table(rows: list[Appearance]) -> str:
    """Milliseconds per view of RAP's loop and of rapfast, and how many times faster rapfast is."""
    paths = {"rap": "render", "rap-loop": "to the CPU"}
    known = {backend for row in rows for backend in row.by_backend}
    order = (*RAP_LOOPS, *(f"{name}-maps" for name in RAP_LOOPS), "reference", *APPEARANCE_BARS)
    backends = [name for name in order if name in known]
    compared = known.issuperset(RAP_LOOPS)
    head = ["case", "path", "batch", *backends]
    head += ["ratio", "ratio, maps there", "maps to maps", "MiB / view rap-eager", "rapfast"] if compared else []
    table = []
    for row in rows:
        cells = [row.case, paths[row.path], str(row.batch), *(_number(row.ms(name)) for name in backends)]
        if compared:
            cells += [_number(row.ratio("rapfast")), _number(row.ratio("rapfast-maps"))]
            cells += [_number(row.ratio("rapfast-maps", "-maps"))]
            cells += [_number(row.mib_per_view(name)) for name in ("rap-eager", "rapfast")]
        table.append(cells)
    return _table(head, table)


def appearance_verdict(rows: list[Appearance]) -> str | None:
    """The smallest ratios against bar and goal; None where RAP's loop was not measured."""
    parts = []
    for backend, (what, bar, goal) in APPEARANCE_BARS.items():
        compared = [row for row in rows if row.path == "rap-loop" and row.ratio(backend)]
        if compared:
            slowest = min(compared, key=lambda row: row.ratio(backend))
            least = slowest.ratio(backend)
            text = f"{what} {_number(least)} ({slowest.case}, batch of {slowest.batch}; "
            text += ", ".join(
                f"{name} {limit:.0f}: {'met' if least >= limit else 'missed'}"
                for name, limit in (("bar", bar), ("goal", goal))
            )
            parts.append(text + ")")
    if not parts:
        return None
    return f"The least that rapfast is faster by, to the CPU: {', '.join(parts)}."


def color_stage_table(rows: list[Appearance]) -> str | None:
    """The fused colour stage beside the time that its bytes and operations would take; None where it was not timed."""
    head = ["case", "batch", "records / view", "MB / view", "GFLOP / view", "floor, us / view", "measured", "times"]
    head += ["kept, MiB", "made in, ms"]
    table = []
    for row in rows:
        info = row.by_backend.get("rapfast", {})
        if not info.get("stages"):
            continue
        work, ms = info["color_work"], info["stages"]["color"]
        cells = [_number(work["records"]), _number(work["bytes"] / 1e6), _number(work["operations"] / 1e9)]
        cells += [_number(1e3 * work["floor_ms"]), _number(1e3 * ms), _number(ms / work["floor_ms"])]
        cells += [_number(info["prepared"][name]) for name in ("mib", "ms")]
        table.append([row.case, str(row.batch), *cells])
    return _table(head, table) if table else None


def appearance_stage_table(rows: list[Appearance]) -> str | None:
    """rapfast's stages from reference images on, ms per view; None where there are none."""
    known = [(row, row.by_backend["rapfast"]["stages"]) for row in rows if row.by_backend.get("rapfast")]
    known = [(row, stages) for row, stages in known if stages]
    if not known:
        return None
    names = list(dict.fromkeys(["maps", *STAGES, *(name for _, stages in known for name in stages)]))
    cells = [[row.case, str(row.batch), *(_number(stages.get(name)) for name in names)] for row, stages in known]
    return _table(["case", "batch", *names], cells)


def appearance_section(run: Run, plots: dict[str, str]) -> list[str]:
    """The paragraphs for one machine, none where the run has no appearance in it."""
    rows = appearance_rows(run)
    if not rows:
        return []
    parts = [f"### Appearance, {run.device_name}", f"{_provenance(run)}. Milliseconds per view."]
    parts.append(appearance_table(rows))
    if verdict := appearance_verdict(rows):
        parts.append(verdict)
    if stages := appearance_stage_table(rows):
        parts += ["rapfast's stages from reference images to images, milliseconds per view:", stages]
    if color := color_stage_table(rows):
        parts += ["The colour stage beside its floor:", color]
    if run.slug in plots:
        parts.append(f"![RAP's loop and rapfast against Gaussians, {run.device_name}]({plots[run.slug]})")
    return parts


# --- copies between host and GPU -------------------------------------------------------------------------------------

UPLOADS = {
    "pageable": "blocking", "pageable-non_blocking": "non_blocking", "pinned": "pinned, blocking",
    "pinned-non_blocking": "pinned, non_blocking", "pinned-own-stream": "pinned, stream of its own",
}  # fmt: skip


def transfer_section(run: Run) -> list[str]:
    """The paragraphs for one machine, none where the run has no transfers in it."""
    if not run.transfers:
        return []
    parts = [f"### Copies between host and GPU, {run.device_name}", f"{_provenance(run)}. Milliseconds a batch."]
    return parts + [table for table in (_upload_table(run), _download_table(run)) if table]


def _upload_table(run: Run) -> str | None:
    rows = []
    for size, views in _transfer_batches(run):
        for what, field, until in (
            ("upload", "returns_ms", "the call returns"),
            ("upload", "ms", "it has arrived"),
            ("upload-work", "ms", "copy and work are done"),
        ):
            times = [run.transfers.get((f"{what}-{size}", way, views), {}).get(field) for way in UPLOADS]
            if any(times):
                blocking, non_blocking, _, pinned, own_stream = times
                ratios = [_times(blocking, other) for other in (non_blocking, pinned, own_stream)]
                rows.append([size, str(views), until, *map(_number, times), *ratios])
    head = [
        "upload",
        "views",
        "until",
        *UPLOADS.values(),
        "blocking / non_blocking",
        "/ pinned, non_blocking",
        "/ own stream",
    ]
    return _table(head, rows) if rows else None


def _download_table(run: Run) -> str | None:
    rows = []
    for size, views in _transfer_batches(run):
        cells: list[str] = []
        for suffix in ("", "-pinned"):
            each, batched = (
                run.transfers.get((f"download-{size}", way + suffix, views), {}).get("ms")
                for way in ("per-tensor", "batched")
            )
            cells += [_number(each), _number(batched), _times(each, batched)]
            if not suffix:
                cells.append(_number(run.transfers.get((f"download-{size}", "batched-kept", views), {}).get("ms")))
        if set(cells) != {"–"}:
            rows.append([size, str(views), *cells])
    head = ["download", "views", "per tensor", "one batch", "ratio", "to kept memory"]
    head += ["pinned, per tensor", "pinned, one batch", "ratio"]
    return _table(head, rows) if rows else None


def _transfer_batches(run: Run) -> list[tuple[str, int]]:
    """(size, views), in the run's order."""
    return list(dict.fromkeys((case.rsplit("-", 1)[1], views) for case, _, views in run.transfers))


def _times(slow: float | None, fast: float | None) -> str:
    return _number(slow / fast) if slow and fast else "–"


# --- what goes into the files ----------------------------------------------------------------------------------------


def docs_section(runs: list[Run], plots: dict[str, str], appearance_plots: dict[str, str]) -> str:
    """What stands between the markers of docs/benchmarks.md; both ``plots`` are image names by machine."""
    parts = []
    for run in runs:
        if run.records:
            parts += _forward_section(run, plots)
        parts += backward_section(run)
        parts += appearance_section(run, appearance_plots)
        parts += transfer_section(run)
    return "\n\n".join(parts)


def _forward_section(run: Run, plots: dict[str, str]) -> list[str]:
    parts = [f"### {run.device_name}", f"{_provenance(run)}. Milliseconds per view."]
    if run.machine.get("scale") == "reduced":
        parts.append("The reduced cases: small scenes for a machine without a GPU.")
    if _gpu_cases(run):
        parts.append(forward_table(run))
    stages = stage_table(run)
    if stages:
        parts += ["rapfast's stages, milliseconds per view:", stages]
    sentence = cpu_sentence(run)
    if sentence:
        parts.append(sentence)
    if run.slug in plots:
        parts.append(f"![Time per view against Gaussians, batch and pixels, {run.device_name}]({plots[run.slug]})")
    return parts


def readme_table(runs: list[Run]) -> str:
    """The newest GPU run in short; the CPU's figure where there is none."""
    on_gpu = [run for run in runs if run.machine.get("gpu")]
    parts = [part for run in on_gpu[:1] for part in _readme_forward(run)]
    parts += next(filter(None, map(_readme_appearance, on_gpu)), [])
    sentence = next(filter(None, map(cpu_sentence, runs)), None)
    if sentence:
        parts.append(sentence)
    if not parts:
        raise ReportError("no run has a record for the README: neither a batch of 8 on a GPU nor the CPU case")
    return "\n\n".join(parts)


def claimed_ratios(run: Run) -> list[tuple[str, float]]:
    """(case, gsplat's time over rapfast's) of each row of the README's table."""
    found = []
    for case in _gpu_cases(run):
        batches = run.batches(case)
        # what is compared is one batch; a case that was measured in it alone is left to the docs
        ratio = run.ratio(case, README_BATCH, "gsplat")
        if len(batches) > 1 and ratio is not None:
            found.append((case, ratio))
    return found


def _readme_forward(run: Run) -> list[str]:
    """The rasterizer, in one batch."""
    rows = []
    for case, ratio in claimed_ratios(run):
        row = [case] + [_number(run.get(case, name, README_BATCH, "ms_per_view")) for name in ("gsplat", "rapfast")]
        rows.append([*row, _number(ratio, 3)])
    if not rows:
        return []
    version = run.machine["versions"].get("gsplat")
    theirs = f"gsplat {version}" if version else "gsplat"
    table = _table([f"ms per view, batch of {README_BATCH}", theirs, "rapfast", "times faster"], rows)
    return [table, f"{_provenance(run)}. Both were measured in one run, after their pixels were compared."]


def _readme_appearance(run: Run) -> list[str]:
    """RAP's loop to the CPU, batch of 8."""
    table = []
    for row in appearance_rows(run):
        if row.path == "rap-loop" and row.batch == README_BATCH and row.ratio("rapfast") and row.ratio("rapfast-maps"):
            cells = [row.case.removeprefix("rap-"), _number(row.baseline_ms()), _number(row.ms("rapfast"))]
            cells += [f"**{_number(row.ratio('rapfast'))}**", _number(row.ms("rapfast-maps"))]
            table.append([*cells, f"**{_number(row.ratio('rapfast-maps'))}**"])
    if not table:
        return []
    head = ["RAP's view synthesis, ms per view", "RAP's loop", "rapfast", "times faster"]
    text = "From poses and reference images to normalised 427x240 tensors on the CPU, batch of 8. RAP's loop: the "
    text += f"faster of eager and compiled torch, with gsplat. {_provenance(run)}."
    return [_table([*head, "rapfast, feature maps there", "times faster"], table), text]


# --- files -----------------------------------------------------------------------------------------------------------


def replace_between(path: Path, markers: tuple[str, str], content: str) -> None:
    """Rewrites what stands between two marker lines of a file.

    Raises:
        ReportError: the file is absent, or does not hold each marker once, in order.
    """
    from rapfast.io.atomic import atomic_write

    if not path.is_file():
        raise ReportError(f"{path} does not exist: its table was not written")
    text = path.read_text(encoding="utf-8")
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(f"{path} must hold the lines {begin} and {end} once each, in this order")
    head, tail = text.split(begin)[0], text.split(end)[1]
    atomic_write(path, f"{head}{begin}\n\n{content}\n\n{end}{tail}".encode())


def save(source: Path, results: Path) -> Path:
    """Copies a run to <machine>-<date>.json under ``results``, with -2, -3 ... where that day has one already."""
    from rapfast.io.atomic import atomic_write

    run = read_run(source)
    n, target = 1, results / f"{run.slug}-{run.time[:10]}.json"
    while target.exists():
        n += 1
        target = results / f"{run.slug}-{run.time[:10]}-{n}.json"
    data = json.loads(source.read_text(encoding="utf-8"))
    atomic_write(target, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    return target


def write(root: Path, with_plots: bool) -> list[str]:
    """Writes all that is made from the runs; returns a sentence for each file that could not be."""
    runs, problems, plots, appearance_plots = newest_runs(root / "bench" / "results"), [], {}, {}
    if with_plots:
        try:
            plots, appearance_plots = _plots(runs, root / "docs")
        except ImportError as error:
            problems.append(str(error))
    for path, markers, make in (
        (root / "docs" / "benchmarks.md", DOCS_MARKERS, lambda: docs_section(runs, plots, appearance_plots)),
        (root / "docs" / "performance.md", FLOORS_MARKERS, lambda: floors_section(runs)),
        (root / "README.md", README_MARKERS, lambda: readme_table(runs)),
    ):
        try:
            content = make()
            if content is not None:
                replace_between(path, markers, content)
        except ReportError as error:
            problems.append(str(error))
    return problems


def _plots(runs: list[Run], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Image names by machine: of the forward pass, of the appearance path."""
    from bench.plots import plot, plot_appearance

    made: tuple[dict[str, str], dict[str, str]] = {}, {}
    for run in runs:
        path = folder / f"benchmarks-{run.slug}.svg"
        if plot(run, path):
            made[0][run.slug] = path.name
        path = folder / f"benchmarks-appearance-{run.slug}.svg"
        if plot_appearance(appearance_rows(run), path):
            made[1][run.slug] = path.name
    return made


def _newest_output() -> Path:
    found = sorted((ROOT / "bench_out").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ReportError("bench_out holds no run: make bench makes one, or name a file")
    return found[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--no-plots", action="store_true", help="tables alone")
    commands = parser.add_subparsers(dest="command")
    saving = commands.add_parser("save", help="keep a run under bench/results/")
    saving.add_argument("run", type=Path, nargs="?", help="default: the newest of bench_out/")
    options = parser.parse_args(arguments)
    try:
        if options.command == "save":
            print(save(options.run or _newest_output(), options.root / "bench" / "results"))
            return 0
        problems = write(options.root, with_plots=not options.no_plots)
    except (ReportError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for bench.plots
    sys.exit(main())
