"""The tables of avatar augmentation, from the records of direction "augment"; a part of report.py."""

from __future__ import annotations

from typing import Any, NamedTuple

SEED = {1: (200, 98), 3: (600, 115), 10: (2000, 170), 50: (10_000, 490), 100: (20_000, 890)}
"""Seconds for N sets, one process a set and in a batch, of the seed on an RTX A6000."""

SEED_FRAMES_PER_SECOND = 137 / 8  # a set of 137 frames took it 8 s
BAR = 20.0  # times that, of a further set without the refiner
MODELLED = (50, 100)
MODEL_SECONDS = 80.5
"""What loading its model took the seed; the synthetic provider has none. A parameter of the modelled rows."""


class Numbers(NamedTuple):
    """What one case's records say, in seconds."""

    frames: int
    by_mode: dict[str, dict[int, float]]  # of N sets

    def marginal(self, mode: str) -> float | None:
        """A further set, from the fewest and the most that were measured."""
        times = self.by_mode.get(mode, {})
        if len(times) < 2:
            return None
        low, high = min(times), max(times)
        return (times[high] - times[low]) / (high - low)

    def modelled(self, mode: str, n: int, load: float = 0.0) -> float | None:
        """N sets, where a model takes `load` seconds: in processes N times what a set took in the largest run, in a
        batch the time of one set and N - 1 times that of a further one."""
        times = self.by_mode.get(mode, {})
        if not times:
            return None
        if mode == "subprocess":
            return n * (times[max(times)] / max(times) + load)
        further = self.marginal("job")
        return None if further is None or 1 not in times else load + times[1] + (n - 1) * further


def numbers(run: Any) -> dict[str, Numbers]:
    """By case."""
    found: dict[str, Numbers] = {}
    for (case, mode, n), info in run.augment.items():
        entry = found.setdefault(case, Numbers(info["frames"], {}))
        entry.by_mode.setdefault(mode, {})[n] = info["seconds"]
    return found


def augment_section(run: Any) -> list[str]:
    """The paragraphs for one machine, none where the run has no augmentation in it."""
    from bench.report_runs import provenance

    parts: list[str] = []
    for case, entry in numbers(run).items():
        parts += [f"### Avatar augmentation, {case}, {run.device_name}", f"{provenance(run)}. Seconds."]
        parts.append(_sets_table(entry))
        parts += [text for text in (_further_table(run, case, entry), _verdict(case, entry)) if text]
    return parts


def _sets_table(entry: Numbers) -> str:
    """N sets in both modes beside the seed's claims; rows by the formula are marked."""
    from bench.report_runs import number, table

    measured = sorted(set(entry.by_mode.get("subprocess", {})) | set(entry.by_mode.get("batch", {})))
    rows = []
    for n in measured:
        single, batch = (entry.by_mode.get(mode, {}).get(n) for mode in ("subprocess", "batch"))
        rows.append(_row(str(n), "measured", single, batch, SEED.get(n)))
    for load in (0.0, MODEL_SECONDS):
        for n in MODELLED if not load else (*measured, *MODELLED):
            single, batch = (entry.modelled(mode, n, load) for mode in ("subprocess", "batch"))
            how = "modelled" if not load else f"modelled, model {number(load)} s"
            if single and batch:
                rows.append(_row(str(n), how, single, batch, SEED.get(n)))
    head = ["sets", "how", "a process a set", "batch", "ratio", "the seed's", "batch", "ratio"]
    return table(head, rows)


def _row(n: str, how: str, single: float | None, batch: float | None, claimed: tuple[int, int] | None) -> list[str]:
    from bench.report import _times
    from bench.report_runs import number

    cells = [n, how, number(single), number(batch), _times(single, batch)]
    return cells + ([number(claimed[0]), number(claimed[1]), _times(*claimed)] if claimed else ["–"] * 3)


def _further_table(run: Any, case: str, entry: Numbers) -> str | None:
    """What N sets take in a process that has done it before, by stage, and what a further one takes."""
    from bench.report_runs import number, table

    stages = ("load_video", "precompute", "render", "finish")
    rows = []
    for mode, what in (("job", "without refiner"), ("job-refiner", "with the refiner")):
        for n, seconds in sorted(entry.by_mode.get(mode, {}).items()):
            took = run.augment[case, mode, n].get("stages") or {}
            rows.append([what, str(n), *(number(took.get(name)) for name in stages), number(seconds), "–", "–"])
        further = entry.marginal(mode)
        if further:
            rate = number(entry.frames / further)
            rows.append([what, "a further one", *["–"] * len(stages), number(further), rate,
                         number(entry.frames / further / SEED_FRAMES_PER_SECOND)])  # fmt: skip
    if not rows:
        return None
    names = ["video", "precompute", "render", "finish films"]
    return table(["in one process", "sets", *names, "all", "frames / s", "times the seed's 17"], rows)


def _verdict(case: str, entry: Numbers) -> str | None:
    from bench.report_runs import number

    further = entry.marginal("job")
    if not further or not case.endswith("512x512"):
        return None
    times = entry.frames / further / SEED_FRAMES_PER_SECOND
    verdict = "met" if times >= BAR else "missed"
    return (
        f"A further set without the refiner, films encoded beside: {number(entry.frames / further)} frames a second, "
        f"{number(times)} times the seed's {number(SEED_FRAMES_PER_SECOND)} (bar {BAR:.0f}: {verdict})."
    )
