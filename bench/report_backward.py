"""Tables of forward and backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from bench.report_runs import Run, floor_cells, number, provenance, table

BACKWARD_BAR, BACKWARD_GOAL = 2.5, 4.0
"""How many times faster than gsplat a step must be, and is wanted to: geometric means over the cases."""


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
        cells = [number(step.bwd.get(name, {}).get("ms_per_view")) for name in ("gsplat", "rapfast")]
        cells += [number(step.ratio), number(step.scene.get("rapfast", {}).get("ms_per_view"))]
        share = step.cameras_share
        cells.append("–" if share is None else f"{100 * share:.1f} %")
        cells += [number(step.bwd.get(name, {}).get("peak_mib")) for name in ("gsplat", "rapfast")]
        errors = step.bwd.get("rapfast", {}).get("errors")
        cells.append(f"{max(errors.values()):.0e}" if errors else "–")
        rows.append([step.case, str(step.batch), *cells])
    return table(head, rows)


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
    return f"Forward and backward are {number(mean)} times as fast as gsplat's in the geometric mean ({verdicts})."


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
    parts = [f"### Forward and backward, {run.device_name}", f"{provenance(run)}. {text}", backward_table(steps)]
    verdict = backward_verdict(steps)
    return parts if verdict is None else [*parts, verdict]


def backward_readme(run: Run, batch: int) -> list[str]:
    """The README's paragraphs for one batch, none where the run has no backward in it."""
    steps = [step for step in backward_steps(run) if step.batch == batch and step.ratio]
    if not steps:
        return []
    rows = [
        [step.case, *(number(step.bwd[name]["ms_per_view"]) for name in ("gsplat", "rapfast")), number(step.ratio, 3)]
        for step in steps
    ]
    head = [f"forward and backward, ms per view, batch of {batch}", "gsplat", "rapfast", "times faster"]
    text = "To every parameter of the scene and the viewmats, after the gradients were compared."
    return [table(head, rows), f"{text} {backward_verdict(steps)} {provenance(run)}."]


def backward_floors(run: Run) -> list[str]:
    """The steps of going back beside their floors, the paragraphs for docs/performance.md; none where nothing was
    counted."""
    from bench.floors import Work

    parts = []
    for step in backward_steps(run):
        info = step.bwd.get("rapfast", {})
        if (info.get("work") or {}).keys() == set(Work._fields) and info.get("steps"):
            parts += [f"### {step.case}, going back, batch of {step.batch}", _floors_table(info)]
    return [f"{provenance(run)}.", *parts] if parts else []


def _floors_table(info: dict[str, Any]) -> str:
    from bench import floors

    expected, steps = floors.backward_floors(floors.Work(**info["work"])), info["steps"]
    head = ["step", "MB / view", "M operations", "M ex2", "floor, us", "set by", "measured, us", "times"]
    rows = [[name, *floor_cells(floor, steps.get(name))] for name, floor in expected.items()]
    return table(head, rows)
