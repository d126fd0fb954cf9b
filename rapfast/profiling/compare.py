"""Two measurements side by side: how much longer each thing takes, whether that is more than noise, a plot.

Read are profiles (`records`) and the JSON of pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rapfast.io.files import load_json, shorten
from rapfast.profiling import records
from rapfast.profiling.machine import name_of
from rapfast.profiling.statistics import Ratio, Sample, ratio, sample, summary

if TYPE_CHECKING:
    from rich.table import Table

TIME, MEMORY = "ms", "MiB"

COLORS = {"slower": "#c1440e", "more": "#c1440e", "faster": "#2e7d32", "less": "#2e7d32", "same": "#666666"}


class Measured(NamedTuple):
    """What a file says.

    Attributes:
        path: of the file. kind: "profile" or "pytest-benchmark". machine: the GPU's or processor's name.
        samples: by (name, unit), in the file's order; the units are `TIME` and `MEMORY`.
    """

    path: str
    kind: str
    machine: str
    samples: dict[tuple[str, str], Sample]


class Row(NamedTuple):
    """One thing in both files.

    Attributes:
        verdict: "slower", "faster", "more", "less" (memory) or "same"; "unknown" where there is only one measurement.
    """

    name: str
    unit: str
    before: Sample
    after: Sample
    ratio: Ratio
    verdict: str

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("slower", "more")


class Comparison(NamedTuple):
    before: Measured
    after: Measured
    rows: list[Row]
    only_before: list[str]
    only_after: list[str]

    @property
    def regressions(self) -> list[Row]:
        return [row for row in self.rows if row.is_regression]


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Measured:
    """A profile or a run of pytest-benchmark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, neither of the two, or holds no time.
    """
    content = load_json(path)
    if isinstance(content, dict) and "benchmarks" in content:
        kind, machine, samples = "pytest-benchmark", *_pytest_benchmark(path, content)
    elif isinstance(content, dict) and str(content.get("format", "")).startswith("rapfast profile"):
        if reason := records.why_not(content):
            raise ValueError(f"{path}: is no profile of this version: {reason}")
        kind, machine, samples = "profile", name_of(content["machine"]), _profile(content)
    else:
        raise ValueError(
            f'{path}: is neither a profile of rapfast ("format" is {records.FORMAT!r}) nor a run of pytest-benchmark '
            '(it has "benchmarks")'
        )
    if not samples:
        raise ValueError(f"{path}: holds no time above 0")
    return Measured(str(path), kind, machine, samples)


def _profile(content: dict[str, Any]) -> dict[tuple[str, str], Sample]:
    """Sections by their path. A repeated profile is measured by the sums of its runs, another by single calls."""
    found: dict[tuple[str, str], Sample] = {}
    for section in content["sections"]:
        name = " / ".join(([] if section["thread"] == "main" else [section["thread"]]) + section["path"])
        # stages of a native call have the GPU's time alone; of others that of the host holds waiting too
        times = section["host_ms"] or section["gpu_ms"]
        if times is not None:
            values = times["runs"] if content["runs"] > 1 else times["samples"]
            if values := [ms for ms in values if ms > 0]:
                found[name, TIME] = sample(values)
        if peak := ((section["memory"] or {}).get("gpu") or {}).get("rise"):
            found[name, MEMORY] = Sample(peak / 2**20, None, 1)
    return found


def _pytest_benchmark(path: str | Path, content: dict[str, Any]) -> tuple[str, dict[tuple[str, str], Sample]]:
    found: dict[tuple[str, str], Sample] = {}
    about, benchmarks = content.get("machine_info"), content["benchmarks"]
    if not isinstance(benchmarks, list):
        raise ValueError(f'{path}: "benchmarks" must be an array, got {shorten(benchmarks)}')
    for place, entry in enumerate(benchmarks):
        try:
            name, stats = entry["fullname"], entry["stats"]
            data = [1e3 * float(value) for value in stats.get("data") or []]
            if data and min(data) > 0:
                found[name, TIME] = sample(data)
            elif stats["median"] > 0:
                found[name, TIME] = summary(1e3 * stats["median"], 1e3 * stats["iqr"], int(stats["rounds"]))
            extra = entry.get("extra_info") or {}
            if extra.get("peak_mib") and extra.get("device") == "cuda":  # a process's resident set is never the same
                found[name, MEMORY] = Sample(float(extra["peak_mib"]), None, 1)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: benchmarks[{place}] is not as pytest-benchmark writes it: {type(error).__name__}: {error}"
            ) from None
    return _machine_name(about), found


def _machine_name(about: Any) -> str:
    if isinstance(about, dict):
        for part in (about.get("gpu"), about.get("cpu")):
            name = (part.get("name") or part.get("brand_raw")) if isinstance(part, dict) else None
            if isinstance(name, str):
                return name
    return "unknown machine"


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(
    before: Measured, after: Measured, threshold: float = 0.05, confidence: float = 0.99, min_ms: float = 0.0
) -> Comparison:
    """What stands in both.

    A thing is slower where even the lower bound of its ratio is above 1 + threshold, faster where even the upper one is
    below 1 / (1 + threshold). What a GPU's allocator says does not vary: a ratio of
    memory is its own bound.

    Args:
        threshold: a change that is none, as a fraction: two runs of one program differ by a few per cent.
        confidence: of the bounds, 0..1.
        min_ms: leave out what takes less than that in both.
    """
    rows = []
    for (name, unit), first in before.samples.items():
        second = after.samples.get((name, unit))
        if second is None or (unit == TIME and max(first.median, second.median) < min_ms):
            continue
        found = ratio(first, second, confidence)
        if unit == MEMORY:
            found = Ratio(found.value, found.value, found.value)
        rows.append(Row(name, unit, first, second, found, _verdict(found, unit, threshold)))

    def alone(one: Measured, other: Measured) -> list[str]:
        names = {name for name, _ in other.samples}
        return list(dict.fromkeys(name for name, _ in one.samples if name not in names))

    return Comparison(before, after, rows, alone(before, after), alone(after, before))


def _verdict(found: Ratio, unit: str, threshold: float) -> str:
    if found.low is None:
        return "unknown"
    if found.low > 1 + threshold:
        return "slower" if unit == TIME else "more"
    if found.high < 1 / (1 + threshold):
        return "faster" if unit == TIME else "less"
    return "same"


# --- showing ---------------------------------------------------------------------------------------------------------


def table(found: Comparison) -> Table:
    """Ratios for the terminal, in the order of the first file."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    shown.add_column("", no_wrap=True, overflow="ellipsis")
    for head in ("before", "after", "", "after / before", "bounds", "n", ""):
        shown.add_column(head, justify="right", no_wrap=True)
    styles = {"slower": "bold red", "more": "bold red", "faster": "green", "less": "green"}
    for row in found.rows:
        r = row.ratio
        bounds = "" if r.low is None or row.unit == MEMORY else f"{r.low:.3f} .. {r.high:.3f}"
        counts = "" if row.unit == MEMORY else f"{row.before.n}, {row.after.n}"
        style = styles.get(row.verdict)
        verdict = f"[{style}]{row.verdict}[/]" if style else f"[dim]{row.verdict}[/]"
        numbers = f"{row.before.median:,.4g}", f"{row.after.median:,.4g}", row.unit, f"{r.value:.3f}"
        shown.add_row(escape(row.name), *numbers, bounds, counts, verdict)
    return shown


def sentences(found: Comparison) -> list[str]:
    """What the table does not say."""
    said = []
    if found.before.machine != found.after.machine:
        said.append(f"note: measured on two machines, {found.before.machine} and {found.after.machine}")
    for what, names in ((found.before.path, found.only_before), (found.after.path, found.only_after)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            said.append(f"note: only in {what}: {', '.join(names[:3])}{more}")
    if unknown := sum(row.verdict == "unknown" for row in found.rows):
        said.append(
            f"note: {unknown} of {len(found.rows)} were measured once in a file, so nothing tells a change from noise: "
            "repeat them (rapfast profile --repeats 5, more rounds of a benchmark)"
        )
    counts = {verdict: sum(row.verdict == verdict for row in found.rows) for verdict in COLORS}
    said.append(", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n) or "nothing could be judged")
    return said


def plot(found: Comparison, path: Path, threshold: float) -> None:
    """A line for each name: the ratio of times with its bounds, a square for that of memory, and the band within which
    a change counts as none. By its ending an SVG, PNG or PDF file.

    Raises:
        ImportError: matplotlib is not installed; says how to install it.
    """
    from rapfast.io.atomic import atomic_path
    from rapfast.profiling.plotting import pyplot

    plt = pyplot()
    rows = found.rows
    names = list(dict.fromkeys(row.name for row in reversed(rows)))
    labels = _short_names(names)
    with plt.rc_context({"svg.hashsalt": "rapfast", "font.size": 9}):
        width = 7 + 0.06 * max(map(len, labels), default=0)
        figure, axis = plt.subplots(figsize=(width, 1.3 + 0.24 * len(names)), layout="constrained")
        axis.axvspan(1 / (1 + threshold), 1 + threshold, color="#000000", alpha=0.07, lw=0)
        axis.axvline(1, color="#000000", lw=0.8, alpha=0.5)
        for row in rows:
            y, color = names.index(row.name), COLORS.get(row.verdict, "#aaaaaa")
            marker = "s" if row.unit == MEMORY else "o"
            if row.ratio.low is not None and row.ratio.low < row.ratio.high:
                axis.plot([row.ratio.low, row.ratio.high], [y, y], color=color, lw=2, alpha=0.6)
            axis.plot(row.ratio.value, y, marker, color=color, ms=5)
        axis.set_yticks(range(len(names)), labels)
        axis.set_ylim(-0.7, len(names) - 0.3)
        ends = [end for row in rows for end in (row.ratio.low or row.ratio.value, row.ratio.high or row.ratio.value)]
        low, high = min([*ends, 0.9]), max([*ends, 1.1])
        axis.set_xscale("log")
        axis.set_xlim(low / 1.1, high * 1.1)
        ticks = _ticks(low / 1.1, high * 1.1)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        squares = "; squares: memory" if any(row.unit == MEMORY for row in rows) else ""
        axis.set_xlabel(f"after / before (left of the band: better{squares})")
        axis.set_title(f"{Path(found.after.path).name} against {Path(found.before.path).name}", loc="left", fontsize=10)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.grid(axis="x", alpha=0.2)
        axis.tick_params(axis="y", length=0)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150)
        plt.close(figure)


def _short_names(names: list[str]) -> list[str]:
    """Without the folder that all have in front, as benchmarks of one file have."""
    heads = {name.rpartition("::")[0] for name in names}
    strip: Callable[[str], str] = (lambda name: name.rpartition("::")[2]) if len(heads) == 1 else str
    return [strip(name) for name in names]


_TICKS = (
    (0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25),
    (0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0),
    (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
    tuple(10.0**n for n in range(-6, 7)),
)


def _ticks(low: float, high: float) -> list[float]:
    """Labels on a logarithmic axis: of the finest that reach over it, and few enough not to touch."""
    for steps in _TICKS:
        ticks = [tick for tick in steps if low <= tick <= high]
        if low > steps[0] / 2 and high < steps[-1] * 2 and len(ticks) <= 8:
            return ticks
    return [1.0]
