"""What the plans this project began with claim, beside what was measured: the tables of docs/claims.md.

Figures come from the runs committed under bench/results/ alone, each ratio from records of one run but where a table
names two; where no run has them the place says so. The document stands between marker lines, `<!-- claim NAME -->` and
`<!-- /claim NAME -->`; `python bench/report.py` writes what is between them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bench.report_runs import newest_of_each

Key = tuple[str, str, int]  # case, backend, batch


class Evidence:
    """The committed runs on the first GPU's model, newest last."""

    def __init__(self, results: Path) -> None:
        self.runs: list[dict[str, Any]] = []
        for path in sorted(results.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["machine_info"].get("gpu"):
                self.runs.append(content)
        self.runs.sort(key=lambda run: run["datetime"])
        names = [run["machine_info"]["gpu"]["name"] for run in self.runs]
        self.runs = [run for run, name in zip(self.runs, names, strict=True) if name == names[0]]

    def records(self, direction: str, claim: str | None = None) -> dict[Key, dict[str, Any]]:
        """Of the newest run that has any of a direction ("rap-loop", "transfer", "claim", "augment"); of "fwd" each
        case and batch from the newest run that has it."""
        found = [
            {
                (info["case"], info["backend"], info["batch"]): info
                for info in (benchmark["extra_info"] for benchmark in run["benchmarks"])
                if info.get("direction") == direction and info.get("claim") == claim
            }
            for run in reversed(self.runs)
        ]
        return newest_of_each(found)[0] if direction == "fwd" else next(filter(None, found), {})

    def times(self, claim: str) -> dict[Key, float]:
        """Milliseconds of a unit."""
        return {key: info["ms"] for key, info in self.records("claim", claim).items()}


# --- numbers as text -------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, all before the point; a dash for None."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    before = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{digits - before}f}"


def span(values: Iterable[float]) -> str:
    """Such as "1.05 to 3.32"; one number where they are the same."""
    values = list(values)
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def table(head: list[str], rows: list[list[str]]) -> str | None:
    """Markdown, the first column aligned left; None without rows."""
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows)) if rows else None


def verdict(values: Iterable[float], low: float, high: float) -> str:
    """Of what was measured against a claimed range; one number is a range of five per cent to either side."""
    if low == high:
        low, high = 0.95 * low, 1.05 * high
    least, most = min(values := list(values)), max(values)
    if least > high:
        return "more"
    if most < low:
        return "less"
    if low <= least and most <= high:
        return "holds"
    return "in some cases" if any(low <= value <= high for value in values) else "less or more, by the case"


# --- random views ----------------------------------------------------------------------------------------------------


def rasterizer_ratios(evidence: Evidence) -> dict[str, float]:
    """gsplat's loop of single calls over its batch of 8, by case."""
    records = evidence.records("fwd")
    return {
        case: records[case, "gsplat-loop", batch]["ms_per_view"] / info["ms_per_view"]
        for (case, backend, batch), info in records.items()
        if backend == "gsplat" and (case, "gsplat-loop", batch) in records
    }


def loop_with_batched_rasterizer(evidence: Evidence) -> dict[str, float]:
    """How much faster RAP's loop gets where nothing but the rasterizer takes its 8 views in one call: its time less
    what the rasterizer alone saves, from two runs."""
    forward, found = evidence.records("fwd"), {}
    for (case, backend, batch), info in evidence.records("rap-loop").items():
        loop, batched = (forward.get((case.removeprefix("rap-"), name, 8)) for name in ("gsplat-loop", "gsplat"))
        if backend == "rap-eager" and batch == 8 and loop and batched:
            saved = loop["ms_per_view"] - batched["ms_per_view"]
            found[case] = info["ms_per_view"] / (info["ms_per_view"] - saved)
    return found


def whole_path(evidence: Evidence, ours: str, suffix: str = "") -> dict[tuple[str, int], float]:
    """RAP's loop, the faster of eager and compiled, over rapfast, by case and batch."""
    loops, found = evidence.records("rap-loop"), {}
    for (case, backend, batch), info in loops.items():
        theirs = [loops.get((case, name + suffix, batch)) for name in ("rap-eager", "rap-compiled")]
        if backend == ours and all(theirs):
            found[case, batch] = min(one["ms_per_view"] for one in theirs) / info["ms_per_view"]
    return found


def views_answer(evidence: Evidence) -> Answer:
    planned, ours = loop_with_batched_rasterizer(evidence).values(), whole_path(evidence, "rapfast").values()
    if not (planned and ours):
        return None
    return (
        f"RAP's loop with gsplat's batch {span(planned)} times, rapfast {span(ours)}",
        f"as planned {verdict(planned, 2, 5)}, with rapfast {verdict(ours, 2, 5)}",
    )


def views(evidence: Evidence) -> str | None:
    found = {
        "the rasterizer alone: gsplat in a loop over gsplat in a batch of 8": rasterizer_ratios(evidence),
        "RAP's loop, if only that is changed (by subtraction, from two runs)": loop_with_batched_rasterizer(evidence),
        "RAP's loop over rapfast, new reference images": whole_path(evidence, "rapfast"),
        "RAP's loop over rapfast, feature maps there": whole_path(evidence, "rapfast-maps"),
        "the same, feature maps there for both": whole_path(evidence, "rapfast-maps", "-maps"),
    }
    return table(["", "times faster, over the cases"], [[n, span(r.values())] for n, r in found.items() if r])


def calls_answer(evidence: Evidence) -> Answer:
    for (_, _, batch), info in evidence.records("claim", "calls").items():
        if batch == 8:
            return f"{info['calls']} calls for {info['views']} views", "13" if info["calls"] == 13 else "see below"
    return None


def calls(evidence: Evidence) -> str | None:
    known = {batch: info for (_, _, batch), info in sorted(evidence.records("claim", "calls").items())}
    alone = known.get(1, {}).get("ms")
    rows = [
        [f"{batch}", f"{info['calls']}", number(info["ms"]), number(alone / info["ms"] if alone else None)]
        for batch, info in sorted(known.items())
    ]
    return table(["views in a call", "calls", "ms per view", "times faster than one by one"], rows)


def memory_points(evidence: Evidence, backend: str) -> dict[int, float]:
    """MiB by batch, of the case with the most batches."""
    by_case: dict[str, dict[int, float]] = {}
    for (case, name, batch), info in evidence.records("fwd").items():
        if name == backend and info.get("peak_mib"):
            by_case.setdefault(case, {})[batch] = info["peak_mib"]
    return dict(sorted(max(by_case.values(), key=len).items())) if by_case else {}


def line(points: dict[int, float]) -> tuple[float, float, float]:
    """Least squares: MiB a view, MiB at none, and the largest deviation as a share of the value."""
    n = len(points)
    x, y = sum(points) / n, sum(points.values()) / n
    slope = sum((b - x) * (m - y) for b, m in points.items()) / sum((b - x) ** 2 for b in points)
    start = y - slope * x
    return slope, start, max(abs(start + slope * b - m) / m for b, m in points.items())


def memory_answer(evidence: Evidence) -> Answer:
    points = memory_points(evidence, "rapfast")
    if len(points) < 3:
        return None
    slope, _, off = line(points)
    return (
        f"{number(slope)} MiB a view, {100 * off:.0f} % off a line at most",
        "holds" if off < 0.1 else "does not hold",
    )


def memory(evidence: Evidence) -> str | None:
    ours, theirs = memory_points(evidence, "rapfast"), memory_points(evidence, "gsplat")
    rows = [
        [f"{b}", number(theirs.get(b)), number(theirs[b] / b if b in theirs else None), number(m), number(m / b)]
        for b, m in ours.items()
    ]
    return table(["views in a call", "gsplat, MiB", "a view", "rapfast, MiB", "a view"], rows)


# --- loading, copies, batches ----------------------------------------------------------------------------------------


def loading_answer(evidence: Evidence) -> Answer:
    times = evidence.times("loading")
    ratios = [
        ms / times[case, "4-workers-pinned", batch]
        for (case, way, batch), ms in times.items()
        if way == "1-worker" and (case, "4-workers-pinned", batch) in times
    ]
    return (f"{span(ratios)} times", verdict(ratios, 2, 4)) if ratios else None


def loading(evidence: Evidence) -> str | None:
    times = {(way, batch): ms for (_, way, batch), ms in evidence.times("loading").items()}
    ways, batches = dict.fromkeys(way for way, _ in times), sorted({batch for _, batch in times})
    rows = [[way, *(number(times.get((way, batch))) for batch in batches)] for way in ways]
    return table(["loader", *(f"ms a picture, batch of {batch}" for batch in batches)], rows)


def copies(evidence: Evidence, what: str, slow: str, fast: str, field: str = "ms") -> list[float]:
    """How many times longer one way of copying takes than another, in every size and number of views."""
    found = evidence.records("transfer")
    return [
        info[field] / found[case, fast, batch][field]
        for (case, way, batch), info in found.items()
        if re.fullmatch(rf"{what}-\d+x\d+", case) and way == slow and (case, fast, batch) in found
    ]


def uploads_answer(evidence: Evidence) -> Answer:
    flag, pinned = (
        copies(evidence, "upload", "pageable", fast) for fast in ("pageable-non_blocking", "pinned-non_blocking")
    )
    if not (flag and pinned):
        return None
    return f"the flag alone {span(flag)} times, with pinned memory {span(pinned)}", verdict(flag + pinned, 3.96, 3.96)


def uploads(evidence: Evidence) -> str | None:
    flag, both = "pageable-non_blocking", "pinned-non_blocking"
    found = {
        "until it has arrived: the flag alone": copies(evidence, "upload", "pageable", flag),
        "until it has arrived: pinned memory and the flag": copies(evidence, "upload", "pageable", both),
        "until the call returns: pinned memory and the flag": copies(
            evidence, "upload", "pageable", both, "returns_ms"
        ),
        "with work after it: pinned memory and the flag": copies(evidence, "upload-work", "pageable", both),
        "with work: pinned, on a stream of its own": copies(evidence, "upload-work", "pageable", "pinned-own-stream"),
    }
    head = ["against ordinary memory, blocking", "times faster, over sizes and batches"]
    return table(head, [[name, span(ratios)] for name, ratios in found.items() if ratios])


def downloads_answer(evidence: Evidence) -> Answer:
    ratios = copies(evidence, "download", "per-tensor", "batched")
    return (f"{span(ratios)} times", verdict(ratios, 1.61, 1.61)) if ratios else None


def downloads(evidence: Evidence) -> str | None:
    found, loops, rows = evidence.records("transfer"), evidence.records("rap-loop"), []
    for (case, way, batch), info in found.items():
        batched, loop = found.get((case, "batched", batch)), loops.get(("rap-room-500k-854x480", "rap-eager", batch))
        if case.startswith("download-") and way == "per-tensor" and batched and loop:
            saved, whole = (info["ms"] - batched["ms"]) / batch, loop["ms_per_view"]
            times = [number(one) for one in (info["ms"], batched["ms"], info["ms"] / batched["ms"])]
            rows.append(
                [f"{case.removeprefix('download-')}, {batch} views", *times, number(whole / (whole - saved), 4)]
            )
    return table(["", "one by one, ms", "one copy, ms", "times faster", "so RAP's whole loop (of two runs)"], rows)


def batch_ratios(evidence: Evidence) -> dict[tuple[str, int], float]:
    """One by one over one batch, by what is done and the batch."""
    times = evidence.times("batches")
    return {
        (case, batch): ms / times[case, "batch", batch]
        for (case, way, batch), ms in times.items()
        if way == "loop" and (case, "batch", batch) in times
    }


def batches_answer(evidence: Evidence) -> Answer:
    ratios = batch_ratios(evidence).values()
    return (f"{span(ratios)} times, by what is batched", verdict(ratios, 15.17, 15.17)) if ratios else None


def batches(evidence: Evidence) -> str | None:
    rows = [[case, f"{batch}", number(ratio)] for (case, batch), ratio in batch_ratios(evidence).items()]
    rows += [[f"gsplat, {case}", "8", number(ratio)] for case, ratio in rasterizer_ratios(evidence).items()]
    return table(["one by one over one batch", "batch", "times faster"], rows)


# --- caches, epochs --------------------------------------------------------------------------------------------------


def cache_answer(evidence: Evidence) -> Answer:
    times = {way: ms for (_, way, _), ms in evidence.times("cache").items()}
    if not {"rendered", "cached", "cached-on-disk"} <= set(times):
        return None
    ratios = [times["rendered"] / times[way] for way in ("cached", "cached-on-disk")]
    return f"a view found: {span(ratios)} times; fresh poses are never found", "1 for fresh poses"


def cache(evidence: Evidence) -> str | None:
    times = evidence.times("cache")
    slow = next((ms for (_, way, _), ms in times.items() if way == "rendered"), None)
    rows = [[way, number(ms), number(slow / ms if slow else None)] for (_, way, _), ms in times.items()]
    maps, new = whole_path(evidence, "rapfast-maps"), whole_path(evidence, "rapfast")
    if gains := [maps[key] / new[key] for key in maps if key in new]:
        rows.append(["rendered, for comparison: kept feature maps over new ones", "", span(gains)])
    return table(["a view", "ms", "times faster"], rows)


def epochs(evidence: Evidence) -> dict[int, dict[str, float]]:
    """Milliseconds a training image by way, by batch; "rap" is the faster of RAP's loops."""
    found: dict[int, dict[str, float]] = {}
    for (_, way, batch), ms in evidence.times("epoch").items():
        found.setdefault(batch, {})[way] = ms
    return {
        batch: {"rap": min(ways["rap-eager"], ways["rap-compiled"]), **ways}
        for batch, ways in sorted(found.items())
        if {"rap-eager", "rap-compiled", "rapfast", "rapfast-dataset", "none"} <= set(ways)
    }


def epochs_answer(evidence: Evidence) -> Answer:
    saved = [100 * (1 - min(w["rapfast"], w["rapfast-dataset"]) / w["rap"]) for w in epochs(evidence).values()]
    judged = (f"{low}-{high} %: {verdict(saved, low, high)}" for low, high in ((15, 30), (30, 50)))
    return (f"{span(saved)} % less time", "; ".join(judged)) if saved else None


def epoch(evidence: Evidence) -> str | None:
    rows = []
    for batch, ways in epochs(evidence).items():
        for way in ("rap-eager", "rap-compiled", "rapfast", "rapfast-dataset", "none"):
            share, less = 100 * max(0.0, 1 - ways["none"] / ways[way]), 100 * (1 - ways[way] / ways["rap"])
            rows.append([f"{way}, batch of {batch}", number(ways[way]), f"{share:.0f} %", f"{less:.0f} %"])
    return table(["views by", "ms a training image", "share of synthesis", "less than RAP's loop"], rows)


# --- avatars ---------------------------------------------------------------------------------------------------------

SUBPROCESS_S = 200.0
LOAD_S, INFER_S, PRECOMPUTE_S, SET_S = 80.5, 0.3, 10.0, 8.0
"""Seconds of plan 4's stages: a set in a process of its own; model, source and frames once, a set in one process."""
SAID = {1: (200, 98, 2.0), 3: (600, 115, 5.2), 10: (2000, 170, 11.8), 50: (10000, 490, 20.4), 100: (20000, 890, 22.5)}
"""Its table: by parameter sets, seconds in processes of their own, in one process, and the ratio."""


def by_its_stages(n: int) -> float:
    """Seconds of n parameter sets in one process."""
    return LOAD_S + INFER_S + PRECOMPUTE_S + n * SET_S


def augmented(evidence: Evidence) -> dict[int, dict[str, float]]:
    """Seconds by parameter sets and mode, of the newest run's records of direction "augment"."""
    found: dict[int, dict[str, float]] = {}
    for (_, backend, n), info in evidence.records("augment").items():
        if "seconds" in info:
            found.setdefault(n, {})[backend] = info["seconds"]
    return {n: modes for n, modes in sorted(found.items()) if {"batch", "subprocess"} <= set(modes)}


def avatars_answer(evidence: Evidence) -> Answer:
    ratios = {n: modes["subprocess"] / modes["batch"] for n, modes in augmented(evidence).items()}
    if not ratios:
        return None
    return f"{span(ratios.values())} times for {min(ratios)} to {max(ratios)} sets", verdict(ratios.values(), 5, 22)


def avatars(evidence: Evidence) -> str | None:
    known, rows = augmented(evidence), []
    for n, (each, one, ratio) in SAID.items():
        modes = known.get(n, {})
        said = [f"{each}", f"{one}", f"{ratio:g}", number(by_its_stages(n), 4)]
        measured = [number(modes.get(mode)) for mode in ("subprocess", "batch")]
        measured.append(number(modes["subprocess"] / modes["batch"] if modes else None))
        rows.append([f"{n}", *said, number(SUBPROCESS_S * n / by_its_stages(n)), *measured])
    head = ["sets", "said: processes, s", "one process, s", "ratio", "by its stages, s", "ratio"]
    return table([*head, "measured: processes, s", "one process, s", "ratio"], rows)


# --- the document ----------------------------------------------------------------------------------------------------

Answer = tuple[str, str] | None
"""In short, and the verdict."""


class Claim(NamedTuple):
    """One claim; `name` is its markers'. `block` may be None where nothing was measured."""

    name: str
    title: str
    said: str
    plans: str
    tests: str  # what measures it, under bench/
    answer: Callable[[Evidence], Answer]
    block: Callable[[Evidence], str | None]


CLAIMS = (
    Claim(
        "views",
        "Random views in batches",
        "2-5 times",
        "0, 1, 2",
        "test_appearance.py bench/test_forward.py",
        views_answer,
        views,
    ),
    Claim("calls", "Calls for 100 views", "12-13", "0", "test_claims.py -k calls", calls_answer, calls),
    Claim(
        "memory", "Memory against the batch", "about linear", "0", "test_forward.py -k room-500k", memory_answer, memory
    ),
    Claim("loading", "Loading data", "2-4 times", "0, 1, 2", "test_claims.py -k loading", loading_answer, loading),
    Claim("uploads", "Copies to the GPU", "3.96 times", "0, 1, 2", "test_transfers.py", uploads_answer, uploads),
    Claim("downloads", "Copies to the CPU", "1.61 times", "1, 2", "test_transfers.py", downloads_answer, downloads),
    Claim("batches", "Batch processing", "15.17 times", "2", "test_claims.py -k batches", batches_answer, batches),
    Claim("cache", "Keeping rendered views", "1.5-2 times", "1", "test_claims.py -k cache", cache_answer, cache),
    Claim("epoch", "Training epochs", "15-30 %, 30-50 %", "0, 1, 2", "test_claims.py -k epoch", epochs_answer, epoch),
    Claim("avatars", "Avatars", "5-22 times", "4", "test_augment.py", avatars_answer, avatars),
)


def command(claim: Claim) -> str:
    return f"python -m pytest bench/{claim.tests} --benchmark-json=bench_out/run.json"


def summary(evidence: Evidence) -> str:
    """All claims in short."""
    rows = []
    for claim in CLAIMS:
        measured, held = claim.answer(evidence) or ("not yet", "–")
        rows.append(
            [f"[{claim.title}](#{claim.title.lower().replace(' ', '-')})", claim.said, claim.plans, measured, held]
        )
    head = ["what gets faster", "said", "plan", "measured", "verdict"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def blocks(results: Path) -> dict[str, str]:
    """What stands between the markers of docs/claims.md, by name."""
    evidence = Evidence(results)
    found = {"summary": summary(evidence)}
    for claim in CLAIMS:
        parts = [
            f"Measured by `{command(claim)}`"
            + (":" if claim.answer(evidence) else "; **no committed run has it yet**.")
        ]
        if made := claim.block(evidence):
            parts.append(made)
        found[claim.name] = "\n\n".join(parts)
    return found


def markers(name: str) -> tuple[str, str]:
    return f"<!-- claim {name} -->", f"<!-- /claim {name} -->"
