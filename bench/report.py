"""Makes the tables and plots of the documentation from the runs committed under bench/results/.

    python bench/report.py save bench_out/run.json    keeps a run as bench/results/<machine>-<date>.json
    python bench/report.py save a.json b.json         keeps the parts of a suite that was run in several, as one
    python bench/report.py                            docs/benchmarks.md, docs/performance.md, the README's table, plots

Every ratio compares two records of one run. Of each machine the newest run counts; cases and batches of the rasterizer
that it did not measure are those of the newest that did, and marked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for the package of this file

from bench.cases import FULL  # noqa: E402
from bench.report_backward import backward_floors, backward_readme, backward_section  # noqa: E402
from bench.report_runs import (  # noqa: E402
    ReportError,
    Run,
    floor_cells,
    limit,
    newest_runs,
    number,
    provenance,
    table,
)
from bench.report_save import save  # noqa: E402

DOCS_MARKERS = "<!-- benchmark results -->", "<!-- /benchmark results -->"
README_MARKERS = "<!-- benchmark table -->", "<!-- /benchmark table -->"
FLOORS_MARKERS = "<!-- floors -->", "<!-- /floors -->"

CPU_CASE = "cpu-room200k-427x240"
CPU_BAR_MS, CPU_BAR_RATIO = 250.0, 20.0
"""What one view of CPU_CASE must not exceed, and how many times faster than the reference it must be."""

README_BATCH = 8

STAGES = ("project", "color", "bin", "blend", "composite")

RAP_LOOPS = ("rap-eager", "rap-compiled")
APPEARANCE_BARS = {"rapfast": ("new reference images", 10.0, 15.0), "rapfast-maps": ("feature maps there", 25.0, 40.0)}
"""How many times faster than the faster of RAP_LOOPS a view must get to the CPU, and is wanted to: bar and goal."""


# --- tables ----------------------------------------------------------------------------------------------------------


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
            row = [case + run.mark(case, batch), str(batch), number(100 * known["visible_share"], 2, " %")]
            row += [number(known["intersections_per_view"] / 1e6, 3, " M")]
            row += [number(run.get(case, name, batch, "ms_per_view")) for name in (*others, "rapfast")]
            peak = run.get(case, "rapfast", batch, "peak_mib")
            if gsplat:
                row += [number(run.ratio(case, batch, "gsplat")), number(run.get(case, "gsplat", batch, "peak_mib"))]
            rows.append([*row, number(peak)])
    return table(head, rows)


def stage_table(run: Run) -> str | None:
    """rapfast's stages, ms per view; None where the run has none."""
    known = {key: info["stages"] for key, info in run.records.items() if key[1] == "rapfast" and info.get("stages")}
    if not known:
        return None
    names = list(dict.fromkeys([*STAGES, *(name for stages in known.values() for name in stages)]))
    rows = [
        [case + run.mark(case, batch), str(batch), *(number(s.get(name)) for name in names)]
        for (case, _, batch), s in known.items()
    ]
    return table(["case", "batch", *names], rows)


def cpu_sentence(run: Run) -> str | None:
    """The figure on the CPU against its two bars."""
    ours, theirs = (run.get(CPU_CASE, name, 1, "ms_per_view") for name in ("rapfast", "reference"))
    if ours is None:
        return None
    threads = run.get(CPU_CASE, "rapfast", 1, "threads")
    earlier = run.earlier.get((CPU_CASE, 1))
    where = f"{run.machine['cpu']['name']}, {threads} threads{'' if earlier is None else f'; {earlier}'}"
    text = f"On the CPU ({where}), room of 200 k at 427x240, one view: "
    text += f"{number(ours)} ms (bar {CPU_BAR_MS:.0f} ms: {'met' if ours <= CPU_BAR_MS else 'missed'})"
    if theirs is not None:
        ratio = theirs / ours
        verdict = "met" if ratio >= CPU_BAR_RATIO else "missed"
        text += f", {number(ratio)} times the float32 reference, {number(theirs)} ms"
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
    head += ["CUB's sorts, us", "launches, us", "GPU idle", "kernels, us", "call, us", "call / floor"]
    rows = []
    for case, info in _counted(run).items():
        w = Work(**info["work"])
        floor, us, steps = total_us(w), 1e3 * info["ms_per_view"], info.get("steps")
        counts = (w.records, w.visible, w.intersections, w.walked, w.cells / 16, w.drawn / 256)
        row = [
            case + run.mark(case, info["batch"]),
            str(w.views),
            *(number(n) for n in counts),
            number(floor),
            number(cub_sorts_us(w)),
        ]
        row.append(number(launch_us(w, info["launches"]) if info.get("launches") else None))
        idle = info.get("gpu_idle")
        row.append("–" if idle is None else f"{100 * idle:.1f} %")
        row.append(number(1e3 * sum(steps.values()) if steps else None))
        rows.append([*row, number(us), number(us / floor)])
    return table(head, rows) if rows else None


def floors_table(info: dict[str, Any]) -> str:
    """One case step by step: bytes, operations, the floor and what sets it, the time and how many times the floor."""
    from bench.floors import OTHER_STEPS, SAME_WORK, Work, floors

    w = Work(**info["work"])
    steps, stages = info.get("steps") or {}, info.get("stages") or {}
    called = {other: name for name, other in SAME_WORK.items() if name in steps}
    expected = {called.get(name, name): floor for name, floor in floors(w).items()}
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
                rows.append([f"{stage}: {name}", *floor_cells(expected.get(name), steps.get(name))])
        if not names:
            continue
        floor = sum(f.us for f in known)
        took = stages.get(stage) or (sum(steps[name] for name in names if name in steps) or None)
        cells = [sum(f.bytes for f in known) / 1e6, sum(f.operations for f in known) / 1e6]
        cells = [number(value) for value in (*cells, sum(f.ex2 for f in known) / 1e6, floor)]
        by = limit(known[0]) if len(known) == 1 else ""
        times = number(1e3 * took / floor) if took and floor else "–"
        rows.append([f"**{stage}**", *cells, by, number(None if took is None else 1e3 * took), times])
    return table(head, rows)


def floors_section(runs: list[Run]) -> str | None:
    """What stands between the markers of docs/performance.md, from the first run on a GPU that counted its work; None
    where none did, and the file is left as it is."""
    for run in runs:
        counted = _counted(run) if run.machine.get("gpu") else {}
        if not counted:
            continue
        parts = [f"{provenance(run)}.{f' Of earlier runs: {run.earlier_runs()}.' if run.earlier else ''}"]
        parts.append(floors_summary(run))
        outdoors = "garden-" if any(case.startswith("garden-") for case in counted) else "outdoor-"
        for case, info in counted.items():
            size = info["width"], info["height"]
            if case.startswith(outdoors) or (case.startswith("room-") and size == (854, 480)):
                batch = info["batch"]
                parts += [f"### {case}, batch of {batch}{run.mark(case, batch)}", floors_table(info)]
        parts += next(filter(None, (backward_floors(run) for run in runs if run.machine.get("gpu"))), [])
        return "\n\n".join(parts)
    return None


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
    lines = []
    for row in rows:
        cells = [row.case, paths[row.path], str(row.batch), *(number(row.ms(name)) for name in backends)]
        if compared:
            cells += [number(row.ratio("rapfast")), number(row.ratio("rapfast-maps"))]
            cells += [number(row.ratio("rapfast-maps", "-maps"))]
            cells += [number(row.mib_per_view(name)) for name in ("rap-eager", "rapfast")]
        lines.append(cells)
    return table(head, lines)


def appearance_verdict(rows: list[Appearance]) -> str | None:
    """The smallest ratios against bar and goal; None where RAP's loop was not measured."""
    parts = []
    for backend, (what, bar, goal) in APPEARANCE_BARS.items():
        compared = [row for row in rows if row.path == "rap-loop" and row.ratio(backend)]
        if compared:
            slowest = min(compared, key=lambda row: row.ratio(backend))
            least = slowest.ratio(backend)
            text = f"{what} {number(least)} ({slowest.case}, batch of {slowest.batch}; "
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
    lines = []
    for row in rows:
        info = row.by_backend.get("rapfast", {})
        if not info.get("stages"):
            continue
        work, ms = info["color_work"], info["stages"]["color"]
        cells = [number(work["records"]), number(work["bytes"] / 1e6), number(work["operations"] / 1e9)]
        cells += [number(1e3 * work["floor_ms"]), number(1e3 * ms), number(ms / work["floor_ms"])]
        cells += [number(info["prepared"][name]) for name in ("mib", "ms")]
        lines.append([row.case, str(row.batch), *cells])
    return table(head, lines) if lines else None


def appearance_stage_table(rows: list[Appearance]) -> str | None:
    """rapfast's stages from reference images on, ms per view; None where there are none."""
    known = [(row, row.by_backend["rapfast"]["stages"]) for row in rows if row.by_backend.get("rapfast")]
    known = [(row, stages) for row, stages in known if stages]
    if not known:
        return None
    names = list(dict.fromkeys(["maps", *STAGES, *(name for _, stages in known for name in stages)]))
    cells = [[row.case, str(row.batch), *(number(stages.get(name)) for name in names)] for row, stages in known]
    return table(["case", "batch", *names], cells)


def appearance_section(run: Run, plots: dict[str, str]) -> list[str]:
    """The paragraphs for one machine, none where the run has no appearance in it."""
    rows = appearance_rows(run)
    if not rows:
        return []
    parts = [f"### Appearance, {run.device_name}", f"{provenance(run)}. Milliseconds per view."]
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
    parts = [f"### Copies between host and GPU, {run.device_name}", f"{provenance(run)}. Milliseconds a batch."]
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
                rows.append([size, str(views), until, *map(number, times), *ratios])
    head = [
        "upload",
        "views",
        "until",
        *UPLOADS.values(),
        "blocking / non_blocking",
        "/ pinned, non_blocking",
        "/ own stream",
    ]
    return table(head, rows) if rows else None


def _download_table(run: Run) -> str | None:
    rows = []
    for size, views in _transfer_batches(run):
        cells: list[str] = []
        for suffix in ("", "-pinned"):
            each, batched = (
                run.transfers.get((f"download-{size}", way + suffix, views), {}).get("ms")
                for way in ("per-tensor", "batched")
            )
            cells += [number(each), number(batched), _times(each, batched)]
            if not suffix:
                cells.append(number(run.transfers.get((f"download-{size}", "batched-kept", views), {}).get("ms")))
        if set(cells) != {"–"}:
            rows.append([size, str(views), *cells])
    head = ["download", "views", "per tensor", "one batch", "ratio", "to kept memory"]
    head += ["pinned, per tensor", "pinned, one batch", "ratio"]
    return table(head, rows) if rows else None


def _transfer_batches(run: Run) -> list[tuple[str, int]]:
    """(size, views), in the run's order."""
    return list(dict.fromkeys((case.rsplit("-", 1)[1], views) for case, _, views in run.transfers))


def _times(slow: float | None, fast: float | None) -> str:
    return number(slow / fast) if slow and fast else "–"


# --- what goes into the files ----------------------------------------------------------------------------------------


def docs_section(runs: list[Run], plots: dict[str, str], appearance_plots: dict[str, str]) -> str:
    """What stands between the markers of docs/benchmarks.md; both ``plots`` are image names by machine."""
    from bench.report_augment import augment_section

    parts = []
    for run in runs:
        if run.records:
            parts += _forward_section(run, plots)
        parts += backward_section(run)
        parts += appearance_section(run, appearance_plots)
        parts += transfer_section(run)
        parts += augment_section(run)
    return "\n\n".join(parts)


def _forward_section(run: Run, plots: dict[str, str]) -> list[str]:
    parts = [f"### {run.device_name}", f"{provenance(run)}. Milliseconds per view."]
    if run.machine.get("scale") == "reduced":
        parts.append("The reduced cases: small scenes for a machine without a GPU.")
    if _gpu_cases(run):
        parts.append(forward_table(run))
        if run.earlier:
            parts.append(f"Measured in earlier runs alone: {run.earlier_runs()}.")
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
    """The newest GPU run in short, and the CPU case of each machine: one bar, and what CPUs make of it differs."""
    on_gpu = [run for run in runs if run.machine.get("gpu")]
    parts = [part for run in on_gpu[:1] for part in _readme_forward(run)]
    parts += next(filter(None, (backward_readme(run, README_BATCH) for run in on_gpu)), [])
    parts += next(filter(None, map(_readme_appearance, on_gpu)), [])
    parts += filter(None, map(cpu_sentence, runs))
    if not parts:
        raise ReportError("no run has a record for the README: neither a batch of 8 on a GPU nor the CPU case")
    return "\n\n".join(parts)


def claimed_ratios(run: Run) -> list[tuple[str, float]]:
    """(case, gsplat's time over rapfast's) of each row of the README's table."""
    # Cases of one batch vary one thing of another case: they are left to the docs.
    whole = {case.name for case in FULL if len(case.batches) > 1}
    ratios = {case: run.ratio(case, README_BATCH, "gsplat") for case in _gpu_cases(run) if case in whole}
    return [(case, ratio) for case, ratio in ratios.items() if ratio is not None]


def _readme_forward(run: Run) -> list[str]:
    """The rasterizer, in one batch."""
    rows = []
    for case, ratio in claimed_ratios(run):
        row = [case + run.mark(case, README_BATCH)]
        row += [number(run.get(case, name, README_BATCH, "ms_per_view")) for name in ("gsplat", "rapfast")]
        rows.append([*row, number(ratio, 3)])
    if not rows:
        return []
    version = run.machine["versions"].get("gsplat")
    theirs = f"gsplat {version}" if version else "gsplat"
    lines = table([f"ms per view, batch of {README_BATCH}", theirs, "rapfast", "times faster"], rows)
    text = f"{provenance(run)}. Both were measured in one run, after their pixels were compared."
    if any(run.mark(case, README_BATCH) for case, _ in claimed_ratios(run)):
        text += f" Of earlier runs: {run.earlier_runs()}."
    return [lines, text]


def _readme_appearance(run: Run) -> list[str]:
    """RAP's loop to the CPU, batch of 8."""
    lines = []
    for row in appearance_rows(run):
        if row.path == "rap-loop" and row.batch == README_BATCH and row.ratio("rapfast") and row.ratio("rapfast-maps"):
            cells = [row.case.removeprefix("rap-"), number(row.baseline_ms()), number(row.ms("rapfast"))]
            cells += [f"**{number(row.ratio('rapfast'))}**", number(row.ms("rapfast-maps"))]
            lines.append([*cells, f"**{number(row.ratio('rapfast-maps'))}**"])
    if not lines:
        return []
    head = ["RAP's view synthesis, ms per view", "RAP's loop", "rapfast", "times faster"]
    text = "From poses and reference images to normalised 427x240 tensors on the CPU, batch of 8. RAP's loop: the "
    text += f"faster of eager and compiled torch, with gsplat. {provenance(run)}."
    return [table([*head, "rapfast, feature maps there", "times faster"], lines), text]


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
    return problems + _write_claims(root)


def _write_claims(root: Path) -> list[str]:
    """docs/claims.md, where there is one."""
    from bench import claims

    path = root / "docs" / "claims.md"
    if not path.is_file():
        return []
    try:
        for name, content in claims.blocks(root / "bench" / "results").items():
            replace_between(path, claims.markers(name), content)
    except ReportError as error:
        return [str(error)]
    return []


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
    saving.add_argument("runs", type=Path, nargs="*", help="parts of one; default: the newest of bench_out/")
    options = parser.parse_args(arguments)
    try:
        if options.command == "save":
            print(save(options.runs or [_newest_output()], options.root / "bench" / "results"))
            return 0
        problems = write(options.root, with_plots=not options.no_plots)
    except (ReportError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
